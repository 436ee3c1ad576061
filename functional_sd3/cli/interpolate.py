"""Draw the pictures between prompts or seeds, or the steps of one picture, as a strip and an animation."""

import argparse
import sys
from pathlib import Path

from functional_sd3.cli import controls, options, written
from functional_sd3.cli.timing import Timer, progress

HELP = "draw the pictures between prompts or seeds, or the steps of one"
_SUFFIXES = (".png", ".gif", ".webp")
_RECORDED = ("seeds", "frames", "slerp", "trajectory", "denoised", "fps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="the stops; one stays the same throughout")
    parser.add_argument("--seeds", default="0", metavar="SEED,...", help="the stops; one stays the same (default 0)")
    parser.add_argument("--frames", type=int, help="pictures from the first stop to the last (default 8)")
    parser.add_argument("--slerp", action="store_true", help="mix the prompts' embeddings along arcs, as noise is")
    parser.add_argument(
        "--trajectory", action="store_true", help="the steps of one picture instead, of one prompt and one seed"
    )
    parser.add_argument(
        "--denoised", action="store_true", help="with --trajectory: what each step takes the picture to be"
    )
    parser.add_argument("--fps", type=float, default=8.0, help="pictures a second of an animation (default 8)")
    options.add_size(parser)
    options.add_words(parser)
    options.add_run(parser)
    options.add_model(parser)
    parser.add_argument(
        "--batch", type=int, default=options.BATCH, help=f"pictures drawn at once (default {options.BATCH})"
    )
    parser.add_argument(
        "--out",
        metavar="FILE-or-DIR",
        help="a .png file for a strip, a .gif or .webp for an animation, or a folder for a strip and a .gif "
        "(default: out/)",
    )


def run(arguments: argparse.Namespace) -> int:
    timer = Timer()
    seeds, size = _check(arguments), options.size(arguments.size)
    out, single = options.out(arguments.out, _SUFFIXES)

    import torch

    from functional_sd3 import pipeline
    from functional_sd3.cli import runtime, session
    from functional_sd3.core import prng

    opened = session.start(arguments, timer)
    size = session.picture_size(opened, size)
    control = controls.prepare(arguments, opened.config, opened.fetch, size, opened.dtype, opened.device)
    timer.done("load")
    session.note_truncated(opened, [*arguments.prompts, arguments.negative], arguments)
    keys = prng.key(torch.tensor(seeds))
    with torch.no_grad(), progress(arguments.steps) as bar:
        conditions = session.conditions(opened, arguments.prompts, arguments)
        timer.done("text", opened.device)
        noise = pipeline.initial_noise(keys, opened.config, len(seeds), size[1], size[0], device=opened.device)
        transformer = {"transformer": opened.fetch("transformer")}
        told = {"control": control}
        shown: list[torch.Tensor] = []
        if arguments.trajectory:
            show = pipeline.denoised if arguments.denoised else pipeline.states

            def watch(info) -> None:
                shown.append(show(info))
                bar.update()

            told |= {"on_step": watch, **session.sampling(opened, arguments, keys)}
            pipeline.sample(transformer, opened.config, conditions[0], noise, **told)
        else:
            stops = max(len(seeds), len(conditions))
            every = pipeline.joined([conditions[index % len(conditions)] for index in range(stops)])
            noises, keys = (part.expand(stops, *part.shape[1:]) for part in (noise, keys))
            places = torch.linspace(0, stops - 1, arguments.frames or 8, device=opened.device)
            mix = pipeline.slerp if arguments.slerp else pipeline.lerp
            told |= {"on_step": lambda info: bar.update()}
            for part in places.split(arguments.batch):
                start, mixed = pipeline.between(noises, every, part, mix)
                # A method's own noise is that of the first seed in every frame, so that they go on smoothly.
                options_of_run = session.sampling(opened, arguments, keys[:1].expand(len(part), 2))
                shown.append(pipeline.sample(transformer, opened.config, mixed, start, **told, **options_of_run))
        timer.done("sampling", opened.device)
        del transformer
        decoder = {"vae": opened.fetch("vae")}
        images = torch.cat([pipeline.decode(decoder, opened.config, latents).cpu() for latents in shown])
        timer.done("decoding", opened.device)
    runtime.check_finite(images)
    for path in _write(out, single, images, arguments):
        print(path)
    timer.done("write")
    print(timer.summary(), file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace) -> list[int]:
    """The seeds; ValueError for options that make no sense."""
    options.check_counts(arguments, "steps", "batch")
    try:
        seeds = [int(word) for word in arguments.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {arguments.seeds!r} must be whole numbers, such as 3,4") from None
    prompts = len(arguments.prompts)
    if not 0 < arguments.fps <= 100:
        raise ValueError(f"--fps {arguments.fps:g} must be above 0 and at most 100")
    if arguments.trajectory:
        if prompts > 1 or len(seeds) > 1 or arguments.frames is not None or arguments.slerp:
            raise ValueError("--trajectory shows one prompt and one seed, a frame a step: leave out the others")
        return seeds
    if arguments.denoised:
        raise ValueError("--denoised needs --trajectory")
    if max(prompts, len(seeds)) < 2 or {prompts, len(seeds)} - {1, max(prompts, len(seeds))}:
        raise ValueError(f"{prompts} prompts and {len(seeds)} --seeds: give two or more of either, or as many of both")
    if arguments.frames is not None and arguments.frames < 2:
        raise ValueError(f"--frames {arguments.frames} must be at least 2: the first stop and the last")
    return seeds


def _write(out: Path, single: bool, images, arguments: argparse.Namespace) -> list[Path]:
    from functional_sd3.image import pixels

    own = written.given(arguments, _RECORDED)
    size = {"size": "x".join(map(str, images.shape[:1:-1]))}
    settings = {"subcommand": "interpolate", "prompts": arguments.prompts, **own, **size, **options.settings(arguments)}
    if single:
        paths = [out]
    else:
        name = f"{written.slug(arguments.prompts[0])}-frames"
        paths = [written.free(out, name), written.free(out, name, ".gif")]
    for path in paths:
        if path.suffix.lower() == ".png":
            strip = pixels.to_pil(pixels.grid(images, columns=len(images)))[0]
            written.save(path, strip, settings)
        else:
            written.save_animation(path, pixels.to_pil(images), settings, arguments.fps)
    return paths
