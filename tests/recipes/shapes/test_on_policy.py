"""Distillation at the student's own states: which they are, and what the teacher makes of them."""

import pytest
import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng, tree
from functional_sd3.flow import schedule
from functional_sd3.recipes.shapes import few_steps, on_policy
from functional_sd3.recipes.shapes.on_policy import States
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import distill_task
from functional_sd3.weights import shipped


@pytest.fixture(scope="module")
def teacher():
    return weights.load(shipped.folder(), dtype=torch.float32)


@pytest.fixture
def student(teacher):
    levels = distill_task.student_config(teacher.config, distill_task.Settings(to=2))
    return teacher._replace(config=few_steps.in_steps(levels, few_steps.SHIFT))


@pytest.mark.parametrize(("first", "last", "guided"), [(0, 4, True), (2, 4, True), (4, 8, False), (6, 8, False)])
def test_targets_are_the_teachers_mean_velocity_to_the_next_of_two_steps(first, last, guided):
    times = schedule.even(8, 1.5)
    evaluated = []

    def velocity_of(scale):
        def velocity(x, t):
            evaluated.append((scale, float(t.flatten()[0])))
            return scale * t * torch.ones_like(x)

        return lambda rows: velocity

    rows = {"context": torch.zeros(3, 2)}
    x = torch.randn(3, 4, dtype=torch.float64)
    batch = on_policy.with_targets(velocity_of(2.0), velocity_of(1.0), rows, x, times.double(), first)
    scale, grid = 2.0 if guided else 1.0, times.double()[first : last + 1]
    mean = scale * (grid[:-1] * grid.diff()).sum() / (grid[-1] - grid[0])
    torch.testing.assert_close(batch["target"], mean.expand(3, 4))
    assert [each[0] for each in evaluated] == [scale] * (last - first)
    assert torch.equal(batch["t"], grid[0].expand(3)) and torch.equal(batch["x"], x) and "context" in batch


def test_a_rollout_holds_the_states_that_the_student_reaches(teacher, student, monkeypatch):
    monkeypatch.setattr(on_policy, "STATES", (States(2, 0, 1), States(2, 1, 2), States(4, 3, 1)))
    task = on_policy.on_policy_stage(prng.key(1), student, teacher, 20)
    batch = task.rollout(task.state, 0)
    half, last = schedule.even(4, few_steps.SHIFT)[2:4].tolist()
    assert batch["t"].tolist() == pytest.approx([1.0, half, half, last])
    assert half == pytest.approx(0.6)
    prompt = Conditioning(batch["context"][:1], batch["pooled"][:1])
    conditions = pipeline.Conditions(prompt, prompt)
    step = pipeline.sample(
        student.params, student.config, conditions, batch["x"][:1], cfg=1.0, times=torch.tensor([1.0, half])
    )
    torch.testing.assert_close(batch["x"][1:2], step)
    end = pipeline.sample(
        student.params, student.config, conditions, step, cfg=1.0, times=schedule.even(12, few_steps.SHIFT)[6:]
    )
    torch.testing.assert_close(batch["target"][1:2], (step - end) / half, rtol=1e-4, atol=1e-4)
    other = task.rollout(task.state, 1)
    assert not torch.equal(other["x"], batch["x"])
    assert not tree.diff(task.rollout(task.state, 0), batch)


def test_the_student_comes_nearer_to_its_teacher(teacher, student, monkeypatch):
    monkeypatch.setattr(on_policy, "STATES", (States(2, 1, 3), States(4, 3, 1)))
    monkeypatch.setattr(on_policy, "WARMUP", 0)
    task = on_policy.on_policy_stage(prng.key(1), student, teacher, 20)
    state, batch = task.state, task.rollout(task.state, 0)
    errors = []
    for _ in range(4):
        state, metrics = task.train_step(state, batch)
        errors.append(float(metrics["error"]))
    assert errors[-1] < 0.9 * errors[0]
    changed = {name for name in teacher.params if tree.diff(task.model(state).params[name], teacher.params[name])}
    assert changed == {"transformer"}
