"""Intermediate images of a run, in a file that is written anew every few steps."""

import argparse
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from functional_sd3.cli import numbers, report
from functional_sd3.formats.printable import shorten

if TYPE_CHECKING:
    from torch import Tensor

    from functional_sd3.cli.opened_model import Session
    from functional_sd3.core.types import Params
    from functional_sd3.flow.ode.method import StepInfo
    from functional_sd3.layouts.components import Config

MARK = "functional_sd3 preview"
"""Keyword of the PNG text chunk that previews have, and nothing else: no other image is overwritten."""
WHERE = "https://huggingface.co/madebyollin/taesd3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preview",
        nargs="?",
        const=1,
        type=_every,
        metavar="EVERY",
        help="after every EVERY steps (default 1) write the images that the run is heading for into OUT.preview.png, "
        "or into preview.png of a folder",
    )
    add_decoder(parser)


def add_decoder(parser: argparse.ArgumentParser) -> None:
    """The option of what decodes previews."""
    parser.add_argument(
        "--preview-decoder",
        metavar="PATH",
        action="append",
        help="TAESD3, which decodes previews faster than the model's VAE; its two halves may be two files "
        f"({WHERE}; default: the model's own TAESD, else its VAE)",
    )


def _every(text: str) -> float:
    try:
        return numbers.reader(int, "--preview", numbers.Range(1, 1_000_000))(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{shorten(repr(text))} is not a whole number of steps; put prompts before --preview, or write --preview=1"
        ) from None


def check(arguments: argparse.Namespace, out: Path, *, single: bool) -> None:
    """Raises ValueError for a decoder without previews or that is not there, and where previews would replace an image.

    out: where the images go, `single`: as one file. Without torch.
    """
    paths = arguments.preview_decoder
    if paths and arguments.preview is None:
        raise ValueError(f"--preview-decoder {paths[0]} needs --preview")
    for path in paths or ():
        if not os.path.lexists(path):
            raise ValueError(
                f"--preview-decoder {shorten(path, 300)}: there is no such file or folder; TAESD3 is at {WHERE}"
            )
    path = _path(out, single=single)
    if arguments.preview is not None and os.path.lexists(path) and not _is_preview(path):
        raise ValueError(f"--preview writes {path}, which is no preview: move it away, or choose another --out")


def prepare(
    arguments: argparse.Namespace, session: "Session", out: Path, *, single: bool
) -> "Callable[[StepInfo], None]":
    """A function of each step that writes its preview; without --preview it does nothing.

    A preview that cannot be written is noted once, and the run continues. Raises ValueError for decoders that do not
    fit the model.
    """
    if arguments.preview is None or not report.is_first_process():
        return lambda info: None
    from functional_sd3 import pipeline
    from functional_sd3.cli import runtime
    from functional_sd3.formats.errors import WeightsError

    path, decoder = _path(out, single=single), decoder_of(arguments, session)
    tile = None if getattr(arguments, "tile", None) is None else decoder.tile
    if getattr(arguments, "strength", None) == 0:
        report.note("--preview: with --strength 0 no step is drawn, so there are no previews")
        return lambda info: None
    report.note(f"previews are written to {path}, {decoder.words}")
    ended = False

    def write(info: "StepInfo") -> None:
        nonlocal ended
        if not ended and info.steps < arguments.preview:
            ended = True
            report.note(f"--preview {arguments.preview}: a run of {info.steps} steps ends before, without a preview")
        if ended or (info.index + 1) % arguments.preview:
            return
        session.timer.done("sampling", session.device)
        images = pipeline.preview(decoder.params, decoder.config, info.denoised, tile=tile)
        runtime.check_finite(images)
        try:
            _write(path, images, f"step {info.index + 1} of {info.steps}")
        except WeightsError as error:
            ended = True
            report.note(f"no more previews: {error}")
        session.timer.done("preview", session.device)

    return write


def _path(out: Path, *, single: bool) -> Path:
    return out.with_name(f"{out.stem}.preview.png") if single else out / "preview.png"


class Decoder(NamedTuple):
    """The decoder of previews: parameters by component, a config, words for messages; tile: of the VAE, in latents."""

    params: "dict[str, Params]"
    config: "Config"
    words: str
    tile: int


def decoder_of(arguments: argparse.Namespace, session: "Session") -> Decoder:
    """The decoder of --preview-decoder, else the model's own TAESD, else its VAE. Raises ValueError where it does not
    fit the model."""
    from dataclasses import replace

    from functional_sd3.layouts.components import require

    config, transformer = session.config, require(session.config, "transformer")
    if arguments.preview_decoder:
        where = " and ".join(map(str, arguments.preview_decoder))
        params, own = _read(arguments.preview_decoder, session)
        config = replace(config, taesd=own.taesd)
    elif config.taesd is not None:
        where, params = "this model's TAESD", {"taesd": session.fetch("taesd")}
    elif arguments.offload:
        raise ValueError(
            "--offload holds one part of the model in memory at a time, but --preview would hold the VAE beside the "
            f"transformer: give --preview-decoder PATH, the small TAESD3 ({WHERE})"
        )
    else:
        words = f"decoded by the VAE; --preview-decoder with TAESD3 ({WHERE}) is faster"
        return Decoder({"vae": session.fetch("vae")}, config, words, transformer.sample_size)
    channels, wanted = require(config, "taesd").latent_channels, transformer.out_channels
    if channels != wanted:
        raise ValueError(f"{where} decodes latents of {channels} channels, not this model's {wanted}: see {WHERE}")
    return Decoder(params, config, f"decoded by {where}", transformer.sample_size)


def _read(paths: list[str], session: "Session") -> "tuple[dict[str, Params], Config]":
    from functional_sd3 import weights

    model = weights.load(paths, only="taesd", dtype=session.dtype, device=session.device)
    if model.config.taesd is None:
        raise ValueError(f"--preview-decoder {' and '.join(paths)} holds no TAESD; TAESD3 is at {WHERE}")
    return model.params, model.config


def _write(path: Path, images: "Tensor", words: str) -> None:
    """Put one image, a grid of several, at `path`, whole or not at all. Raises WeightsError."""
    from PIL.PngImagePlugin import PngInfo

    from functional_sd3.formats import files
    from functional_sd3.image import pixels

    info, buffer = PngInfo(), io.BytesIO()
    info.add_text(MARK, words)
    image = pixels.to_pil(images if len(images) == 1 else pixels.grid(images))[0]
    image.save(buffer, format="PNG", pnginfo=info, compress_level=1)
    files.write_atomic(path, buffer.getvalue())


def _is_preview(path: Path) -> bool:
    from functional_sd3.image import files

    try:
        return MARK in files.read_texts(path)
    except (ValueError, OSError):
        return False
