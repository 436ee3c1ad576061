import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.training import muon


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_orthogonalized_singular_values_are_near_one(shape):
    matrices = prng.normal(prng.key(0), (3, *shape))
    values = torch.linalg.svdvals(muon.orthogonalize(matrices))
    assert values.min() > 0.6 and values.max() < 1.25


def test_orthogonalization_keeps_the_singular_vectors():
    matrix = prng.normal(prng.key(1), (8, 12))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ muon.orthogonalize(matrix) @ v.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-4


def test_every_update_has_the_root_mean_square_of_adams():
    params = {"wide": torch.zeros(16, 48), "conv": torch.zeros(8, 4, 3, 3), "qkv": torch.zeros(48, 16)}
    grads = {name: prng.normal(prng.key(index), tuple(leaf.shape)) for index, (name, leaf) in enumerate(params.items())}
    optimizer = muon.muon(1e-2)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for update in updates.values():
        assert float(update.square().mean().sqrt()) == pytest.approx(1e-2 * muon.UPDATE_RMS, rel=0.25)


def test_queries_keys_and_values_are_orthogonalized_apart():
    grad = torch.cat([scale * prng.normal(prng.key(index), (8, 8)) for index, scale in enumerate((1.0, 1e-3, 10.0))])
    params = {"qkv": torch.zeros(24, 8)}
    optimizer = muon.scale_by_muon()
    updates, _ = optimizer.update({"qkv": grad}, optimizer.init(params), params)
    alone = muon.UPDATE_RMS * 8**0.5 * muon.orthogonalize(grad[8:16] * 1.95)
    torch.testing.assert_close(updates["qkv"][8:16], alone, rtol=1e-3, atol=1e-4)


def test_a_vector_is_refused_by_path():
    with pytest.raises(ValueError, match="norm has shape"):
        muon.muon(1e-2).init({"norm": torch.ones(4)})
