"""Divergence and likelihood: against closed forms, against one another, and under the transforms."""

import math

import pytest
import torch
from torch.func import grad, vmap

from functional_sd3.core import prng
from functional_sd3.core import spec as specs
from functional_sd3.flow import ode, path, schedule
from functional_sd3.flow.analysis import likelihood
from functional_sd3.transformer import mmdit
from tests import models

# torch itself scripts its forward-mode derivatives when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

SIZE = 5
MEAN = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
ROOT = torch.eye(SIZE, dtype=torch.float64) * 0.6 + 0.25 * torch.ones(SIZE, SIZE, dtype=torch.float64).tril()
COVARIANCE = ROOT @ ROOT.T
LINEAR = torch.tensor([[0.3, 1.0, -0.2], [0.4, -0.7, 0.5], [0.1, 0.9, 0.6]], dtype=torch.float64)
MODES = pytest.mark.parametrize("mode", ["forward", "reverse"])


def gaussian_field(x, t):
    """The velocity from N(0, 1) at t = 1 to N(MEAN, COVARIANCE) at t = 0: with C_t = (1 - t)^2 COVARIANCE + t^2,
    -MEAN + (t - (1 - t) COVARIANCE) C_t^-1 (x - (1 - t) MEAN)."""
    mean, covariance = MEAN.to(x), COVARIANCE.to(x)
    t = t.reshape(-1, 1, 1)
    one = torch.eye(SIZE, dtype=x.dtype)
    matrix = (t * one - (1 - t) * covariance) @ torch.linalg.inv((1 - t) ** 2 * covariance + t**2 * one)
    return -mean + (matrix @ (x - (1 - t[..., 0]) * mean)[..., None])[..., 0]


def gaussian_log_density(x):
    return torch.distributions.MultivariateNormal(MEAN, COVARIANCE).log_prob(x.double())


def gaussian_data(count=4, dtype=torch.float32):
    return (MEAN + prng.normal(prng.key(3), (count, SIZE), torch.float64) @ ROOT.T).to(dtype)


def bent_field(x, t):
    return torch.sin(2 * x) * (1 + path.broadcast(t, x)) - 0.5 * x.roll(1, -1) + 0.2 * x


def linear_field(x, t):
    return (1 + path.broadcast(t, x)) * (x @ LINEAR.to(x).T)


def data(shape=(3, 3), dtype=torch.float32, seed=0):
    return prng.normal(prng.key(seed), shape, dtype)


@pytest.mark.parametrize(
    ("method", "steps"),
    [(ode.RK4, 12), (ode.HEUN, 200), (ode.MIDPOINT, 200), (ode.AB4, 100), (ode.DOPRI5, 1)],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_likelihood_under_a_gaussian_flow_is_the_gaussians(method, steps):
    x = gaussian_data()
    actual = likelihood.log_likelihood(gaussian_field, x, method=method, times=torch.linspace(0, 1, steps + 1))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), gaussian_log_density(x), rtol=1e-4, atol=0)


def test_the_density_of_a_bent_flow_integrates_to_one():
    x = torch.linspace(-9, 9, 3001)[:, None]
    field = lambda x, t: torch.sin(2 * x) * (1 + path.broadcast(t, x)) + 0.3  # noqa: E731
    actual = likelihood.log_likelihood(field, x, method=ode.RK4, times=schedule.sigmas(30))
    assert actual.std() > 1
    assert torch.trapezoid(actual.exp(), x[:, 0]).item() == pytest.approx(1, rel=1e-4)


def test_the_volume_of_a_linear_flow_is_the_log_determinant_of_its_matrix():
    x = data(dtype=torch.float64)
    times = torch.linspace(0, 1, 41)
    actual = likelihood.estimate(linear_field, x, method=ode.RK4, times=times)
    # dx/dt = (1 + t) A x has x(1) = exp(3/2 A) x(0).
    matrix = torch.linalg.matrix_exp(1.5 * LINEAR)
    torch.testing.assert_close(actual.volumes[0], torch.logdet(matrix).expand(3), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.logdet(matrix), 1.5 * LINEAR.trace())
    torch.testing.assert_close(actual.noise, x @ matrix.T, rtol=1e-6, atol=1e-6)
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(actual.log_prior, normal.log_prob(actual.noise).sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.log_likelihood, actual.log_prior + actual.volumes[0])
    assert torch.equal(actual.standard_error, torch.zeros(3, dtype=torch.float64))


def test_without_a_flow_the_data_have_the_priors_density():
    x = data((2, 4, 4))
    actual = likelihood.log_likelihood(lambda x, t: 0 * x, x, method=ode.EULER, times=[0.0, 1.0])
    torch.testing.assert_close(actual, torch.distributions.Normal(0.0, 1.0).log_prob(x).sum((1, 2)))
    bits = likelihood.bits_per_dimension(likelihood.log_normal(torch.zeros(1, 7)), 7)
    torch.testing.assert_close(bits, torch.tensor([0.5 * math.log2(2 * math.pi)]))


def test_bits_of_rounded_data_count_the_bins():
    # Uniform on [-1, 1], density 1/2 a dimension, in 256 bins: 8 bits.
    bits = likelihood.bits_per_dimension(torch.tensor(10 * math.log(0.5)), 10, bin_width=2 / 256)
    assert bits.item() == pytest.approx(8)


@MODES
@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_the_exact_divergence_is_the_trace_of_the_jacobian(mode, chunk_size):
    x, t = data((2, 3, 2), torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64)
    actual = likelihood.divergence(bent_field, x, t, mode=mode, chunk_size=chunk_size)
    for i in range(2):
        jacobian = torch.func.jacrev(lambda x, i=i: bent_field(x[None], t[i : i + 1])[0])(x[i])
        torch.testing.assert_close(actual[i], jacobian.reshape(6, 6).trace())


@MODES
@pytest.mark.parametrize("draw", [likelihood.rademacher, prng.normal], ids=["rademacher", "gaussian"])
def test_the_mean_over_a_thousand_probes_is_the_divergence(mode, draw):
    x = data((4, SIZE))
    times, options = torch.linspace(0, 1, 4), {"method": ode.HEUN}
    exact = likelihood.estimate(bent_field, x, times=times, **options)
    actual = likelihood.estimate(
        bent_field,
        x,
        times=times,
        divergence="hutchinson",
        key=prng.key(8),
        probes=1000,
        draw=draw,
        mode=mode,
        chunk_size=250,
        **options,
    )
    off = (actual.log_likelihood - exact.log_likelihood).abs()
    assert (actual.standard_error > 0).all() and (off <= 3 * actual.standard_error).all()
    torch.testing.assert_close(actual.noise, exact.noise)
    torch.testing.assert_close(actual.standard_error, actual.volumes.std(0) / math.sqrt(1000))


@pytest.mark.parametrize("gaussian", [False, True])
def test_probes_spread_as_the_theory_says(gaussian):
    x = data((1, 3), torch.float64)
    draw = prng.normal if gaussian else likelihood.rademacher
    vectors = draw(prng.split(prng.key(2), 20000), (1, 3)).double()
    forms = likelihood.quadratic_forms(linear_field, x, torch.tensor(0.0), vectors, chunk_size=None).values[:, 0]
    symmetric = (LINEAR + LINEAR.T) / 2
    variance = 2 * symmetric.square().sum() - (0 if gaussian else 2) * symmetric.diagonal().square().sum()
    assert forms.mean().item() == pytest.approx(LINEAR.trace().item(), abs=4 * math.sqrt(variance / 20000))
    assert forms.var().item() == pytest.approx(variance.item(), rel=0.05)


def test_rademacher_probes_are_signs_and_as_many_of_each():
    probes = likelihood.rademacher(prng.key(1), (10000,))
    assert set(probes.tolist()) == {-1.0, 1.0} and abs(probes.mean()) < 0.03 and probes.dtype == torch.float32


def hutchinson(x, key, field=bent_field, **options):
    options = {"method": ode.HEUN, "times": schedule.sigmas(6), "divergence": "hutchinson", "probes": 2, **options}
    return likelihood.estimate(field, x, key=key, **options)


@pytest.mark.parametrize("resample", [False, True])
def test_a_samples_estimate_depends_on_its_own_key_alone(resample):
    x, key = data((4, 3)), prng.key(5)
    batched = hutchinson(x, key, resample=resample)
    for i in range(4):
        alone = hutchinson(x[i : i + 1], prng.fold_in(key, torch.tensor([i])), resample=resample)
        torch.testing.assert_close(alone.volumes, batched.volumes[:, i : i + 1])
    more = hutchinson(x, key, resample=resample, probes=3)
    torch.testing.assert_close(more.volumes[:2], batched.volumes)
    assert not torch.allclose(batched.volumes[0], batched.volumes[1])
    assert not torch.allclose(hutchinson(x, prng.key(6), resample=resample).volumes, batched.volumes)


def test_fresh_probes_are_unbiased_and_average_out_over_the_steps():
    x, options = data((2, 3)), {"probes": 200, "times": torch.linspace(0, 1, 11), "field": linear_field}
    exact = likelihood.estimate(linear_field, x, method=ode.HEUN, times=options["times"])
    same, resampled = (hutchinson(x, prng.key(1), resample=resample, **options) for resample in (False, True))
    assert ((resampled.log_likelihood - exact.log_likelihood).abs() <= 3 * resampled.standard_error).all()
    assert (resampled.standard_error < 0.5 * same.standard_error).all()
    assert torch.equal(resampled.volumes, hutchinson(x, prng.key(1), resample=True, **options).volumes)


def test_fresh_probes_follow_a_grid_for_each_sample():
    x = data((2, 3))
    grids = torch.stack([schedule.sigmas(6, shift=shift) for shift in (1.0, 3.0)], 1)
    keys = prng.split(prng.key(1))
    batched = hutchinson(x, keys, resample=True, times=grids)
    for i in range(2):
        alone = hutchinson(x[i : i + 1], keys[i : i + 1], resample=True, times=grids[:, i])
        torch.testing.assert_close(alone.volumes, batched.volumes[:, i : i + 1])


def test_prompts_that_share_a_key_differ_more_surely_than_each_is_known():
    x, key = data((1, 3)).expand(2, 3), prng.key(4).expand(2, 2)

    def two_prompts(x, t):
        return bent_field(x, t) * torch.tensor([[1.0], [1.05]])

    actual = hutchinson(x, key, field=two_prompts, probes=50)
    behind, error = likelihood.advantage(actual.log_prior + actual.volumes)
    best = actual.log_likelihood.argmax()
    torch.testing.assert_close(behind, actual.log_likelihood[best] - actual.log_likelihood)
    assert behind[best] == 0 and error[best] == 0 and error[1 - best] < 0.3 * actual.standard_error.min()


def test_the_direction_of_the_grid_does_not_matter():
    x, grid = gaussian_data(), schedule.sigmas(9)
    both = [likelihood.log_likelihood(gaussian_field, x, method=ode.HEUN, times=t) for t in (grid, grid.flip(0))]
    assert torch.equal(*both)
    listed = likelihood.log_likelihood(gaussian_field, x, method=ode.HEUN, times=grid.tolist())
    torch.testing.assert_close(listed, both[0])


def test_data_at_a_later_time_have_the_density_of_that_time():
    x = gaussian_data(dtype=torch.float64)
    actual = likelihood.log_likelihood(gaussian_field, x, method=ode.RK4, times=torch.linspace(0.4, 1, 21).double())
    covariance = 0.36 * COVARIANCE + 0.16 * torch.eye(SIZE, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(0.6 * MEAN, covariance).log_prob(x)
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5)


@MODES
def test_the_gradient_of_the_likelihood_in_the_data_is_the_score(mode):
    x = gaussian_data(dtype=torch.float64)

    def total(x):
        return likelihood.log_likelihood(
            gaussian_field, x, method=ode.RK4, times=torch.linspace(0, 1, 21), mode=mode
        ).sum()

    score = -(x - MEAN) @ torch.linalg.inv(COVARIANCE)
    torch.testing.assert_close(grad(total)(x), score, rtol=1e-4, atol=1e-4)


def test_gradients_in_data_times_and_what_the_velocity_closes_over_agree_with_differences():
    grid = torch.tensor([0.1, 0.3, 0.7, 1.0], dtype=torch.float64)

    def result(x, inner, weight, divergence):
        times = torch.cat([grid[:1], inner, grid[-1:]])
        field = lambda x, t: torch.tanh(weight * x) * (1 + t) + x.roll(1, -1)  # noqa: E731
        options = {"method": ode.HEUN, "times": times, "divergence": divergence, "key": prng.key(0), "probes": 2}
        return likelihood.log_likelihood(field, x, **options)

    for divergence in ("exact", "hutchinson"):
        inputs = [data((2, 2), torch.float64), grid[1:-1], torch.tensor(0.8, dtype=torch.float64)]
        inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        assert torch.autograd.gradcheck(lambda *given, d=divergence: result(*given, d), inputs)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_vmap_over_samples_and_over_grids_equals_the_batch(divergence):
    x, keys = data((3, 4)), prng.split(prng.key(9), 3)
    options = {"method": ode.HEUN, "divergence": divergence, "probes": 3, "mode": "forward"}
    grid = schedule.sigmas(5)

    def one(x, key, grid):
        return likelihood.log_likelihood(bent_field, x[None], times=grid, key=key[None], **options)[0]

    batched = likelihood.log_likelihood(bent_field, x, times=grid, key=keys, **options)
    torch.testing.assert_close(vmap(one, in_dims=(0, 0, None))(x, keys, grid), batched)
    grids = torch.stack([grid, schedule.sigmas(5, shift=1.0)])
    both = vmap(one, in_dims=(None, None, 0))(x[0], keys[0], grids)
    torch.testing.assert_close(both[0], batched[0])


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_a_likelihood_compiles_to_one_graph_with_its_gradient(divergence):
    x, weight, grid, key = data((4, 3)), data((3, 3), seed=1), schedule.sigmas(1), prng.key(0)

    def objective(x, weight, grid, key):
        field = lambda x, t: torch.tanh(x @ weight) * (1 + t)  # noqa: E731
        options = {"method": ode.EULER, "divergence": divergence, "probes": 2, "mode": "forward", "resample": True}
        return likelihood.log_likelihood(field, x, times=grid, key=key, **options).sum()

    torch._dynamo.reset()
    gradient = torch.func.grad_and_value(objective, argnums=(0, 1, 2))
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight, grid, key), gradient(x, weight, grid, key))


def test_the_state_is_float32_whatever_the_dtype_of_the_velocity_and_no_input_is_changed():
    x = data((2, 3)).bfloat16()
    before = x.clone()
    actual = hutchinson(x, prng.key(0), field=lambda x, t: bent_field(x, t).bfloat16())
    assert all(part.dtype == torch.float32 for part in actual) and torch.equal(x, before)


CONFIG = models.transformer_config(depth=2, position_size=4, sample_size=4, qk_norm=True)


@pytest.fixture(scope="module")
def network():
    """A small random MMDiT as a velocity of images (2, 2, 4, 4), of either implementation of attention."""

    def leaf(path, param):
        if not param.trainable:
            return param.init(prng.key(0), param.shape)
        key = prng.key(int.from_bytes(path.encode()[-7:], "big"))
        return prng.normal(key, param.shape) * 0.3 + (1.0 if "_norm" in path else 0.0)

    params = specs.map_params(leaf, mmdit.spec(CONFIG))
    context, pooled = data((2, 3, 6), seed=1), data((2, 5), seed=2)

    def of(implementation):
        return lambda x, t: mmdit.apply(params, CONFIG, x, t, context, pooled, implementation=implementation)

    return of


def test_exact_and_estimated_divergence_of_a_transformer_agree_in_both_modes(network):
    x, t = data((2, 2, 4, 4), seed=3), torch.tensor(0.4)
    exact = likelihood.divergence(network("math"), x, t, mode="forward")
    for mode in ("forward", "reverse", None):
        fused = likelihood.divergence(network("sdpa"), x, t, mode=mode)
        torch.testing.assert_close(fused, exact, rtol=1e-4, atol=1e-4)
    vectors = likelihood.probe_vectors(prng.sample_keys(prng.key(1), len(x)), 300, x)
    forms = likelihood.quadratic_forms(network("math"), x, t, vectors, chunk_size=100)
    error = forms.values.std(0) / math.sqrt(300)
    assert ((forms.values.mean(0) - exact).abs() <= 3 * error).all() and (error < exact.abs().max()).all()
    torch.testing.assert_close(forms.velocity, network("math")(x, t))


def test_the_likelihood_under_a_transformer_is_the_same_by_both_divergences(network):
    x, options = data((2, 2, 4, 4), seed=3), {"method": ode.HEUN, "times": torch.linspace(0, 1, 4)}
    exact = likelihood.log_likelihood(network("math"), x, **options)
    options |= {"divergence": "hutchinson", "key": prng.key(2), "probes": 200, "chunk_size": 100}
    actual = likelihood.estimate(network("math"), x, **options)
    assert ((actual.log_likelihood - exact).abs() <= 3 * actual.standard_error).all()


def test_losses_share_noise_and_times_and_their_mean_is_the_training_loss():
    x = data((2, 3))
    actual = likelihood.losses(gaussian_free, x, prng.key(3), draws=800)
    # v = 0: E |noise - x0|^2 / D = 1 + |x0|^2 / D.
    error = actual.std(0) / math.sqrt(800)
    assert ((actual.mean(0) - 1 - x.square().mean(1)).abs() < 3 * error).all()
    same = likelihood.losses(gaussian_free, x[:1].expand(2, 3), prng.key(3).expand(2, 2), draws=5)
    assert torch.equal(same[:, 0], same[:, 1])
    recorded = []
    likelihood.losses(lambda x, t: recorded.append(t) or 0 * x, x, prng.key(3), draws=10)
    assert all(((t * 10).floor() == k).all() for k, t in enumerate(recorded)) and (recorded[0][0] != recorded[0][1])


def gaussian_free(x, t):
    return 0 * x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "guess"}, "divergence 'guess' must be exact or hutchinson"),
        ({"divergence": "hutchinson"}, "give key="),
        ({"divergence": "hutchinson", "key": prng.key(0), "probes": 0}, "probes 0 must be at least 1"),
        (
            {"divergence": "hutchinson", "key": prng.split(prng.key(0), 2)},
            "2 keys for 3 samples; give one key, or one for each",
        ),
        ({"times": [0.0, 0.9]}, "times end at 0.9"),
        ({"times": [0.0, 0.9, 0.8, 1.0]}, "not monotone"),
        ({"mode": "sideways"}, "mode 'sideways' must be one of forward, reverse"),
    ],
)
def test_what_makes_no_likelihood_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        likelihood.log_likelihood(bent_field, data(), **{"method": ode.EULER, "times": [0.0, 1.0], **options})


def test_a_velocity_that_is_not_finite_is_named_with_its_step():
    field = lambda x, t: torch.where(t > 0.5, torch.nan, x)  # noqa: E731
    with pytest.raises(ode.NonFiniteError, match="step 3 of 4"):
        likelihood.log_likelihood(field, data(), method=ode.EULER, times=torch.linspace(0, 1, 5) ** 0.5, check=True)


def test_one_probe_has_no_standard_error():
    assert hutchinson(data(), prng.key(0), probes=1).standard_error.isnan().all()
