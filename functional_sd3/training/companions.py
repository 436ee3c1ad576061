"""Images that belong to those of a set, by their names: masks, and control images, in a folder of their own."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.formats.printable import shorten
from functional_sd3.image import cuts, files

_MASK_LABEL = "-masklabel"
"""Suffix that OneTrainer adds to the name of an image for its mask in the same folder."""


def find(folder: str | os.PathLike, names: Sequence[str], what: str, *, own: bool = True) -> list[Path]:
    """The file of every name below a folder: of the same name, or with another suffix of images.

    For "masks" the name with `-masklabel` serves too (OneTrainer's), and alone where `own` is false, as in the folder
    of the images themselves. Raises ValueError naming those without one.
    """
    folder, suffixes = Path(folder), sorted(files.suffixes())
    paths, absent = [], []
    for name in names:
        stem = str(PurePosixPath(name).with_suffix(""))
        stems = [*([stem + _MASK_LABEL] if what == "masks" else []), *([stem] if own else [])]
        places = [*([name] if own else []), *(each + suffix for each in stems for suffix in suffixes)]
        path = next((folder / place for place in places if (folder / place).is_file()), None)
        if path is None:
            absent.append(name)
        else:
            paths.append(path)
    if absent:
        shown = ", ".join(shorten(name, 60) for name in absent[:5])
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise ValueError(f"{folder} has no {what} for {len(absent)} of {len(names)} images ({shown}{more}): "
                         "each has the name of its image, with any suffix of images")  # fmt: skip
    return paths


def load_mask(path: Path, size: tuple[int, int], cut: cuts.Cut, factor: int) -> Tensor:
    """A mask as weights of latents, float32 (1, cut.height / factor, cut.width / factor): the mean of each area.

    White is 1 and black 0; what is transparent is black. size: (width, height) of its image. Raises ValueError, naming
    the file, where it cannot be read or has another shape than its image.
    """
    from PIL import Image

    image = _read(path, files.read_transparent, size)
    ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
    grey = Image.alpha_composite(ground, image).convert("L")
    values = torch.from_numpy(numpy.array(cuts.apply(grey, cut), dtype=numpy.float32)) / 255
    return F.avg_pool2d(values[None], factor)


def load_control(path: Path, size: tuple[int, int], cut: cuts.Cut) -> Tensor:
    """A control image, uint8 (3, cut.height, cut.width). size, and errors: as in `load_mask`."""
    image = cuts.apply(_read(path, files.read, size), cut)
    return torch.from_numpy(numpy.array(image, dtype=numpy.uint8)).permute(2, 0, 1).contiguous()


def _read(path: Path, read, size: tuple[int, int]):
    try:
        image = read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    width, height = image.size
    # The same shape to a pixel, as copies of other sizes are rounded.
    if abs(width * size[1] - height * size[0]) > max(*image.size, *size):
        raise ValueError(f"{path} is {width} x {height}, but its image {size[0]} x {size[1]}: it must have its shape")
    return image
