"""Draw the images between prompts or seeds, or the steps of one image, as a strip and an animation."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from functional_sd3.cli import controls, image_settings, numbers, options, output, preview, prompt_words, report
from functional_sd3.cli.timing import Timer, progress

if TYPE_CHECKING:
    from torch import Tensor

    from functional_sd3.cli.session import Session
    from functional_sd3.pipeline import Request
    from functional_sd3.pipeline.mixing import Mix
    from functional_sd3.pipeline.request import Show

HELP = "draw the images between prompts or seeds, or the steps of one"
_SUFFIXES = (".png", ".jpg", ".jpeg", *output.ANIMATIONS)
_RECORDED = ("seeds", "frames", "slerp", "trajectory", "denoised", "fps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="the stops; one stays the same throughout")
    parser.add_argument("--seeds", default="0", metavar="SEED,...", help="the stops; one stays the same (default 0)")
    parser.add_argument("--frames", type=int, help="images from the first stop to the last (default 8)")
    parser.add_argument("--slerp", action="store_true", help="mix the prompts' embeddings along arcs, as noise is")
    parser.add_argument(
        "--trajectory", action="store_true", help="the steps of one image instead, of one prompt and one seed"
    )
    parser.add_argument(
        "--denoised", action="store_true", help="with --trajectory: what each step takes the image to be"
    )
    parser.add_argument("--fps", type=float, default=8.0, help="images a second of an animation (default 8)")
    options.add_size(parser)
    options.add_words(parser)
    options.add_run(parser)
    options.add_model(parser)
    options.add_batch(parser)
    parser.add_argument(
        "--out",
        metavar="FILE-or-DIR",
        help="a .png or .jpg file for a strip, a .gif or .webp for an animation, or a folder for a strip and a .gif "
        "(default: out/)",
    )


def run(arguments: argparse.Namespace) -> int:
    timer = Timer()
    seeds, size = _check(arguments), options.size(arguments.size)
    options.check_run(arguments)
    out, single = output.destination(arguments.out, _SUFFIXES)
    preview.check(arguments, out, single=single)

    import torch

    from functional_sd3 import pipeline
    from functional_sd3.cli import records, runtime, session
    from functional_sd3.core import prng

    opened = session.open_session(arguments, timer)
    size = session.image_size(opened, size)
    control = controls.prepare(arguments, opened.config, opened.fetch, size, opened.dtype, opened.device)
    show = preview.prepare(arguments, opened, out, single=single)
    timer.done("load")
    texts = [*arguments.prompts, arguments.negative]
    session.note_truncated(opened, texts, arguments)
    prompt_words.note_mistakes(arguments, texts, opened.words)
    frames = arguments.steps if arguments.trajectory else arguments.frames or 8
    if single:
        is_strip = out.suffix.lower() not in output.ANIMATIONS
        output.check_fits(out, (frames * (size[0] + 2) - 2) if is_strip else size[0], size[1])
    with timer.named_failures(), progress(arguments.steps) as bar:
        request = pipeline.Request(
            arguments.prompts,
            prng.key(torch.tensor(seeds, dtype=torch.int64, device="cpu")),
            session.text_options(arguments),
            session.sampling_options(opened, arguments, lambda info: (bar.update(), show(info)), control),
            height=size[1],
            width=size[0],
            frames=None if arguments.trajectory else pipeline.Frames(frames, _mix(arguments)),
            loras=opened.loras,
            words=opened.words,
            show=_show(arguments),
        )
        record = records.recorder(opened, arguments)(request, _settings(arguments, size))
        images = torch.cat(list(_draw(opened, request, arguments)))
    runtime.check_finite(images)
    for path in _write(out, single, images, record, arguments):
        report.say(path)
    timer.done("write")
    report.message(timer.summary())
    return 0


def _mix(arguments: argparse.Namespace) -> "Mix":
    from functional_sd3 import pipeline

    return pipeline.slerp if arguments.slerp else pipeline.lerp


def _show(arguments: argparse.Namespace) -> "Show | None":
    from functional_sd3 import pipeline

    if not arguments.trajectory:
        return None
    return pipeline.denoised if arguments.denoised else pipeline.states


def _draw(opened: "Session", request: "Request", arguments: argparse.Namespace) -> "Iterator[Tensor]":
    """The images of each batch of frames, or of each step."""
    import torch

    from functional_sd3 import pipeline
    from functional_sd3.cli import session

    if not arguments.trajectory:
        yield from session.draw(opened, [request], arguments.batch, offload=arguments.offload)
        return
    prepared = session.prepare(opened, request)
    opened.timer.stage = "drawing"
    with torch.no_grad():
        images = pipeline.draw(opened.fetch, opened.config, prepared).flatten(0, 1).cpu()
    opened.timer.done("sampling", opened.device)
    yield images


def _check(arguments: argparse.Namespace) -> list[int]:
    """The seeds. Raises ValueError for options that make no sense."""
    seeds = [_seed(word, arguments.seeds) for word in arguments.seeds.split(",")]
    prompts = len(arguments.prompts)
    if arguments.trajectory:
        if prompts > 1 or len(seeds) > 1 or arguments.frames is not None or arguments.slerp:
            raise ValueError("--trajectory shows one prompt and one seed, a frame a step: leave out the others")
        return seeds
    if arguments.denoised:
        raise ValueError("--denoised needs --trajectory")
    if max(prompts, len(seeds)) < 2 or {prompts, len(seeds)} - {1, max(prompts, len(seeds))}:
        raise ValueError(f"{prompts} prompts and {len(seeds)} --seeds: give two or more of either, or as many of both")
    return seeds


def _seed(word: str, seeds: str) -> int:
    try:
        return numbers.seed(word, "one of them,")
    except ValueError as error:
        raise ValueError(f"--seeds {seeds!r} must be whole numbers, such as 3,4: {error}") from None


def _settings(arguments: argparse.Namespace, size: tuple[int, int]) -> image_settings.Settings:
    own = {
        **image_settings.given_options(arguments, _RECORDED),
        "size": "x".join(map(str, size)),
        **options.settings(arguments),
    }
    return {"subcommand": "interpolate", "prompts": arguments.prompts, **own}


def _write(
    out: Path, single: bool, images: "Tensor", record: image_settings.Record, arguments: argparse.Namespace
) -> list[Path]:
    suffixes = [out.suffix.lower()] if single else [".png", ".gif"]
    return [_save(out, single, suffix, images, record, arguments) for suffix in suffixes]


def _save(
    out: Path, single: bool, suffix: str, images: "Tensor", record: image_settings.Record, arguments: argparse.Namespace
) -> Path:
    """Write a strip, or an animation where the suffix is of one; its path."""
    from functional_sd3.formats import files
    from functional_sd3.image import pixels

    if suffix in output.ANIMATIONS:
        content = output.encoded_animation(pixels.to_pil(images), suffix, record, arguments.fps)
    else:
        strip = pixels.to_pil(pixels.grid(images, columns=len(images)))[0]
        content = output.encoded(strip, suffix, record)
    if not single:
        return output.write_new(out, f"{output.slug(arguments.prompts[0])}-frames", suffix, content)
    files.write_atomic(out, content)
    return out
