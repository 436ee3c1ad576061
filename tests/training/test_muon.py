"""Muon's updates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.core import prng, tree
from functional_sd3.training import muon, optim


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 1000))
def test_orthogonalized_matrices_have_singular_values_near_one(rows, columns, seed):
    # A matrix whose singular values are known and not tiny.
    left, _ = torch.linalg.qr(prng.normal(prng.key(seed), (rows, rows)))
    right, _ = torch.linalg.qr(prng.normal(prng.key(seed + 1), (columns, columns)))
    rank = min(rows, columns)
    values = 0.2 + prng.uniform(prng.key(seed + 2), (rank,))
    matrix = (left[:, :rank] * values) @ right[:rank]
    actual = torch.linalg.svdvals(muon.orthogonalize(matrix))
    assert 0.6 < float(actual.min()) and float(actual.max()) < 1.3
    # The directions stay: the product with the exact factor is symmetric and positive.
    product = muon.orthogonalize(matrix).T @ (left[:, :rank] @ right[:rank])
    torch.testing.assert_close(product, product.T, atol=1e-3, rtol=1e-3)


def test_updates_have_the_root_mean_square_of_adamw_and_fused_parts_stand_alone():
    grads = {"a": prng.normal(prng.key(0), (16, 64)), "qkv": prng.normal(prng.key(1), (48, 16))}
    transform = muon.scale_by_muon()
    updates, _ = transform.update(grads, transform.init(grads), grads)
    for part in (updates["a"], *updates["qkv"].chunk(3)):
        assert float(part.square().mean().sqrt()) == pytest.approx(muon.UPDATE_RMS, rel=0.2)
    alone, _ = transform.update({"q": grads["qkv"][:16]}, transform.init({"q": grads["qkv"][:16]}), {})
    torch.testing.assert_close(updates["qkv"][:16], alone["q"], atol=1e-5, rtol=1e-4)


def test_a_convolution_is_the_matrix_of_its_outputs():
    kernel = prng.normal(prng.key(2), (8, 4, 3, 3))
    transform = muon.scale_by_muon()
    updates, _ = transform.update({"w": kernel}, transform.init({"w": kernel}), {})
    flat, _ = transform.update({"w": kernel.flatten(1)}, transform.init({"w": kernel.flatten(1)}), {})
    assert torch.equal(updates["w"].flatten(1), flat["w"])


def test_vectors_are_refused_by_path():
    with pytest.raises(ValueError, match="block.bias has shape"):
        muon.muon(1e-3).init({"block": {"bias": torch.zeros(3)}})


def test_a_least_squares_problem_is_solved_and_nothing_given_is_changed():
    target = prng.normal(prng.key(3), (6, 6)) / math.sqrt(6)
    params = {"w": torch.zeros(6, 6)}
    optimizer = muon.muon(optim.trapezoid(0.3, 1, 120, 100))
    state = optimizer.init(params)
    for _ in range(120):
        grads = {"w": params["w"] - target}
        kept = tree.map(torch.clone, (params, grads))
        updates, state = optimizer.update(grads, state, params)
        assert tree.allclose(kept, (params, grads), rtol=0, atol=0)
        params = optim.apply_updates(params, updates)
    assert float((params["w"] - target).norm() / target.norm()) < 0.05
