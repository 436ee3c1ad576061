"""The record that is written into an image: the request that draws it again, and what only the command knows."""

import argparse
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import functional_sd3
from functional_sd3 import pipeline
from functional_sd3.cli import controls, guidance, lora_options, options, regions, runtime
from functional_sd3.cli.image_settings import Record, Settings
from functional_sd3.cli.opened_model import Session
from functional_sd3.formats import default_dtype, folder_kinds
from functional_sd3.pipeline import Request

_MAX_BYTES = 2**28
"""Larger files, such as ControlNets, are recorded by name and size alone: each run would read all of them."""


def recorder(opened: Session, arguments: argparse.Namespace) -> Callable[[Request, Settings], Record]:
    """(request, settings) -> the record of the images of that request; the files of the options are digested now."""
    dtype = default_dtype.choose(opened.dtype, (), opened.device)
    common = {
        "program": f"functional_sd3 {functional_sd3.__version__}",
        "model": {
            "params": arguments.params or [options.SHIPPED[0]],
            **({"without": arguments.without} if arguments.without else {}),
            "dtype": "as stored" if dtype is None else str(dtype).removeprefix("torch."),
            "device": str(opened.device),
        },
        "files": {str(path): _digest(path) for path in _paths(arguments)},
    }

    def record(request: Request, settings: Settings) -> Record:
        return {**common, "request": pipeline.describe(request), "command": settings}

    return record


def _paths(arguments: argparse.Namespace) -> Iterator[Path]:
    """The files that the options of a drawing command name, the model's own weights aside."""
    named = (getattr(arguments, name, None) for name in ("image", "mask"))
    yield from (Path(path) for path in named if path)
    yield from (_inside(lora_options.parse(text).path, folder_kinds.LORAS) for text in arguments.lora)
    yield from (_inside(Path(runtime.word_source(text)[1]), (folder_kinds.WORD,)) for text in arguments.embedding)
    yield from (controls.parse(text).image for text in arguments.control)
    yield from (Path(controls.net_source(text)[1]) for text in arguments.controlnet)
    places = (regions.parse(text).place for text in getattr(arguments, "region", ()))
    yield from (Path(place) for place in places if isinstance(place, str))
    weaker = (guidance.parse(text).options.get("params") for text in arguments.guidance)
    yield from (Path(path) for path in weaker if path)


def _inside(path: Path, names: Sequence[str]) -> Path:
    """The file that is read of a folder, the first of `names` there; any other path as it is."""
    return next((path / name for name in names if (path / name).is_file()), path)


def _digest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"folder": True}
    size = os.path.getsize(path)
    if size > _MAX_BYTES:
        return {"bytes": size}
    with open(path, "rb") as file:
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
