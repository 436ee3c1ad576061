"""Images of the values of a form: the command line of `generate` that they are, and its run, step by step."""

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3 import pipeline
from functional_sd3.cli import (
    generate,
    guidance,
    image_settings,
    inputs,
    options,
    output,
    prompt_words,
    records,
    report,
    runtime,
    session,
)
from functional_sd3.cli.app import fields, limits
from functional_sd3.cli.app.model import Served
from functional_sd3.cli.image_settings import Job, Settings
from functional_sd3.cli.numbers import OutOfRange
from functional_sd3.cli.preview import Decoder
from functional_sd3.cli.timing import Timer
from functional_sd3.flow.ode.method import StepInfo
from functional_sd3.formats.printable import shorten
from functional_sd3.image import files, pixels
from functional_sd3.pipeline.request import OnStep, Request

START, MASK = "start.png", "mask.png"
"""Names of a start image and its mask in the command that draws an image again."""
PREVIEW = 32
"""Longest side of the latents that the VAE decodes for a preview: 256 pixels with SD3's."""


class Upload(NamedTuple):
    """An uploaded image and the strokes drawn on it, as the bytes of image files; the strokes are what is not
    transparent."""

    image: bytes | None = None
    strokes: Sequence[bytes] = ()


class Progress(NamedTuple):
    """A run on its way: `images` are the predictions of the data, (batch, 3, height, width) in [0, 1], if there are."""

    words: str
    share: float
    images: Tensor | None = None


class Drawn(NamedTuple):
    """The result of a run."""

    images: Tensor
    """(batch, 3, height, width) in [0, 1]."""
    files: dict[str, bytes]
    """Name -> PNG, in the order of the images, with the settings inside; then the start image and its mask."""
    jobs: tuple[Job, ...]
    command: str
    """The command line that draws them again."""
    notes: tuple[str, ...]


def settings(served: Served, values: fields.Values, uploaded: dict[str, bytes]) -> Settings:
    """The options of `generate` that the values are; uploaded: name -> PNG of the start image and its mask.

    Raises ValueError for values of another kind, beyond the limits, and for LoRAs and guidance that are no visitor's.
    """
    given = fields.typed({**served.defaults, **{name: each for name, each in values.items() if each not in (None, "")}})
    prompts = [line.strip() for line in str(given.get("prompts", "")).splitlines() if line.strip()]
    if not prompts:
        raise ValueError("the prompt is empty: describe an image, such as a large red circle on a white background")
    sides: dict[str, int] = {name: given[name] for name in ("width", "height") if name in given}
    count = max(1, given["count"])
    limits.check(served.limits, prompts, count, given.get("steps", 0), sides)
    _check_guidance(given.get("guidance", ()))
    made: Settings = {"prompts": prompts}
    for name, field in fields.EVERY.items():
        if name in given and field.option not in ("prompt", "--size", "--lora"):
            made[field.option.removeprefix("--")] = given[name]
    if sides:
        made["size"] = f"{sides.get('width', served.side)}x{sides.get('height', served.side)}"
    if loras := given.get("loras"):
        made["lora"] = [_lora(served, text) for text in loras]
    made |= {option: name for option, name in (("image", START), ("mask", MASK)) if name in uploaded}
    if made.get("cfg") == served.generate.get_default("cfg"):
        made.pop("cfg")
    return {**made, **served.settings}


def parse(served: Served, made: Settings) -> argparse.Namespace:
    """The options of the command line of these settings. Raises ValueError where `generate` would refuse them."""
    words = image_settings.words(made)[2:]
    try:
        arguments = served.generate.parse_args(words, argparse.Namespace(quiet=False, debug=False))
    except OutOfRange as error:
        raise ValueError(str(error)) from None
    arguments.offload = served.offload
    return arguments


def plan_sides(made: Settings, uploaded: dict[str, bytes]) -> dict[str, int]:
    """Width and height that a plan draws, by name: those of its size, else of the uploaded image."""
    size = options.size(str(made["size"])) if "size" in made else files.read(io.BytesIO(uploaded[START])).size
    return dict(zip(("width", "height"), size or (), strict=False))


class Planned(NamedTuple):
    """A run that is read and checked, and about to be computed."""

    arguments: argparse.Namespace
    opened: "session.Session"
    jobs: list[Job]
    request: Callable[[Sequence[Job], OnStep], Request]
    record: Callable[[Sequence[Job], Request], image_settings.Record]
    """The record of some of the images, which `request` made."""
    command: str
    """The command line that draws them all again."""
    uploaded: dict[str, bytes]


@contextmanager
def planned(served: Served, values: fields.Values, upload: Upload, emit: Callable[[Any], None]) -> Iterator[Planned]:
    """The run of the values, while no other computes. Raises ValueError, without paths of this machine's in its words,
    for what a person passed wrong; so does what is computed within."""
    uploaded = read_upload(upload, served.limits.upload)
    made = settings(served, values, uploaded)
    own: Settings = {name: made[name] for name in ("image", "mask") if name in made}
    with _folder(uploaded) as folder:
        arguments = parse(served, {**made, **{name: str(folder / file) for name, file in own.items()}})
        inputs.check(arguments)
        options.check_run(arguments)
        jobs = generate.jobs_of(prompt_words.listed(arguments.prompt, None), arguments)
        emit(Progress("waits for the run before", 0.0))
        with served.turn:
            emit(Progress("reads the prompt", 0.0))
            opened = session.adapted_session(arguments, Timer(), served.read)
            plan = generate.plan_of(arguments, opened, arguments.prompt, options.size(arguments.size), None)
            # Also of a size that was not given: the model's own, or that of the uploaded image.
            limits.check_sides(served.limits, plan_sides(plan.settings, uploaded))
            recorder = records.recorder(opened, arguments)
            shown: Settings = {**plan.settings, **own}

            def record(some: Sequence[Job], request: Request) -> image_settings.Record:
                whole = recorder(request, image_settings.joint_settings(some, shown))
                digests = {_public(name, folder): digest for name, digest in whole["files"].items()}
                return {**whole, "files": digests}

            command = image_settings.command(image_settings.joint_settings(jobs, shown))
            yield Planned(arguments, opened, jobs, plan.request, record, command, uploaded)


@torch.no_grad()
def draw(served: Served, values: fields.Values, upload: Upload, emit: Callable[[Progress], None]) -> Drawn:
    """The images of the values, as `generate` draws them; `emit` gets the progress and the predictions of each step.

    Raises ValueError as `planned` does.
    """
    with report.collected() as notes, planned(served, values, upload, emit) as run:
        batch = run.arguments.batch
        groups = generate.grouped(run.jobs, run.arguments)
        on_step = steps_shown(served, emit, sum(-(-len(group) // batch) for group in groups))
        requests = [run.request(group, on_step) for group in groups]
        batches = []
        for images in session.draw(run.opened, requests, batch, offload=served.offload):
            runtime.check_finite(images)
            batches.append(images)
        images = torch.cat(batches)
        named: dict[str, bytes] = {}
        for job, image in zip(run.jobs, images, strict=True):
            record = run.record([job], run.request([job], on_step))
            content = output.encoded(pixels.to_pil(image[None])[0], ".png", record)
            named[f"{len(named):02d}-{output.slug(job.prompt)}-{job.seed}.png"] = content
        return Drawn(images, {**named, **run.uploaded}, tuple(run.jobs), run.command, tuple(dict.fromkeys(notes)))


def steps_shown(served: Served, emit: Callable[[Progress], None], batches: int = 1) -> OnStep:
    """A function of each step that emits how far the run is and where it is heading."""
    done = 0

    def on_step(info: StepInfo) -> None:
        nonlocal done
        number, steps = info.index + 1, max(info.steps, info.index + 1)
        images = None if served.decoder is None else decode_preview(served.decoder, info.denoised)
        if images is not None and not torch.isfinite(images).all():
            images = None  # The run continues, and its last state reports this.
        emit(Progress(f"step {number} of {steps}", 0.95 * (done + number / steps) / batches, images))
        done += number == steps

    return on_step


def _public(name: str, folder: Path) -> str:
    """The name of a file in a record: those in the folder of a run go by their names alone."""
    return Path(name).name if Path(name).parent == folder else name


def decode_preview(decoder: Decoder, latents: Tensor) -> Tensor:
    """Images of latents, fast: by TAESD, else by the VAE from at most `PREVIEW` latents a side, averaged."""
    longest = max(latents.shape[-2:])
    if decoder.config.taesd is None and longest > PREVIEW:
        size = [max(1, round(side * PREVIEW / longest)) for side in latents.shape[-2:]]
        latents = torch.nn.functional.interpolate(latents, size, mode="area")
    return pipeline.preview(decoder.params, decoder.config, latents).float().cpu()


def read_upload(upload: Upload, limit: int) -> dict[str, bytes]:
    """The start image and the mask of an upload as PNGs by name: strokes of all layers are white in the mask.

    limit: of a file, in MiB. Raises ValueError for what is no image.
    """
    from PIL import Image, ImageChops

    image = None if upload.image is None else _read("the image", upload.image, limit)
    if image is not None and not image.getchannel("A").getbbox():
        image = None  # The canvas of an editor without an image.
    strokes = [_read("the mask", layer, limit).getchannel("A") for layer in upload.strokes]
    strokes = [layer for layer in strokes if layer.getbbox()]
    if image is None and strokes:
        raise ValueError("a mask is drawn on an image: upload the image first")
    if image is None:
        return {}
    made = {START: _png(pixels.opaque(image))}
    if strokes:
        if any(layer.size != strokes[0].size for layer in strokes):
            raise ValueError("the layers of the mask have different sizes")
        mask = Image.new("L", strokes[0].size)
        for layer in strokes:
            mask = ImageChops.lighter(mask, layer)
        made[MASK] = _png(mask)
    return made


@contextmanager
def _folder(uploaded: dict[str, bytes]) -> Iterator[Path]:
    """A folder with the files; errors within are raised without its path."""
    with tempfile.TemporaryDirectory(prefix="functional-sd3-app-") as name:
        folder = Path(name)
        for file, content in uploaded.items():
            (folder / file).write_bytes(content)
        try:
            yield folder
        except OutOfRange as error:
            raise ValueError(str(error)) from None
        except (ValueError, OSError) as error:
            raise ValueError(str(error).replace(f"{folder}/", "")) from error


def _check_guidance(texts: Sequence[str]) -> None:
    for text in texts:
        if "params" in guidance.parse(text).options:
            raise ValueError(f"guidance {shorten(repr(text))} reads weights from a file, which the page does not")


def _lora(served: Served, text: str) -> str:
    """FILE=SCALE of NAME=SCALE. Raises ValueError for a name that was not given at start."""
    name, equals, scale = (text, "", "") if text in served.loras else text.rpartition("=")
    if name not in served.loras:
        names = ", ".join(served.loras) or "none: functional-sd3 app --lora FILE gives some"
        raise ValueError(
            f"loras {shorten(repr(text))} must be NAME or NAME=SCALE, of the names given at start: {names}"
        )
    return f"{served.loras[name]}{equals}{scale}"


def _read(what: str, content: bytes, limit: int):
    limits.check_number(f"{what} of {len(content):,} bytes", -(-len(content) // 2**20), limit, "--max-upload", "MiB")
    try:
        return files.read_transparent(io.BytesIO(content))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
