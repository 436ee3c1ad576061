"""Stage of `params/tiny-4`: each step of the student learns from its teacher at the states that the student reaches.

On-policy distillation (Ross et al. 2011, arXiv:1011.0686, DAgger; Agarwal et al. 2024, arXiv:2306.13649). Segment
distillation starts from the path of the data (`objectives.segments_loss`), which the student's own path leaves; and its
error is largest in the last step: images that the teacher finishes from the student's last state but one are right.
Needs prompts alone, no images.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3 import pipeline
from functional_sd3.core import layers, prng, tree
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import ode, schedule
from functional_sd3.recipes.shapes import rewards, stages
from functional_sd3.recipes.shapes.architecture import LENGTH
from functional_sd3.text import conditioning
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import distill_task, objectives, optim, step
from functional_sd3.training.objectives import points, segments
from functional_sd3.training.objectives.segments import Teacher
from functional_sd3.weights.model import Model


class States(NamedTuple):
    """`rows` states that the student reaches after `done` of `steps` steps."""

    steps: int
    done: int
    rows: int


STATES = (States(2, 0, 8), States(2, 1, 24), States(4, 1, 3), States(4, 2, 6), States(4, 3, 18))
"""States of an update: most of them before a last step, whose error is the largest."""
SEGMENTS, FINEST, INNER = 2, 4, 3
"""The velocity leads to the next of the times of two steps; steps of the teacher in each of four."""
CFG = 2.0
"""Guidance of the teacher in the first segment, where places are decided; in the last its velocity is unguided
(Kynkaanniemi et al. 2024, arXiv:2404.07724: guidance in a limited interval)."""
RATE, WARMUP, DECAY = 8e-4, 10, 0.5
"""Learning rate of the hidden matrices, updates until it is reached, and the share of a run in which it falls to 0."""
EMA, OFFSET = 0.95, 1e-3
"""Decay of the average that is kept, and the offset of `segments.normalised`."""


class OnPolicyTask(NamedTuple):
    """Arguments of `loop.run`, as in `reward_task.RewardTask`."""

    state: step.TrainState
    train_step: Callable[[step.TrainState, Tree], tuple[step.TrainState, objectives.Metrics]]
    batch: Callable[[int], int]
    rollout: Callable[[step.TrainState, int], Tree]
    model: Callable[[step.TrainState], Model]


def on_policy_stage(
    key: Key, student: Model, teacher: Model, total: int, *, dtype: torch.dtype | None = None
) -> OnPolicyTask:
    """The student's transformer on the grid of its config; the learning rate falls to 0 at `total` updates.

    dtype: of the computation, the teacher's and the student's, beside float32 parameters.
    """
    config, device = student.config, torch.device("cpu")
    run_key, round_key = prng.split(key).unbind(-2)
    fine = schedule.even(FINEST * INNER, (config.schedule or schedule.Config()).shift)
    velocity_of = points.model_velocity(config, dtype=dtype)
    source = rewards.source()

    def encode(prompts: list[str]) -> Tree:
        with torch.no_grad():
            ids = conditioning.tokenize(config, student.tokenizers, prompts, t5_length=LENGTH)
            return conditioning.encode(student.params, config, ids)._asdict()

    empty = Conditioning(**encode([""]))
    guided, unguided = (distill_task.guided_teacher(teacher, empty, cfg, dtype) for cfg in (CFG, 1.0))

    def rollout(state: step.TrainState, number: int) -> Tree:
        own: Params = {"transformer": state.params["transformer"]}
        if dtype is not None:
            own = {"transformer": layers.cast(own["transformer"], dtype)}
        parts = []
        for steps in (SEGMENTS, FINEST):
            prompt_key, noise_key = prng.split(prng.fold_in(prng.fold_in(round_key, number), steps)).unbind(-2)
            wanted = [each for each in STATES if each.steps == steps]
            prompts, _ = source(prompt_key, max(each.rows for each in wanted))
            batch = encode(prompts)
            keys = prng.split(noise_key, len(prompts))
            noise = pipeline.initial_noise(keys, config, len(prompts), None, None, device=device)
            inner = FINEST * INNER // steps
            with torch.no_grad():
                states = ode.integrate(ode.EULER, velocity_of(own, batch), noise, fine[:-inner:inner], save="all")
            for each in wanted:
                rows = tree.map(lambda leaf, count=each.rows: leaf[:count], batch)
                parts.append(
                    with_targets(guided, unguided, rows, states[each.done, : each.rows], fine, each.done * inner)
                )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def loss(params: Params, batch: Tree, keys: Key) -> tuple[Tensor, objectives.Metrics]:
        error = points.sample_means((velocity_of(params, batch)(batch["x"], batch["t"]) - batch["target"]).square())
        return segments.normalised(error, OFFSET).mean(), {"error": error.mean()}

    rate = optim.trapezoid(RATE, WARMUP, total, int(DECAY * total))
    optimizer = stages.muon_optimizer(rate, lambda count: 0.5 * rate(count), dtype=dtype)
    train_step = step.make_train_step(loss, optimizer, ema_decay=EMA, donate=True, rate=rate)

    def model(state: step.TrainState) -> Model:
        return student._replace(params={**student.params, **state.ema})

    state = step.init(run_key, {"transformer": student.params["transformer"]}, optimizer)
    return OnPolicyTask(state, train_step, lambda number: number, rollout, model)


def with_targets(guided: Teacher, unguided: Teacher, rows: Tree, x: Tensor, times: Tensor, first: int) -> Tree:
    """The rows with "x" (rows, ...), its "t", `times[first]`, and "target", the mean velocity of the teacher's steps.

    They are those on `times`, the teacher's grid of `SEGMENTS` equal parts, to the end of the part that t is in: guided
    in the first part.
    """
    size = (len(times) - 1) // SEGMENTS
    grid = times[first : first - first % size + size + 1]
    teacher = guided if first < size else unguided
    with torch.no_grad():
        end = ode.integrate(ode.EULER, teacher(rows), x, grid)
    return {**rows, "x": x, "t": grid[0].expand(len(x)), "target": (end - x) / (grid[-1] - grid[0])}
