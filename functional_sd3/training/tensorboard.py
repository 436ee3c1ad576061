"""TensorBoard's event files of a run, by the package `tensorboard`, which is an extra: OUT/tensorboard."""

import math
from pathlib import Path

from torch import Tensor

FOLDER = "tensorboard"


class Writer:
    """Rows of the log as scalars and sample images as images, under the step's number."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Rows of later steps by an earlier process do not count: a resumed run writes them again.
        purged = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purged)

    def row(self, step: int, row: dict[str, float]) -> None:
        """The columns of a row; those that were not measured are left out."""
        for name, value in row.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, step: int, images: Tensor) -> None:
        """Images (batch, 3, height, width) in [0, 1]."""
        self._writer.add_images("samples", images.float().cpu(), step)
        self._writer.flush()


def open_writer(out: Path, first_step: int) -> Writer:
    """The writer of the run in `out`, of which `first_step` steps are done. Raises ImportError without the package."""
    return Writer(out / FOLDER, first_step)
