"""States of a run that hold a `TrainState` and more, of which the loop reads the parameters, their average and key."""

from functional_sd3.core.types import Key, Params
from functional_sd3.training.step import TrainState


class Following:
    """Base of a NamedTuple with a field `train`, whose parameters, average and key are those of the run."""

    __slots__ = ()
    train: TrainState

    @property
    def params(self) -> Params:
        return self.train.params

    @property
    def ema(self) -> Params:
        return self.train.ema

    @property
    def key(self) -> Key:
        return self.train.key
