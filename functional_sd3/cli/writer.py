"""The images of `generate`, written as their batches are drawn."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from functional_sd3.cli import output, report, runtime
from functional_sd3.cli.image_settings import Job, Record
from functional_sd3.image import pixels

if TYPE_CHECKING:
    from functional_sd3.cli.timing import Timer

_MAX_GRID = 2**27
"""Pixels of the grid that a folder gets by default."""


def write(
    batches: Iterable[Tensor],
    jobs: Sequence[Job],
    record: Callable[[Sequence[Job]], Record],
    out: Path,
    *,
    single: bool,
    timer: "Timer",
) -> None:
    """Write the images (count, 3, height, width) of all batches and print their paths.

    record: of the one image of some jobs.
    single: `out` is one file for all, written at the end or, of those that were drawn, when the run is cut short; else
    it is the folder of a file for each, written after its batch, and of a grid of all. Ctrl-C and errors carry a note
    of how many were written.
    """
    kept: list[Tensor] = []
    count = finished = 0
    with timer.named_failures(lambda: f"{count} of {len(jobs)} written" + (f" to {out}" if single and count else "")):
        try:
            for images in batches:
                runtime.check_finite(images)
                timer.stage = "writing"
                if single or _has_grid(len(jobs), images):
                    # Bytes: of many images the floats would take four times the memory.
                    kept.append(pixels.to_bytes(images))
                if not single:
                    for job, image in zip(jobs[finished:], images, strict=False):
                        _say_path(_write_one(out, image, job, record([job])))
                        count += 1
                finished += len(images)
                timer.done("write")
                timer.stage = "sampling"
        except BaseException:
            if single and kept:
                count = sum(map(len, kept))
                _write_grid(out, kept, record(jobs[:count]))
            raise
        timer.stage = "writing"
        if single:
            _write_grid(out, kept, record(jobs))
            count = len(jobs)
            _say_path(out)
        elif kept and len(jobs) > 1:
            grid = pixels.to_pil(pixels.grid(pixels.from_bytes(torch.cat(kept))))[0]
            _say_path(output.save_new(out, "grid", grid, record(jobs)))
        timer.done("write")


def check_fits(out: Path, size: tuple[int, int], count: int) -> None:
    """Raises ValueError where the grid of `count` images of this size (width, height) is too large for `out`."""
    columns = math.ceil(math.sqrt(count))
    output.check_fits(out, columns * (size[0] + 2) - 2, -(-count // columns) * (size[1] + 2) - 2)


def _has_grid(count: int, images: Tensor) -> bool:
    """True if a folder also gets a grid: of several images that one file can show."""
    return 1 < count and count * images.shape[-1] * images.shape[-2] <= _MAX_GRID


def _say_path(path: Path) -> None:
    """Print a path; after the reader of standard output has ended (`| head`) the images are still drawn."""
    try:
        report.say(path)
    except BrokenPipeError:
        # The interpreter must not try to flush into it again.
        sys.stdout = None
        report.note("standard output was closed: the paths of further images are not printed")


def _write_one(folder: Path, image: Tensor, job: Job, record: Record) -> Path:
    seeds = f"{job.seed}" if job.variation_seed is None else f"{job.seed}-{job.variation_seed}"
    return output.save_new(folder, f"{output.slug(job.prompt)}-{seeds}", pixels.to_pil(image[None])[0], record)


def _write_grid(path: Path, kept: Sequence[Tensor], record: Record) -> None:
    """One file of the images that there are; record: of them."""
    images = pixels.from_bytes(torch.cat(list(kept)))
    image = pixels.to_pil(images if len(images) == 1 else pixels.grid(images))[0]
    output.save(path, image, record)
