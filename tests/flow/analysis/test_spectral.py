"""Eigenvalues and singular values of operators that are only multiplied by."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.flow.analysis import spectral

SIZE = 40


def normal(shape, seed=0):
    return prng.normal(prng.key(seed), shape, torch.float64)


def orthogonal(size, seed=0):
    return torch.linalg.qr(normal((size, size), seed)).Q


def symmetric(values, seed=0):
    turn = orthogonal(len(values), seed)
    return turn @ torch.diag(values) @ turn.T


def lanczos(matrix, **options):
    return spectral.lanczos(lambda v: matrix @ v, prng.key(1), len(matrix), dtype=matrix.dtype, **options)


def products(matrix):
    """`forward` and `transpose` of a batch of matrices (batch, m, n)."""
    return (lambda v: matrix @ v), (lambda v: matrix.mT @ v)


def test_lanczos_with_as_many_steps_as_the_size_finds_every_eigenvalue():
    matrix = normal((SIZE, SIZE))
    matrix = matrix + matrix.T
    actual = lanczos(matrix, steps=SIZE, count=3)
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    torch.testing.assert_close(actual.values, expected)
    torch.testing.assert_close(actual.vectors @ actual.vectors.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(actual.vectors @ matrix, expected[:3, None] * actual.vectors)


def test_few_steps_find_the_eigenvalues_that_stand_out_at_both_ends():
    values = torch.cat([torch.tensor([-30.0, 50.0, 100.0]), torch.linspace(-1, 1, 197)]).double()
    actual = lanczos(symmetric(values), steps=14, count=2)
    torch.testing.assert_close(actual.values[[0, 1, -1]], torch.tensor([100.0, 50.0, -30.0]).double())
    assert actual.residuals[[0, 1, -1]].max() < 1e-5 < actual.residuals[2:-1].max()


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 12), st.data())
def test_an_eigenvalue_lies_within_the_residual_of_each_ritz_value_and_none_leaves_the_spectrum(seed, size, data):
    matrix = normal((size, size), seed)
    matrix = matrix + matrix.T
    steps = data.draw(st.integers(1, size))
    actual = lanczos(matrix, steps=steps)
    exact = torch.linalg.eigvalsh(matrix)
    gaps = (actual.values[:, None] - exact).abs().amin(1)
    assert (gaps <= actual.residuals + 1e-9).all()
    assert actual.values[0] <= exact[-1] + 1e-9 and actual.values[-1] >= exact[0] - 1e-9
    direction = actual.vectors[0]
    torch.testing.assert_close((matrix @ direction - actual.values[0] * direction).norm(), actual.residuals[0])


def test_eigenvalues_come_as_often_as_they_are_and_no_more_often():
    # An operator with three different eigenvalues spans three dimensions from any vector: then the run begins anew.
    values = torch.tensor([7.0] * 2 + [3.0] * 4 + [-2.0] * 6).double()
    actual = lanczos(symmetric(values), steps=12, count=12)
    torch.testing.assert_close(actual.values, values)
    torch.testing.assert_close(actual.vectors @ actual.vectors.T, torch.eye(12, dtype=torch.float64))
    # In float32 over many steps the vectors stay orthogonal, so that the largest is actual once.
    ladder = torch.cat([torch.tensor([1000.0]), torch.linspace(0, 1, 99)])
    actual = lanczos(symmetric(ladder.double()).float(), steps=60)
    assert actual.values[0] == pytest.approx(1000, rel=1e-4) and actual.values[1] < 2


def test_the_zero_operator_has_the_eigenvalue_zero():
    actual = lanczos(torch.zeros(5, 5, dtype=torch.float64), steps=5)
    assert torch.equal(actual.values, torch.zeros(5, dtype=torch.float64)) and not actual.residuals.any()


def test_singular_values_are_exact_where_there_are_as_many_probes_as_the_rank():
    matrix = normal((3, 7, 4)) @ normal((3, 4, 6), 1)
    actual = spectral.singular(*products(matrix), normal((3, 6, 5), 2), iterations=0)
    torch.testing.assert_close(actual.values[:, :4], torch.linalg.svdvals(matrix)[:, :4])
    assert actual.values[:, 4].max() < 1e-12


def test_iterations_bring_the_singular_values_up_to_the_true_ones_from_below():
    decay = 0.8 ** torch.arange(30).double()
    matrix = torch.stack([orthogonal(30, 1) @ torch.diag(decay) @ orthogonal(30, 2), orthogonal(30, 3)])
    errors = []
    for iterations in (0, 2, 12):
        values = spectral.singular(*products(matrix), normal((2, 30, 8), 4), iterations=iterations).values
        assert (values <= torch.linalg.svdvals(matrix)[:, :8] + 1e-12).all()
        errors.append(1 - values[0, 0].item())
    assert errors[0] > 10 * errors[1] > 100 * errors[2] and errors[2] < 1e-4
    torch.testing.assert_close(values[1], torch.ones(8, dtype=torch.float64))


def test_singular_vectors_are_orthonormal_and_lead_to_one_another():
    matrix = normal((2, 9, 6))
    actual = spectral.singular(*products(matrix), normal((2, 6, 6), 2), iterations=2)
    identity = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    torch.testing.assert_close(actual.right @ actual.right.mT, identity)
    torch.testing.assert_close(actual.left @ actual.left.mT, identity)
    torch.testing.assert_close(actual.right @ matrix.mT, actual.values[..., None] * actual.left)


def test_both_are_mapped_and_differentiated():
    matrices = torch.stack([symmetric(torch.linspace(1, 3, 8).double(), seed) for seed in (1, 2)])

    def top(matrix):
        return lanczos(matrix, steps=8).values[0]

    def largest(matrix):
        return spectral.singular(*products(matrix[None]), normal((1, 8, 8), 3)).values[0, 0]

    for fn in (top, largest):
        torch.testing.assert_close(torch.func.vmap(fn)(matrices), torch.full((2,), 3.0, dtype=torch.float64))
        # The derivative of the largest eigenvalue of a symmetric matrix is v v^T.
        direction = torch.linalg.eigh(matrices[0]).eigenvectors[:, -1]
        slope = torch.func.grad(fn)(matrices[0])
        torch.testing.assert_close((slope + slope.T) / 2, torch.outer(direction, direction), rtol=1e-5, atol=1e-6)


def test_both_compile_to_one_graph():
    matrix = symmetric(torch.linspace(1, 3, 8).double())

    def both(matrix):
        return lanczos(matrix, steps=2).values, spectral.singular(*products(matrix[None]), matrix[None]).values

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(matrix)
    torch.testing.assert_close(compiled, both(matrix))


@pytest.mark.parametrize(("count", "steps", "size"), [(0, 3, 5), (4, 3, 5), (1, 6, 5)])
def test_more_than_there_is_of_an_operator_is_refused(count, steps, size):
    with pytest.raises(ValueError, match=f"count {count}, steps {steps} and size {size}"):
        spectral.lanczos(lambda v: v, prng.key(0), size, steps=steps, count=count)


@pytest.mark.parametrize("probes", [torch.ones(5, 3), torch.ones(1, 3, 5)])
def test_probes_of_another_shape_are_refused(probes):
    with pytest.raises(ValueError, match="must be .batch, n, k."):
        spectral.singular(lambda v: v, lambda v: v, probes)
