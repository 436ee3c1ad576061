"""MeanFlow and shortcut objectives: fixed points on a Gaussian flow, their formulas, stop gradients, memory, errors."""

import dataclasses

import pytest
import torch

from functional_sd3.core import prng, transform, tree
from functional_sd3.flow import path
from functional_sd3.training import learner, objectives
from functional_sd3.training.objectives import meanflow, points
from functional_sd3.weights.model import Model, Tokenizers

MEAN, STD = 0.7, 0.4
KEYS = prng.split(prng.key(5), 8)
LATENTS = MEAN + STD * prng.normal(prng.key(6), (8, 3)).double()
ONES = {"scale": torch.ones((), dtype=torch.float64), "shift": torch.zeros(3, dtype=torch.float64)}


def wide(t):
    return t[:, None]


def exact(params, rows):
    """The mean velocity of the flow from N(MEAN, STD^2), times params' scale, plus their shift."""

    def u(x, t, r):
        t, r = wide(t), wide(r)
        high, low = ((((1 - time) * STD) ** 2 + time**2).sqrt() for time in (t, r))
        slope = ((t + r) - STD**2 * (2 - t - r)) / (high * (high + low))
        return params["scale"] * (slope * (x - (1 - t) * MEAN) - MEAN) + params["shift"]

    return u


def exact_velocity(rows):
    return lambda x, t: exact(ONES, rows)(x, t, t)


def perceptron(params, rows):
    """Any u(x, t, r) that reads "context" (batch, 2)."""

    def u(x, t, r):
        inputs = torch.cat([x, wide(t), wide(t - r), rows["context"]], 1)
        return torch.tanh(inputs @ params["in"]) @ params["out"]

    return u


PERCEPTRON = {"in": prng.normal(prng.key(1), (7, 6)).double(), "out": prng.normal(prng.key(2), (6, 3)).double()}
CONTEXT = prng.normal(prng.key(3), (8, 2)).double()
BATCH = {"latents": LATENTS, "context": CONTEXT}
EMPTY = {"context": torch.full((1, 2), 0.3, dtype=torch.float64)}


def draws(equal=0.75, shift=1.0, dropped=0.0):
    """(x, t, r, v of the data, True where the prompt is dropped) of KEYS."""
    times, noises, drops = prng.split(KEYS, 3).unbind(-2)
    rows = meanflow.unequal_rows(8, equal, KEYS.device)
    t, r = (time.double() for time in meanflow.draw_interval(times, meanflow.logit_normal, shift, rows))
    noise = prng.normal(noises, (3,)).double()
    return path.interpolate(LATENTS, noise, t), t, r, noise - LATENTS, prng.bernoulli(drops, dropped, ())


@pytest.mark.parametrize(
    "options",
    [{}, {"along": "predicted"}, {"head": lambda params, rows: exact_velocity(rows)}, {"shift": 3.0, "equal": 0.0}],
    ids=["target", "predicted", "head", "shifted"],
)
def test_the_mean_velocity_of_a_gaussian_flow_is_a_fixed_point(options):
    loss = objectives.meanflow_loss(exact, teacher=exact_velocity, **{"equal": 0.5, **options})
    gradient, (value, metrics) = transform.value_and_grad(loss, has_aux=True)(ONES, {"latents": LATENTS}, KEYS)
    assert value < 1e-20 and metrics["error"] < 1e-22 and metrics["tangent"] > 0.1
    assert all(leaf.abs().max() < 1e-10 for leaf in tree.leaves(gradient))
    other = {**ONES, "scale": torch.tensor(1.1, dtype=torch.float64)}
    assert loss(other, {"latents": LATENTS}, KEYS)[1]["error"] > 1e-3


def test_the_target_is_that_of_finite_differences_and_only_the_plain_evaluation_has_a_gradient():
    loss = objectives.meanflow_loss(perceptron, equal=0.25, power=0.5, offset=0.1)
    gradient, (value, metrics) = transform.value_and_grad(loss, has_aux=True)(PERCEPTRON, BATCH, KEYS)
    x, t, r, v, _ = draws(equal=0.25)
    assert (t > r).sum() == 6 and (t == r).sum() == 2
    h = 1e-5
    u = perceptron(PERCEPTRON, BATCH)
    slope = (u(x + h * v, t + h, r) - u(x - h * v, t - h, r)) / (2 * h)
    target = v - wide(t - r) * slope
    learned = tree.map(lambda leaf: leaf.clone().requires_grad_(), PERCEPTRON)
    error = (perceptron(learned, BATCH)(x, t, r) - target).square().mean(1)
    wanted = (error / (error.detach() + 0.1) ** 0.5).mean()
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(metrics["error"], error.mean().detach(), rtol=1e-7, atol=0)
    tangent = (wide(t - r) * slope)[t > r].square().mean().sqrt()
    torch.testing.assert_close(metrics["tangent"], tangent, rtol=1e-7, atol=0)
    for name, ours in zip(PERCEPTRON, torch.autograd.grad(wanted, list(learned.values())), strict=True):
        torch.testing.assert_close(gradient[name], ours, rtol=1e-6, atol=1e-9)


def test_improved_meanflow_is_the_error_of_a_velocity_along_the_predicted_one():
    loss = objectives.meanflow_loss(perceptron, equal=0.5, power=0.0, along="predicted")
    value, _ = loss(PERCEPTRON, BATCH, KEYS)
    x, t, r, v, _ = draws(equal=0.5)
    u = perceptron(PERCEPTRON, BATCH)
    own = u(x, t, t)
    _, slope = torch.func.jvp(lambda x, t: u(x, t, r), (x, t), (own, torch.ones_like(t)))
    compound = u(x, t, r) + wide(t - r) * slope
    torch.testing.assert_close(value, (compound - v).square().mean(), rtol=1e-12, atol=0)
    head = lambda params, rows: lambda x, t: perceptron(params, rows)(x, t, 0 * t)  # noqa: E731
    separate, _ = objectives.meanflow_loss(perceptron, equal=0.5, power=0.0, head=head)(PERCEPTRON, BATCH, KEYS)
    own = u(x, t, 0 * t)
    _, slope = torch.func.jvp(lambda x, t: u(x, t, r), (x, t), (own, torch.ones_like(t)))
    wanted = (u(x, t, r) + wide(t - r) * slope - v).square().mean() + (own - v).square().mean()
    torch.testing.assert_close(separate, wanted, rtol=1e-12, atol=0)


def test_where_r_is_t_it_is_flow_matching():
    loss = objectives.meanflow_loss(perceptron, equal=1.0, power=0.0)
    gradient, (value, metrics) = transform.value_and_grad(loss, has_aux=True)(PERCEPTRON, BATCH, KEYS)
    x, t, _, v, _ = draws(equal=1.0)
    learned = tree.map(lambda leaf: leaf.clone().requires_grad_(), PERCEPTRON)
    wanted = (perceptron(learned, BATCH)(x, t, t) - v).square().mean()
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-12, atol=0)
    assert metrics["tangent"] == 0
    for name, ours in zip(PERCEPTRON, torch.autograd.grad(wanted, list(learned.values())), strict=True):
        torch.testing.assert_close(gradient[name], ours, rtol=1e-10, atol=1e-12)


def test_guidance_by_the_network_itself_is_that_of_the_paper():
    options = {"omega": 0.4, "kappa": 0.5, "guided": (0.2, 0.8), "dropout": 0.4, "empty": EMPTY}
    value, _ = objectives.meanflow_loss(perceptron, equal=1.0, power=0.0, **options)(PERCEPTRON, BATCH, KEYS)
    x, t, _, v, is_free = draws(equal=1.0, dropped=0.4)
    outside = ~((t >= 0.2) & (t <= 0.8))
    assert 0 < is_free.sum() < 8 and not (is_free | outside).all()
    context = torch.where(is_free[:, None], EMPTY["context"], CONTEXT)
    u = lambda context: perceptron(PERCEPTRON, {"context": context})(x, t, t)  # noqa: E731
    guided = 0.4 * v + 0.5 * u(context) + 0.1 * u(EMPTY["context"].expand(8, 2))
    target = torch.where((is_free | outside)[:, None], v, guided)
    torch.testing.assert_close(value, (u(context) - target).square().mean(), rtol=1e-12, atol=0)


def test_a_tangent_of_zero_leaves_the_velocity_as_the_target():
    x, t, r, v, _ = draws()
    loss = objectives.meanflow_loss(perceptron, power=0.0)
    value, metrics = loss(PERCEPTRON, {**BATCH, "tangent": torch.zeros(8)}, KEYS)
    wanted = (perceptron(PERCEPTRON, BATCH)(x, t, r) - v).square().mean()
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    assert metrics["tangent"] == 0 and torch.equal(
        loss(PERCEPTRON, {**BATCH, "tangent": torch.ones(8)}, KEYS)[0], loss(PERCEPTRON, BATCH, KEYS)[0]
    )


LOSSES = {
    "meanflow": objectives.meanflow_loss(perceptron, equal=0.0, omega=1.3, empty=EMPTY, kappa=0.2),
    "improved": objectives.meanflow_loss(perceptron, equal=0.0, along="predicted"),
    "shortcut": objectives.shortcut_loss(perceptron, equal=0.0, finest=8),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_objectives_work_under_torch_func_and_the_compiler(loss):
    plain, (value, _) = transform.value_and_grad(loss, has_aux=True)(PERCEPTRON, BATCH, KEYS)
    traced, _ = torch.func.grad(loss, has_aux=True)(PERCEPTRON, BATCH, KEYS)
    one = lambda params, batch, key: loss(params, tree.map(lambda leaf: leaf[None], batch), key[None])[0]  # noqa: E731
    each = transform.per_sample_grads(one)(PERCEPTRON, BATCH, KEYS)
    step = transform.compile(torch.func.grad_and_value(loss, has_aux=True), backend="aot_eager")
    compiled, (compiled_value, _) = step(PERCEPTRON, BATCH, KEYS)
    torch.testing.assert_close(compiled_value, value)
    for name, gradient in plain.items():
        torch.testing.assert_close(traced[name], gradient)
        torch.testing.assert_close(each[name].mean(0), gradient)
        torch.testing.assert_close(compiled[name], gradient)


def test_shares_of_a_batch_have_intervals_of_their_own():
    for equal, count in ((0.0, 8), (0.25, 6), (0.5, 4), (0.75, 2), (0.875, 1), (1.0, 0)):
        rows = meanflow.unequal_rows(8, equal, KEYS.device)
        assert len(rows) == count
        if equal == 0.5:
            # Parts of a batch (`accumulate`) choose the rows that the whole does.
            assert rows.tolist() == [*rows[:2].tolist(), *(4 + meanflow.unequal_rows(4, equal, KEYS.device)).tolist()]
    keys = prng.split(prng.key(0), 2000)
    t, r = meanflow.draw_interval(keys, meanflow.logit_normal, 1.0, torch.arange(1000))
    assert (t[:1000] > r[:1000]).all() and torch.equal(t[1000:], r[1000:])
    # The larger of two draws of sigmoid(N(-0.4, 1)): 2 F(x) = sqrt(2) at its median.
    median = torch.sigmoid(-0.4 + torch.special.ndtri(torch.tensor(0.5).sqrt()))
    assert abs(t.median() - median) < 0.02


def test_the_mean_velocity_of_a_gaussian_flow_is_a_fixed_point_of_shortcuts():
    loss = objectives.shortcut_loss(exact, teacher=exact_velocity, equal=0.25, finest=2, clip=None)
    _, metrics = loss(ONES, {"latents": LATENTS}, KEYS)
    # Of the finest halves the velocity at their start is taken, which is not their mean.
    assert metrics["bootstrap"] > 1e-6
    keys = prng.split(prng.key(9), 64)
    latents = MEAN + STD * prng.normal(prng.key(10), (64, 3)).double()
    loss = objectives.shortcut_loss(exact, teacher=exact_velocity, equal=0.25, finest=2**20, shift=3.0, clip=None)
    _, metrics = loss(ONES, {"latents": latents}, keys)
    assert metrics["error"] < 1e-4


def test_a_shortcut_learns_two_steps_of_half_its_length():
    value, metrics = objectives.shortcut_loss(perceptron, equal=0.5, finest=4, clip=0.8)(PERCEPTRON, BATCH, KEYS)
    times, powers, places, noises = prng.split(KEYS, 4).unbind(-2)
    d = 0.5 ** prng.randint(powers, (), 0, 2).double()
    assert set(d.tolist()) == {1.0, 0.5}
    high = 1 - d * (prng.uniform(places, ()).double() / d).floor()
    is_equal = torch.arange(8) % 2 == 1
    t = torch.where(is_equal, prng.uniform(times, ()).double(), high)
    noise = prng.normal(noises, (3,)).double()
    x, u = path.interpolate(LATENTS, noise, t), perceptron(PERCEPTRON, BATCH)
    half = torch.where(d == 0.5, 0.0, d / 2)
    first = u(x, t, t - half)
    second = u(x - wide(d / 2) * first, t - d / 2, t - d / 2 - half)
    target = torch.where(wide(is_equal), noise - LATENTS, ((first + second) / 2).clamp(-0.8, 0.8))
    errors = (u(x, t, torch.where(is_equal, t, t - d)) - target).square().mean(1)
    torch.testing.assert_close(value, errors.mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(metrics["bootstrap"], errors[~is_equal].mean(), rtol=1e-9, atol=0)


def test_a_shortcut_takes_its_steps_by_the_average_of_the_parameters_where_it_is_given():
    loss = objectives.shortcut_loss(perceptron, equal=0.5, finest=8)
    other = tree.map(lambda leaf: 0.5 * leaf + 0.1, PERCEPTRON)
    gradient, (_, metrics) = grads({**PERCEPTRON, "average": other}, BATCH, KEYS, loss)
    assert all(not leaf.any() for leaf in tree.leaves(gradient.pop("average")))
    own, (_, same) = grads({**PERCEPTRON, "average": PERCEPTRON}, BATCH, KEYS, loss)
    plain, (_, without) = grads(PERCEPTRON, BATCH, KEYS, loss)
    own.pop("average")
    assert tree.allclose(own, plain, rtol=0, atol=0) and torch.equal(same["error"], without["error"])
    assert not tree.allclose(gradient, plain) and metrics["error"] != without["error"]


def grads(params, batch, keys, loss):
    return torch.func.grad_and_value(loss, has_aux=True)(params, batch, keys)


@pytest.fixture(scope="module")
def student(tiny):
    """`tiny` with an embedder of t - r whose output is not zero, and a batch."""
    sizes = dataclasses.replace(tiny.config.transformer, interval_size=8)
    config = dataclasses.replace(tiny.config, transformer=sizes)
    params = learner.extended(prng.key(0), Model(tiny.params, tiny.config, Tokenizers()), config).params["transformer"]
    params = tree.map(lambda leaf: leaf + 0.02, params)
    keys = prng.split(prng.key(8), 3)
    shapes = {"latents": (4, 16, 4, 4), "context": (4, 3, 32), "pooled": (4, 32)}
    batch = {name: prng.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return config, {"transformer": params}, batch


def saved_bytes(loss, params, *inputs):
    """Bytes that the graph of a loss keeps, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    learned = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(learned, *inputs)
    return sum(nbytes for _, nbytes in storages.values())


def test_a_step_keeps_no_more_than_one_of_plain_training(student):
    config, params, batch = student
    teacher = lambda rows: points.model_velocity(config)(params, rows)  # noqa: E731
    plain = saved_bytes(objectives.flow_loss(config), params, batch, KEYS[:4])
    for options in ({"teacher": teacher}, {"along": "predicted"}):
        own = saved_bytes(objectives.meanflow_loss(config, equal=0.0, **options), params, batch, KEYS[:4])
        assert own < 1.05 * plain


def test_the_networks_derivative_has_the_smoothed_embedding_of_t(student):
    config, params, batch = student
    text = {name: batch[name] for name in ("context", "pooled")}
    x, direction = batch["latents"], batch["latents"].flip(0)
    t, r = torch.tensor([0.3, 0.5, 0.9, 0.7]), torch.tensor([0.1, 0.2, 0.3, 0.7])
    smooth, raw = (meanflow.model_mean_velocity(config, time_difference=h) for h in (0.01, None))
    double = tree.cast(params, torch.float64)
    rows, x, t, r, direction = tree.cast((text, x, t, r, direction), torch.float64)
    slope = meanflow.derivative(raw(double, rows), x, t, r, direction)
    u, h = raw(double, rows), 1e-7
    central = (u(x + h * direction, t + h, r) - u(x - h * direction, t - h, r)) / (2 * h)
    torch.testing.assert_close(slope, central, rtol=1e-4, atol=1e-4)
    smoothed = meanflow.derivative(smooth(double, rows), x, t, r, direction)
    assert (smoothed - slope).abs().max() > 1e-4
    assert torch.equal(smooth(double, rows)(x, t, r), u(x, t, r))
    assert (u(x, t, r) - u(x, t, t)).abs().max() > 1e-4 and (u(x, r, r) - u(x, t, t)).abs().max() > 1e-4


def test_the_loss_takes_the_smoothed_derivative(student):
    config, params, batch = student
    tangents = [
        objectives.meanflow_loss(config, equal=0.0, time_difference=h)(params, batch, KEYS[:4])[1]["tangent"]
        for h in (0.01, 0.02, None)
    ]
    default = objectives.meanflow_loss(config, equal=0.0)(params, batch, KEYS[:4])[1]["tangent"]
    assert default == tangents[0] and all(abs(default - other) > 1e-4 * default for other in tangents[1:])


def test_the_derivative_has_the_dtype_of_the_parameters(student):
    config, params, batch = student
    loss = objectives.meanflow_loss(config, equal=0.0, dtype=torch.bfloat16)
    gradient, (value, metrics) = transform.value_and_grad(loss, has_aux=True)(params, batch, KEYS[:4])
    whole = objectives.meanflow_loss(config, equal=0.0)(params, batch, KEYS[:4])[1]
    assert torch.equal(metrics["tangent"], whole["tangent"]) and metrics["error"] != whole["error"]
    assert {leaf.dtype for leaf in tree.leaves(gradient)} == {torch.float32}


def test_options_that_contradict_one_another_are_errors(tiny):
    for make in (objectives.meanflow_loss, objectives.shortcut_loss):
        with pytest.raises(ValueError, match="trains a mean velocity .* config has no interval_size"):
            make(tiny.config)
    for options, said in (
        ({"equal": 1.5}, "equal 1.5"),
        ({"along": "data"}, "along 'data' must be"),
        ({"along": "predicted", "head": perceptron}, "leave out along"),
        ({"teacher": exact_velocity, "kappa": 0.5}, "a teacher is guided already"),
        ({"omega": 2.0}, "need `empty`"),
        ({"dropout": 0.1}, "need `empty`"),
        ({"omega": 0.0, "kappa": 1.0}, "kappa 1.0 must be below 1"),
    ):
        with pytest.raises(ValueError, match=said):
            objectives.meanflow_loss(perceptron, **options)
    with pytest.raises(ValueError, match="finest 100 must be a power of 2"):
        objectives.shortcut_loss(perceptron, finest=100)
    with pytest.raises(ValueError, match="keys .* must be"):
        objectives.meanflow_loss(perceptron)(PERCEPTRON, BATCH, KEYS[:3])
    with pytest.raises(ValueError, match="meanflow_loss lacks latents"):
        objectives.meanflow_loss(perceptron)(PERCEPTRON, {"context": CONTEXT}, KEYS)
