"""Images of the class (`train --prior-images`), drawn by the model as it is before training."""

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from functional_sd3 import pipeline
from functional_sd3.cli import train_data
from functional_sd3.cli.train_data import Say
from functional_sd3.core import prng
from functional_sd3.formats import bounded, files
from functional_sd3.formats.printable import shorten
from functional_sd3.image import files as image_files
from functional_sd3.image import pixels
from functional_sd3.weights.model import Model


def draw(arguments: argparse.Namespace, drawing: Callable[[], Model], folder: Path, say: Say) -> None:
    """Draws images that a folder lacks of --prior-images, with the model as it is before training, each by a key of its
    own. Raises ValueError for a folder that holds images of another prompt."""
    suffixes = image_files.suffixes()
    there = sum(path.suffix.lower() in suffixes for path in folder.rglob("*")) if folder.is_dir() else 0
    missing = [index for index in range(arguments.prior_images) if not (folder / _name(index)).exists()]
    missing = missing[: max(arguments.prior_images - there, 0)]
    _check_drawn(arguments, folder)
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    say(f"drawing {len(missing)} images of the class into {folder}: {arguments.prior_prompt}")
    model = drawing()
    side, key = train_data.side(arguments, model), prng.fold_in(prng.key(arguments.seed), 5)
    levels = model.config.schedule
    options: dict[str, Any] = {"cfg": 1.0, "steps": levels.distilled_steps} if levels and levels.distilled_steps else {}
    with torch.no_grad():
        for rows in train_data.track(len(missing), "drawing images of the class", 4):
            some = [missing[row] for row in rows]
            keys = torch.stack([prng.fold_in(key, index) for index in some])
            images = pipeline.generate(
                model.params, model.config, model.tokenizers, [arguments.prior_prompt] * len(some), keys,
                height=side, width=side, t5_length=train_data.t5_length(model), **options,
            )  # fmt: skip
            for index, image in zip(some, pixels.to_pil(images.cpu()), strict=True):
                files.write_atomic((folder / _name(index)).with_suffix(".txt"), arguments.prior_prompt.encode())
                files.write_atomic(folder / _name(index), _png(image))


def _check_drawn(arguments: argparse.Namespace, folder: Path) -> None:
    """Raises ValueError where a folder holds images that were drawn of another prompt."""
    for path in sorted(folder.glob("drawn-*.txt")):
        prompt = bounded.read_text(path, 2**18)
        if path.with_suffix(".png").exists() and prompt != arguments.prior_prompt:
            raise ValueError(
                f"--prior-prompt {shorten(arguments.prior_prompt, 60)}: {path.with_suffix('.png')} was drawn of "
                f"{shorten(repr(prompt), 60)}: name another folder with --prior-data, or delete what was drawn"
            )


def _name(index: int) -> str:
    return f"drawn-{index:05d}.png"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
