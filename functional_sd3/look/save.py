"""The page of a run and its images in a folder."""

import os
from collections.abc import Mapping
from pathlib import Path

from functional_sd3.formats import files
from functional_sd3.look import run_page
from functional_sd3.look.record import Record

INDEX = "index.html"


def save(folder: str | os.PathLike[str], record: Record, *, image: bytes | None = None) -> list[Path]:
    """Write FOLDER/index.html, which needs no other file, and its images as PNGs beside it; returns their paths.

    image: what to write as image.png instead, such as the same image with its settings inside.
    Files of the same names are replaced, each whole or not at all. Raises WeightsError where the system refuses.
    """
    images = {f"{name}.png": data for name, data in run_page.pngs(record).items()}
    images |= {} if image is None else {"image.png": image}
    contents = {INDEX: run_page.page(record).encode()} | images
    return write(folder, contents)


def write(folder: str | os.PathLike[str], contents: Mapping[str, bytes]) -> list[Path]:
    """Write files into a folder, which is made, each whole or not at all; returns their paths in order."""
    paths = [Path(folder) / name for name in contents]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, data in zip(paths, contents.values(), strict=True):
        files.write_atomic(path, data)
    return paths
