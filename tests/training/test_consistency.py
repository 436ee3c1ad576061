"""Consistency objectives (sCM, rCM): the tangent against differences and closed forms, fixed points, what is kept."""

import pytest
import torch

from functional_sd3.core import prng, transform, tree
from functional_sd3.flow import ode, path, schedule, trigflow
from functional_sd3.training import objectives
from functional_sd3.training.objectives import points, rcm, scm
from functional_sd3.transformer import mmdit
from tests.flow.ode.flows import MEAN, STD, gaussian_field, noise

KEYS = prng.split(prng.key(3), 4)
TIMES = schedule.even(3).double()


@pytest.fixture(scope="module")
def double(tiny):
    """A teacher in float64, another model as the student, and a third as the fake score."""
    teacher = tree.cast({"transformer": tiny.params["transformer"]}, torch.float64)
    moved = lambda scale: tree.map(lambda leaf: leaf + scale * torch.cos(leaf), teacher["transformer"])  # noqa: E731
    return teacher, {"transformer": moved(0.01), "fake": moved(-0.01)}


@pytest.fixture(scope="module")
def batch(tiny):
    keys = prng.split(prng.key(8), 3)
    shapes = {"latents": (4, 16, 4, 4), "context": (4, 3, 32), "pooled": (4, 32)}
    return {name: prng.normal(key, shape).double() for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


@pytest.fixture(scope="module")
def teacher(tiny, double):
    velocity_of = points.model_velocity(tiny.config)
    return lambda batch: velocity_of(double[0], batch)


def gaussian_consistency_velocity(x, t):
    """The rectified velocity whose line ends where the Gaussian flow does."""
    t = path.broadcast(t, x)
    end = MEAN + STD * (x - (1 - t) * MEAN) / torch.sqrt((1 - t) ** 2 * STD**2 + t**2)
    return (x - end) / t


@pytest.mark.parametrize("share", [scm.scm_share, rcm.share])
def test_the_tangent_is_the_derivative_of_the_consistency_function_along_the_teachers_flow(share):
    student = lambda x, t: torch.sin(2 * x) * path.broadcast(t, x) + 0.3 * x.roll(1, -1)  # noqa: E731
    y, a, one = noise((6, 4)), torch.linspace(0.1, 1.5, 6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    found = scm.tangent(student, gaussian_field, y, a, one, share)
    F, teacher = trigflow.from_flow(student), trigflow.from_flow(gaussian_field)
    f = lambda y, a: trigflow.consistency(y, F(y, a), a)  # noqa: E731
    h = 1e-5
    # Along the teacher's arc: the ends of two short steps of Heun's kind.
    ends = []
    for side in (h, -h):
        half = y + side / 2 * teacher(y, a)
        ends.append(f(y + side * teacher(half, a + side / 2), a + side))
    expected = a.cos()[:, None] * (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close(found.tangent, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.teacher, teacher(y, a))


def test_before_the_warmup_the_tangent_is_the_distance_to_the_teacher():
    student = lambda x, t: torch.sin(x)  # noqa: E731
    y, a, zero = noise((6, 4)), torch.linspace(0.1, 1.5, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    distance = trigflow.from_flow(student)(y, a) - trigflow.from_flow(gaussian_field)(y, a)
    cos = a.cos()[:, None]
    ours = scm.tangent(student, gaussian_field, y, a, zero, scm.scm_share).tangent
    torch.testing.assert_close(ours, -(cos**2) * distance)
    torch.testing.assert_close(
        scm.tangent(student, gaussian_field, y, a, zero, rcm.share).tangent, -cos * distance, rtol=1e-12, atol=1e-14
    )


def test_the_gradient_vanishes_at_the_consistency_function_of_a_gaussian_flow_and_points_to_it_elsewhere():
    y, a, one = noise((64, 4)), torch.linspace(0.05, 1.5, 64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    target = trigflow.from_flow(gaussian_consistency_velocity)

    def gradient(theta):
        student = trigflow.to_flow(lambda y, a: target(y, a) + theta.detach() * torch.sin(path.broadcast(a, y)))
        direction = scm.tangent(student, gaussian_field, y, a, one, scm.scm_share)
        run = lambda theta: scm.regression(target(y, a) + theta * torch.sin(a)[:, None], direction, 0.1)[0].mean()  # noqa: E731
        return torch.func.grad(run)(theta), direction.tangent

    zero = torch.zeros((), dtype=torch.float64)
    slope, value = gradient(zero)
    assert abs(slope) < 1e-10 and value.abs().max() < 1e-10
    # Descent goes back towards 0 from either side.
    assert gradient(zero + 0.1)[0] > 0.01 and gradient(zero - 0.1)[0] < -0.01


def test_consistency_sampling_of_a_gaussian_flow_has_its_distribution_in_any_number_of_steps():
    x = noise((20000, 2))
    for steps in (1, 2, 4):
        drawn = ode.integrate(
            ode.renoised(prng.key(1)), gaussian_consistency_velocity, x, schedule.even(steps).double()
        )
        assert drawn.mean() == pytest.approx(MEAN, abs=0.01) and drawn.std() == pytest.approx(STD, abs=0.01)


def test_the_loss_and_its_gradient_are_those_of_the_formula(tiny, double, batch, teacher):
    rho = torch.tensor([1.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    h = 0.02
    loss = objectives.scm_loss(tiny.config, teacher, weight=torch.cos, offset=0.3, time_difference=h)
    student = {"transformer": double[1]["transformer"]}
    grads = transform.value_and_grad(loss, has_aux=True)
    gradient, (value, metrics) = grads(student, {**batch, "tangent": rho}, KEYS)

    time_key, noise_key = prng.split(KEYS).unbind(-2)
    t = scm.NOISY(time_key, ()).double()
    e = prng.normal(noise_key, (16, 4, 4)).double()
    wide = lambda t: t[:, None, None, None]  # noqa: E731
    a = torch.atan(t / (1 - t))
    y = wide(a.cos()) * batch["latents"] + wide(a.sin()) * e

    def F(params, y, a, **options):
        t, n = a.sin() / (a.sin() + a.cos()), 1 / (a.sin() + a.cos())
        x = wide(n) * y
        given = batch["context"], batch["pooled"]
        v = mmdit.apply(params["transformer"], tiny.config.transformer, x, t, *given, **options)
        return (wide(1 - 2 * t) * x + wide(1 - 2 * t + 2 * t**2) * v) / wide(n)

    teaching = F(double[0], y, a)
    factor = wide(a.cos() * a.sin())
    run = lambda y, a: F(student, y, a, time_difference=h)  # noqa: E731
    _, slope = torch.func.jvp(run, (y, a), (factor * teaching, factor.flatten()))
    own = F(student, y, a)
    g = -(wide(a.cos()) ** 2) * (own - teaching) - wide(rho) * (factor * y + slope)
    size = g.square().mean((1, 2, 3)).sqrt()
    g = g / wide(size + 0.3)
    learned = tree.map(lambda leaf: leaf.detach().requires_grad_(), student)
    wanted = (a.cos() * (F(learned, y, a) - own - g).square().mean((1, 2, 3))).mean()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert metrics["tangent"].item() == pytest.approx(size.mean().item(), rel=1e-9)
    assert metrics["teacher_distance"].item() == pytest.approx((own - teaching).square().mean().item(), rel=1e-8)
    leaves = tree.leaves(learned)
    for ours, theirs in zip(
        tree.leaves(gradient), torch.autograd.grad(wanted, leaves, materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_the_smoothed_derivative_of_time_is_the_one_that_is_used(tiny, double, batch, teacher):
    student = {"transformer": double[1]["transformer"]}
    sizes = []
    for h in (None, 1e-7, 0.05):
        loss = objectives.scm_loss(tiny.config, teacher, time_difference=h)
        sizes.append(loss(student, batch, KEYS)[1]["tangent"].item())
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-4) and abs(sizes[2] / sizes[0] - 1) > 1e-2


def test_the_learned_log_variance_weighs_the_losses_and_is_learned(tiny, double, batch, teacher):
    student = {"transformer": double[1]["transformer"]}
    weight = torch.linspace(0.4, -0.3, 3, dtype=torch.float64)
    loss = objectives.scm_loss(tiny.config, teacher)
    one_by_one = [
        loss(student, tree.map(lambda leaf, i=i: leaf[i : i + 1], batch), KEYS[i : i + 1])[0] for i in range(4)
    ]
    t = scm.NOISY(prng.split(KEYS)[:, 0], ()).double()
    a = trigflow.angle(t)
    level = 0.4 + 0.05 * torch.cos(2 * a) - 0.3 * torch.cos(4 * a)
    wanted = (torch.exp(-level) / a.tan() * torch.stack(one_by_one) + level).mean()
    grads = transform.value_and_grad(loss, has_aux=True)
    gradient, (value, _) = grads({**student, "log_variance": {"weight": weight}}, batch, KEYS)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-9)
    expected = (1 - torch.exp(-level) / a.tan() * torch.stack(one_by_one))[:, None] * torch.cos(
        a[:, None] * torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    )
    torch.testing.assert_close(gradient["log_variance"]["weight"], expected.mean(0), rtol=1e-8, atol=1e-10)
    assert [param.shape for param in scm.log_variance_spec(3).values()] == [(3,)]


@pytest.mark.parametrize("objective", ["scm", "rcm"])
def test_a_sample_whose_tangent_is_not_a_number_has_no_gradient_and_is_counted(tiny, double, batch, teacher, objective):
    def broken(batch):
        velocity = teacher(batch)
        is_broken = torch.tensor([False, True, False, False])[:, None, None, None]
        return lambda x, t: torch.where(is_broken, torch.nan, velocity(x, t))

    if objective == "scm":
        make = lambda teacher: objectives.scm_loss(tiny.config, teacher)  # noqa: E731
    else:
        make = lambda teacher: objectives.rcm_loss(tiny.config, teacher, TIMES, matching=0.0)  # noqa: E731
    gradient, (value, metrics) = transform.value_and_grad(make(broken), has_aux=True)(double[1], batch, KEYS)
    others = torch.tensor([0, 2, 3])
    rest = tree.map(lambda leaf: leaf[others], batch)
    whole = {name: rest[name] for name in batch}
    expected, (other, others_metrics) = transform.value_and_grad(make(lambda rows: teacher(whole)), has_aux=True)(
        double[1], rest, KEYS[others]
    )
    assert metrics["dropped"].item() == 0.25 and others_metrics["dropped"].item() == 0
    assert value.item() == pytest.approx(0.75 * other.item(), rel=1e-9)
    for name in ("tangent", "teacher_distance"):
        assert metrics[name].item() == pytest.approx(others_metrics[name].item(), rel=1e-9)
    for ours, theirs in zip(tree.leaves(gradient), tree.leaves(expected), strict=True):
        torch.testing.assert_close(ours, 0.75 * theirs, rtol=1e-7, atol=1e-11)


def test_the_tangent_keeps_no_graph(tiny, double, batch, teacher):
    """What a step saves for its backward pass is what plain flow matching saves, up to its own few products."""

    def saved(loss, **more):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        learned = tree.map(lambda leaf: leaf.detach().requires_grad_(), {"transformer": double[1]["transformer"]})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(learned, {**batch, **more}, KEYS)[0].backward()
        return count

    plain = saved(objectives.flow_loss(tiny.config))
    assert saved(objectives.scm_loss(tiny.config, teacher)) < 1.02 * plain


def losses(tiny, teacher):
    return {
        "scm": objectives.scm_loss(tiny.config, teacher),
        "rcm": objectives.rcm_loss(tiny.config, teacher, TIMES),
        "fake": objectives.fake_score_loss(tiny.config, TIMES),
    }


@pytest.mark.parametrize("name", ["scm", "rcm", "fake"])
def test_gradients_by_torch_func_and_of_each_sample_are_those_of_autograd(tiny, double, batch, teacher, name):
    loss = losses(tiny, teacher)[name]
    whole = transform.value_and_grad(loss, has_aux=True)(double[1], batch, KEYS)[0]
    by_func = torch.func.grad(loss, has_aux=True)(double[1], batch, KEYS)[0]

    def sample(params, rows, key):
        return loss(params, tree.map(lambda leaf: leaf[None], rows), key[None])[0]

    each = transform.per_sample_grads(sample)(double[1], batch, KEYS)
    for a, b, c in zip(tree.leaves(whole), tree.leaves(by_func), tree.leaves(each), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(c.mean(0), a, rtol=1e-7, atol=1e-10)


def test_distribution_matching_is_the_formula(tiny, double, batch, teacher):
    """With the consistency part taken away: the gradient of the student alone, along the difference of two scores."""
    both, one = (objectives.rcm_loss(tiny.config, teacher, TIMES, matching=weight) for weight in (0.7, 0.0))
    gradients = [transform.value_and_grad(loss, has_aux=True)(double[1], batch, KEYS) for loss in (both, one)]
    metrics = gradients[0][1][1]
    given = batch["context"], batch["pooled"]
    wide = lambda t: t[:, None, None, None]  # noqa: E731
    v = lambda params, x, t: mmdit.apply(params, tiny.config.transformer, x, t, *given)  # noqa: E731
    _, own_key, level_key = prng.split(KEYS, 3).unbind(-2)
    step_key, start_key, noise_key = prng.split(own_key, 3).unbind(-2)
    last = prng.randint(step_key, (), 0, 3)
    assert len(set(last.tolist())) > 1
    learned = tree.map(lambda leaf: leaf.detach().requires_grad_(), double[1]["transformer"])
    rows = []
    for i in range(4):
        one = [part[i : i + 1] for part in given]
        own = lambda params, x, t, one=one: mmdit.apply(params, tiny.config.transformer, x, t[None], *one)  # noqa: E731
        x, key = prng.normal(start_key[i : i + 1], (16, 4, 4)).double(), noise_key[i : i + 1]
        for t, s in zip(TIMES[: last[i]], TIMES[1 : last[i] + 1], strict=True):
            key, drawn = prng.split(key).unbind(-2)
            e = prng.normal(drawn, (16, 4, 4), torch.float64)
            x = ((1 - s) * (x - t * own(learned, x, t)) + s * e).detach()
        rows.append(x - TIMES[last[i]] * own(learned, x, TIMES[last[i]]))
    x = torch.cat(rows)
    time_key, noise_key = prng.split(level_key).unbind(-2)
    u = prng.uniform(time_key, ())
    t = (5 * u / (1 + 4 * u)).double()
    noised = ((1 - wide(t)) * x + wide(t) * prng.normal(noise_key, (16, 4, 4)).double()).detach()
    theirs = noised - wide(t) * v(double[0]["transformer"], noised, t)
    difference = noised - wide(t) * v(double[1]["fake"], noised, t) - theirs
    step = difference / wide((x - theirs).abs().mean((1, 2, 3)))
    value = 0.7 * (x - (x - step).detach()).square().mean()
    assert (gradients[0][1][0] - gradients[1][1][0]).item() == pytest.approx(value.item(), rel=1e-6)
    assert metrics["matching"].item() == pytest.approx(difference.abs().mean().item(), rel=1e-8)
    leaves = tree.leaves(learned)
    expected = torch.autograd.grad(value, leaves, materialize_grads=True)
    pairs = zip(*(tree.leaves(gradient[0]["transformer"]) for gradient in gradients), expected, strict=True)
    for a, b, wanted in pairs:
        torch.testing.assert_close(a - b, wanted, rtol=1e-6, atol=1e-9)
    assert all(not leaf.any() for leaf in tree.leaves(gradients[0][0]["fake"]))


def test_the_fake_score_learns_the_students_images_by_flow_matching(tiny, double, batch):
    loss = objectives.fake_score_loss(tiny.config, TIMES)
    gradient, (value, _) = transform.value_and_grad(loss, has_aux=True)(double[1], batch, KEYS)
    own_key, level_key = prng.split(KEYS).unbind(-2)
    velocity_of = points.model_velocity(tiny.config)
    x = rcm.own_images(velocity_of(double[1], batch), own_key, batch["latents"], TIMES)
    time_key, noise_key = prng.split(level_key).unbind(-2)
    t = rcm.shifted_uniform(time_key, ()).double()
    fake = velocity_of({"transformer": double[1]["fake"]}, batch)
    wanted = path.loss(fake, x, prng.normal(noise_key, (16, 4, 4)).double(), t).mean()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert all(not leaf.any() for leaf in tree.leaves(gradient["transformer"]))
    assert any(leaf.any() for leaf in tree.leaves(gradient["fake"]))


def test_matching_equal_scores_moves_nothing(tiny, double, batch, teacher):
    params = {"transformer": double[1]["transformer"], "fake": double[0]["transformer"]}
    both, one = (objectives.rcm_loss(tiny.config, teacher, TIMES, matching=weight) for weight in (1.0, 0.0))
    assert both(params, batch, KEYS)[0].item() == pytest.approx(one(params, batch, KEYS)[0].item(), rel=1e-9)
    assert both(params, batch, KEYS)[1]["matching"] < 1e-10


def test_settings_and_batches_that_make_no_sense_are_errors(tiny, double, batch, teacher):
    with pytest.raises(ValueError, match="offset 0 must be a positive number"):
        objectives.scm_loss(tiny.config, teacher, offset=0)
    with pytest.raises(ValueError, match="matching -1 must be a finite number"):
        objectives.rcm_loss(tiny.config, teacher, TIMES, matching=-1)
    with pytest.raises(ValueError, match=r"times \[1\] must be the student's grid"):
        objectives.fake_score_loss(tiny.config, torch.ones(1))
    with pytest.raises(ValueError, match="the batch of scm_loss lacks pooled"):
        objectives.scm_loss(tiny.config, teacher)(
            double[1], {name: batch[name] for name in ("latents", "context")}, KEYS
        )
    with pytest.raises(ValueError, match='rcm_loss needs params\\["fake"\\]'):
        objectives.rcm_loss(tiny.config, teacher, TIMES)(double[0], batch, KEYS)
