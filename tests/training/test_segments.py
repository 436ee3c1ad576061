"""Segment distillation: the objective against its formula, its fixed points, and the grids of students."""

import dataclasses

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import prng, transform, tree
from functional_sd3.flow import ode, path, schedule
from functional_sd3.layouts import config_fields, diffusers_configs
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import distill_task, objectives
from functional_sd3.training.objectives import points
from functional_sd3.transformer import mmdit

KEYS = prng.split(prng.key(3), 4)


@pytest.fixture(scope="module")
def double(tiny):
    """A teacher in float64, and another model as the student."""
    teacher = tree.cast(tiny.params, torch.float64)
    return teacher, tree.map(lambda leaf: leaf + 0.01 * torch.ones_like(leaf), teacher)


@pytest.fixture(scope="module")
def batch(tiny):
    keys = prng.split(prng.key(8), 3)
    shapes = {"latents": (4, 16, 4, 4), "context": (4, 3, 32), "pooled": (4, 32)}
    return {name: prng.normal(key, shape).double() for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def teacher_of(tiny, params):
    velocity_of = points.model_velocity(tiny.config)
    return lambda batch: velocity_of(params, batch)


def test_the_loss_and_its_gradient_are_those_of_the_formula(tiny, double, batch):
    teacher, student = double
    times = schedule.even(6, 2.0).double()
    loss = objectives.segments_loss(tiny.config, teacher_of(tiny, teacher), times, inner=2, offset=0.1)
    gradient, (value, metrics) = transform.value_and_grad(loss, has_aux=True)(student, batch, KEYS)

    segment_key, noise_key = prng.split(KEYS).unbind(-2)
    segment = prng.randint(segment_key, (), 0, 3)
    assert len(set(segment.tolist())) > 1
    noise = prng.normal(noise_key, (16, 4, 4)).double()

    def v(params, x, t):
        return mmdit.apply(params["transformer"], tiny.config.transformer, x, t, batch["context"], batch["pooled"])

    t, between, end = (times[2 * segment + step] for step in range(3))
    wide = lambda t: t[:, None, None, None]  # noqa: E731
    x = (1 - wide(t)) * batch["latents"] + wide(t) * noise
    z = x + wide(between - t) * v(teacher, x, t)
    z = z + wide(end - between) * v(teacher, z, between)
    learned = tree.map(lambda leaf: leaf.detach().requires_grad_(), student)
    error = (v(learned, x, t) - ((z - x) / wide(end - t)).detach()).square().mean((1, 2, 3))
    wanted = (error / (error.detach() + 0.1)).mean()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert metrics["error"].item() == pytest.approx(error.mean().item(), rel=1e-10)
    leaves = tree.leaves(learned)
    for ours, theirs in zip(
        tree.leaves(gradient), torch.autograd.grad(wanted, leaves, materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_a_student_that_steps_as_its_teacher_has_no_loss(tiny, double, batch):
    teacher, _ = double
    loss = objectives.segments_loss(tiny.config, teacher_of(tiny, teacher), schedule.even(4), inner=1)
    value, metrics = loss(teacher, batch, KEYS)
    assert metrics["error"] < 1e-24 and value < 1e-20


def test_the_exact_mean_velocity_of_a_gaussian_flow_is_drawn_to_the_end_of_the_teachers_run():
    times, wide = schedule.even(40).double(), torch.float64
    velocity = lambda x, t: -1.0 + (t - 0.25 * (1 - t)) / ((1 - t) ** 2 / 4 + t**2) * (x - (1 - t))  # noqa: E731
    noise = torch.linspace(-2, 2, 7, dtype=wide)

    def student(x, t):
        (index,) = (times[::10] == t).nonzero().flatten().tolist()
        end = ode.integrate(ode.EULER, velocity, x, times[10 * index : 10 * index + 11])
        return (end - x) / (times[10 * index + 10] - t)

    drawn = ode.integrate(ode.EULER, student, noise, times[::10])
    torch.testing.assert_close(drawn, ode.integrate(ode.EULER, velocity, noise, times), rtol=1e-12, atol=1e-12)


def test_a_guided_teacher_is_guided_once(tiny, double, batch):
    teacher, _ = double
    empty = Conditioning(batch["context"][:1], batch["pooled"][:1])
    model = weights.Model(teacher, tiny.config, weights.Tokenizers())
    x, t = batch["latents"], torch.full((4,), 0.4, dtype=torch.float64)
    guided = distill_task.guided_teacher(model, empty, 3.0)(batch)(x, t)
    blank = {name: part[:1].expand_as(part) for name, part in batch.items()}
    plain, unguided = (teacher_of(tiny, teacher)(rows)(x, t) for rows in (batch, blank))
    torch.testing.assert_close(guided, unguided + 3 * (plain - unguided), rtol=1e-10, atol=1e-10)


def test_a_grid_is_of_whole_segments(tiny):
    with pytest.raises(ValueError, match="a grid of 7 steps is not made of segments of inner = 3"):
        objectives.segments_loss(tiny.config, lambda batch: None, torch.linspace(1, 0, 8), inner=3)


def test_a_batch_needs_conditioning(tiny, batch):
    loss = objectives.segments_loss(tiny.config, lambda batch: None, schedule.even(2), inner=1)
    with pytest.raises(ValueError, match="segments_loss lacks pooled"):
        loss(tiny.params, {name: batch[name] for name in ("latents", "context")}, KEYS)


def test_even_grids_nest():
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(schedule.even(4, 3.0), path_shifted(levels, 3.0), rtol=1e-6, atol=0)
    for more in (2, 3, 7):
        assert torch.equal(schedule.even(4 * more, 3.0)[::more], schedule.even(4, 3.0))
    assert schedule.even(1).tolist() == [1.0, 0.0]


def path_shifted(levels, shift):
    return shift * levels / (1 + (shift - 1) * levels)


STUDENT = schedule.Config(distilled_steps=4, distillation="segments", guidance_distilled=True)


def test_a_student_of_segments_is_drawn_on_its_own_times_alone():
    assert torch.equal(schedule.from_config(STUDENT, 4), schedule.even(4))
    assert set(schedule.from_config(STUDENT, 2).tolist()) <= set(schedule.even(4).tolist())
    for steps in (3, 8, 28):
        with pytest.raises(ValueError, match=f"steps {steps}: this model was distilled into 4 .*drawn in 4 steps"):
            schedule.from_config(STUDENT, steps)
    meanflow = dataclasses.replace(STUDENT, distillation="meanflow")
    assert torch.equal(schedule.from_config(meanflow, 3), schedule.even(3))


def test_a_student_that_was_trained_in_other_numbers_of_steps_is_drawn_in_those_too():
    both = dataclasses.replace(STUDENT, distilled_steps=2, trained_steps=(4, 2))
    for steps in (4, 2, 1):
        assert torch.equal(schedule.from_config(both, steps), schedule.even(steps))
    with pytest.raises(ValueError, match=r"steps 3: .*distilled into 2 segments.*in 4 or 2 steps,.*less well in 1\."):
        schedule.from_config(both, 3)
    assert schedule.with_trained_steps(STUDENT, 2) == dataclasses.replace(STUDENT, trained_steps=(4, 2))
    assert schedule.with_trained_steps(both, 2) == both
    assert schedule.with_trained_steps(schedule.Config(), 2) == schedule.Config()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"distilled_steps": 4}, "go together"),
        ({"trained_steps": (4, 2)}, "are of a distilled model"),
        ({"distilled_steps": 4, "distillation": "segments", "trained_steps": (4, 0)}, "at least 1"),
        ({"distillation": "segments"}, "go together"),
        ({"distilled_steps": 4, "distillation": "magic"}, "must be one of segments"),
        ({"distilled_steps": 4, "distillation": "segments", "use_karras_sigmas": True}, "use_karras_sigmas must not"),
        ({"distilled_steps": 0, "distillation": "segments"}, "at least 1"),
    ],
)
def test_scheduler_configs_that_contradict_themselves_are_errors(fields, said):
    with pytest.raises(ValueError, match=said):
        schedule.from_config(schedule.Config(**fields), 4)
    values = {"shift": 3.0, **fields}
    with pytest.raises(weights.WeightsError):
        config_fields.read(diffusers_configs.SCHEDULE, values, "scheduler_config.json")


def test_the_scheduler_config_of_a_student_is_read_back_and_others_lack_its_fields():
    written = config_fields.write(diffusers_configs.SCHEDULE, STUDENT)
    assert config_fields.read(diffusers_configs.SCHEDULE, written, "file") == STUDENT
    plain = config_fields.write(diffusers_configs.SCHEDULE, schedule.Config())
    assert written.keys() - plain.keys() == {"distilled_steps", "distillation", "guidance_distilled"}
    both = dataclasses.replace(STUDENT, trained_steps=(4, 2))
    written = config_fields.write(diffusers_configs.SCHEDULE, both)
    assert written["trained_steps"] == [4, 2]
    assert config_fields.read(diffusers_configs.SCHEDULE, written, "file") == both


def test_what_a_student_can_become(tiny):
    def settings(schedule_config, to, **options):
        config = dataclasses.replace(tiny.config, schedule=schedule_config)
        return distill_task.student_settings(config, distill_task.Settings(to=to, **options))

    halved = settings(dataclasses.replace(STUDENT, shift=2.0), 2, cfg=1.0)
    assert (halved.inner, halved.shift) == (2, 2.0)
    assert settings(None, 3) == distill_task.Settings(to=3, inner=3)
    rewarded = dataclasses.replace(STUDENT, distilled_steps=2, trained_steps=(4, 2))
    assert (settings(rewarded, 2, cfg=1.0).inner, settings(rewarded, 1, cfg=1.0).inner) == (2, 4)
    for to in (3, 4, 8):
        with pytest.raises(ValueError, match=f"to {to}: this model is a student of 4 segments.*1 or 2"):
            settings(STUDENT, to, cfg=1.0)
    with pytest.raises(ValueError, match="guidance is folded into this model already"):
        settings(STUDENT, 2)
    with pytest.raises(ValueError, match="a student by meanflow"):
        settings(dataclasses.replace(STUDENT, distillation="meanflow"), 2, cfg=1.0)
    single = dataclasses.replace(STUDENT, distilled_steps=1)
    with pytest.raises(ValueError, match="cannot be fewer"):
        settings(single, 1, cfg=1.0)


def test_interpolation_starts_in_noise():
    x = path.interpolate(torch.ones(2), torch.zeros(2), schedule.even(4)[0])
    assert x.tolist() == [0, 0]
