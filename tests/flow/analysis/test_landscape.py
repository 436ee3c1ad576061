"""Losses whose Hessian and whose gradients' scatter are known."""

import pytest
import torch

from functional_sd3.core import prng, transform, tree
from functional_sd3.flow import path
from functional_sd3.flow.analysis import landscape
from functional_sd3.transformer import mmdit
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def normal(shape, seed=0, dtype=torch.float64):
    return prng.normal(prng.key(seed), shape, dtype)


PARAMS = {"first": normal((3, 2)), "rest": [{"second": normal((4,), 1)}]}


def quadratic(curvature):
    """1/2 p^T C p over the numbers of PARAMS in order."""

    def loss(params):
        flat = torch.cat([leaf.flatten() for leaf in tree.leaves(params)])
        return 0.5 * flat @ curvature @ flat

    return loss


def test_the_hessian_of_a_quadratic_loss_has_the_eigenvalues_and_directions_of_its_matrix():
    matrix = normal((10, 10), 2)
    curvature = matrix @ matrix.T - 5 * torch.eye(10, dtype=torch.float64)
    actual = landscape.hessian_eigenvalues(quadratic(curvature), PARAMS, prng.key(0), steps=10, count=2)
    values, vectors = torch.linalg.eigh(curvature)
    torch.testing.assert_close(actual.values, values.flip(0))
    assert actual.vectors["first"].shape == (2, 3, 2) and actual.vectors["rest"][0]["second"].shape == (2, 4)
    flat = torch.cat([leaf.flatten(1) for leaf in tree.leaves(actual.vectors)], 1)
    torch.testing.assert_close((flat @ vectors.flip(1)[:, :2]).abs(), torch.eye(2, dtype=torch.float64))


def test_few_products_find_the_sharpest_directions_and_more_steps_than_parameters_are_all_of_them():
    curvature = torch.diag(torch.tensor([100.0, 40.0, -20.0] + [0.1 * i for i in range(7)]).double())
    few = landscape.hessian_eigenvalues(quadratic(curvature), PARAMS, prng.key(0), steps=7)
    torch.testing.assert_close(few.values[[0, 1, -1]], torch.tensor([100.0, 40.0, -20.0]).double(), rtol=1e-4, atol=0)
    every = landscape.hessian_eigenvalues(quadratic(curvature), PARAMS, prng.key(0), steps=50)
    torch.testing.assert_close(every.values, curvature.diagonal().sort(descending=True).values)


@pytest.fixture(scope="module")
def flow():
    """The rectified-flow loss of a small random transformer as a function of one block's weights and of samples."""
    model = models.random_model()
    config = model.config.transformer
    params = tree.cast(model.params["transformer"], torch.float64)
    chosen, rest = tree.partition(params, "blocks.0.image.attention.out.weight")
    context, pooled = normal((3, 5, config.context_width), 1), normal((3, config.pooled_width), 2)
    batch = {
        "x0": normal((3, 16, 2, 2), 3),
        "noise": normal((3, 16, 2, 2), 4),
        "t": torch.tensor([0.2, 0.5, 0.8]).double(),
        "context": context,
        "pooled": pooled,
    }

    def losses(chosen, batch):
        def velocity(x, t):
            whole = tree.combine(chosen, rest)
            return mmdit.apply(whole, config, x, t, batch["context"], batch["pooled"])

        return path.loss(velocity, batch["x0"], batch["noise"], batch["t"])

    return losses, chosen, batch


def test_the_flow_loss_has_hessian_vector_products_that_are_difference_quotients_of_its_gradient(flow):
    losses, params, batch = flow
    direction = tree.map(lambda leaf: normal(leaf.shape, 9), params)

    def loss(params):
        return losses(params, batch).mean()

    product = tree.leaves(transform.hvp(loss, params, direction))[0]
    ahead, behind = (
        torch.func.grad(loss)(tree.map(lambda p, d, s=s: p + s * 1e-5 * d, params, direction)) for s in (1, -1)
    )
    quotient = (tree.leaves(ahead)[0] - tree.leaves(behind)[0]) / 2e-5
    torch.testing.assert_close(product, quotient, rtol=1e-5, atol=1e-7)


def test_the_sharpest_direction_of_the_flow_loss_is_an_eigenvector_of_its_hessian(flow):
    losses, params, batch = flow

    def loss(params):
        return losses(params, batch).mean()

    actual = landscape.hessian_eigenvalues(loss, params, prng.key(0), steps=12)
    direction = tree.map(lambda leaf: leaf[0], actual.vectors)
    product = tree.leaves(transform.hvp(loss, params, direction))[0]
    miss = (product - actual.values[0] * tree.leaves(direction)[0]).norm()
    torch.testing.assert_close(miss, actual.residuals[0], rtol=1e-4, atol=1e-10)
    assert actual.residuals[0] < 0.05 * actual.values[0]


def test_gradients_of_each_sample_of_the_flow_loss_are_those_taken_alone(flow):
    losses, params, batch = flow

    def sample_loss(params, sample):
        return losses(params, tree.map(lambda leaf: leaf[None], sample))[0]

    grads = tree.leaves(transform.per_sample_grads(sample_loss)(params, batch))[0]
    for i in range(3):
        alone = torch.func.grad(sample_loss)(params, tree.map(lambda leaf, i=i: leaf[i], batch))
        torch.testing.assert_close(grads[i], tree.leaves(alone)[0])


def test_the_noise_scale_of_gradients_with_a_known_mean_and_spread_is_estimated_without_bias():
    # g_i = mu + sigma n: |G|^2 = |mu|^2, tr(Sigma) = sigma^2 d. Batches of 4, many of them.
    mean, spread, size = normal((30,), 1), 0.7, 30
    grads = mean + spread * normal((4000, 4, size), 2)
    actual = torch.func.vmap(lambda g: landscape.noise_scale({"a": g[:, :10].reshape(4, 2, 5), "b": g[:, 10:]}))(grads)
    for estimate, truth in ((actual.square, mean.square().sum()), (actual.trace, spread**2 * size)):
        error = estimate.std() / 4000**0.5
        assert abs(estimate.mean() - truth) < 4 * error < 0.1 * truth
    torch.testing.assert_close(actual.scale, actual.trace / actual.square)


def test_the_noise_scale_of_a_loss_of_squares_is_that_of_its_samples():
    # loss_i = |p - z_i|^2 / 2: g_i = p - z_i, so tr(Sigma) is the variance of z, |G|^2 = |p - mean|^2.
    samples, params = normal((500, 6), 1), {"p": normal((6,), 2) * 3}
    grads = transform.per_sample_grads(lambda params, z: 0.5 * (params["p"] - z).square().sum())(params, samples)
    actual = landscape.noise_scale(grads)
    torch.testing.assert_close(actual.trace, samples.var(0).sum())
    square = (params["p"] - samples.mean(0)).square().sum() - actual.trace / 500
    torch.testing.assert_close(actual.square, square)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="1 sample: the scatter"):
        landscape.noise_scale({"g": torch.ones(1, 3)})
