"""A student with a fake score: the score of its own images, learned beside it (DMD2, arXiv:2405.14867; rCM)."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from functional_sd3.core.types import Params, Tree
from functional_sd3.training.following import Following
from functional_sd3.training.objectives import Metrics
from functional_sd3.training.step import TrainState

Update = Callable[[TrainState, Tree], tuple[TrainState, Metrics]]


class _ScoreFields(NamedTuple):
    train: TrainState
    fake: TrainState


class ScoreState(Following, _ScoreFields):
    """State of a run: that of the student, which counts the steps, and that of the fake score, without an average."""

    __slots__ = ()

    @property
    def step(self) -> Tensor:
        return self.train.step


def make_score_step(
    student: Callable[[Params], Update], fake: Callable[[Params], Update], updates: int
) -> Callable[[ScoreState, Tree], tuple[ScoreState, Metrics]]:
    """`step(state, batch) -> (state, metrics)`: `updates` updates of the fake score, then one of the student.

    student: parameters of the fake score -> the student's update (`step.make_train_step`); fake: parameters of the
    student -> the fake score's. The updates take the same batch and keys of their own. Metrics: the student's, and
    "fake_loss", that of the fake score's last update.
    """
    if updates < 1:
        raise ValueError(f"updates {updates} of the fake score must be at least 1 for each of the student's")

    def score_step(state: ScoreState, batch: Tree) -> tuple[ScoreState, Metrics]:
        train, score = state
        update = fake(train.params)
        for _ in range(updates):
            score, of_score = update(score, batch)
        train, metrics = student(score.params)(train, batch)
        return ScoreState(train, score), {**metrics, "fake_loss": of_score["loss"]}

    return score_step
