"""Draw images of prompts."""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from functional_sd3.cli import (
    controls,
    image_settings,
    inputs,
    numbers,
    options,
    output,
    preview,
    processes,
    prompt_words,
    regions,
    report,
)
from functional_sd3.cli.image_settings import Job
from functional_sd3.cli.timing import Timer, progress

if TYPE_CHECKING:
    from functional_sd3.cli.opened_model import Session
    from functional_sd3.parallel.mesh import Mesh
    from functional_sd3.pipeline import Region, Request, SamplingOptions, StartImages, TextOptions
    from functional_sd3.pipeline.request import OnStep

HELP = "draw images of prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to draw; several give an image each")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a text file with a prompt on each line; - for standard input"
    )
    options.add_settings(parser)
    add_image(parser, "of the first image of a prompt", "; --count then gives more such seeds")
    parser.add_argument("--count", type=int, default=1, help="images of each prompt, with successive seeds")
    options.add_batch(parser)
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="print the memory that this and other options of it need, for --params sd3.5-large too, and draw nothing",
    )
    processes.add_mesh(
        parser,
        "with torchrun: what several processes divide, such as guidance=2 (the prompt and the negative one), "
        "sequence=4 (an image's tokens), tensor=2 (heads and weights), or several; text encoders are divided too",
    )
    parser.add_argument(
        "--out",
        metavar="FILE-or-DIR",
        help="a .png, .jpg or .webp file (several images become a grid), or a folder for one file an image "
        "(default: out/)",
    )


def add_image(parser: argparse.ArgumentParser, seed: str = "", variation: str = "") -> None:
    """Options of one image of one prompt; seed, variation: more words of these options' help."""
    options.add_words(parser)
    parser.add_argument("--seed", type=int, default=0, help=" ".join(filter(None, ("seed", seed, "(default 0)"))))
    parser.add_argument(
        "--variation",
        metavar="SEED:AMOUNT",
        help=f"move the noise towards that of another seed, by an amount in [0, 1]{variation}",
    )
    inputs.add_arguments(parser)
    regions.add_arguments(parser)
    options.add_size(parser, "that of --image, or the model's own")
    options.add_run(parser)
    options.add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.estimate:
        from functional_sd3.cli import generate_estimate

        return generate_estimate.run(arguments)
    timer = Timer()
    size, tile = options.size(arguments.size), regions.check(arguments)
    inputs.check(arguments)
    options.check_run(arguments)
    out, single = output.destination(arguments.out)
    preview.check(arguments, out, single=single)
    prompts = prompt_words.listed(arguments.prompt, arguments.prompts)
    jobs = jobs_of(prompts, arguments)
    prompt_words.note_missing_quotes(arguments.prompt)

    with processes.team(arguments, processes.DRAWING, "generate") as team:
        _draw(arguments, timer, team and team.mesh, prompts, jobs, size, tile, out, single=single)
    report.message(timer.summary())
    return 0


def _draw(
    arguments: argparse.Namespace,
    timer: Timer,
    mesh: "Mesh | None",
    prompts: list[str],
    jobs: list[Job],
    size: tuple[int, int] | None,
    tile: tuple[int, int] | None,
    out: Path,
    *,
    single: bool,
) -> None:
    from functional_sd3.cli import records, session, writer

    opened = session.open_session(arguments, timer, mesh)
    plan = plan_of(arguments, opened, prompts, size, tile)
    if single:
        writer.check_fits(out, plan.size, len(jobs))
    show = preview.prepare(arguments, opened, out, single=single)
    timer.done("load")
    groups = grouped(jobs, arguments)
    batches = sum(-(-len(group) // arguments.batch) for group in groups)
    with progress(arguments.steps * batches) as bar:

        def request(some: Sequence[Job]) -> "Request":
            return plan.request(some, lambda info: (bar.update(), show(info)))

        record = records.recorder(opened, arguments)
        images = session.draw(opened, map(request, groups), arguments.batch, offload=arguments.offload)
        if mesh is not None and mesh.rank:
            for _ in images:  # They are the first process's to write.
                pass
            return
        writer.write(
            images,
            jobs,
            lambda some: record(request(some), image_settings.joint_settings(some, plan.settings)),
            out,
            single=single,
            timer=timer,
        )


class Plan(NamedTuple):
    """Settings that the images of a run share.

    size: width and height in pixels. settings: for their record. request: (jobs, on_step) -> the request of some.
    """

    size: tuple[int, int]
    settings: image_settings.Settings
    request: "Callable[[Sequence[Job], OnStep], Request]"


def plan_of(
    arguments: argparse.Namespace,
    opened: "Session",
    prompts: Sequence[str],
    size: tuple[int, int] | None,
    tile: tuple[int, int] | None,
) -> Plan:
    """The plan of the options, with start images, ControlNets' images and regions read; notes what prompts lose.

    size, tile: of --size and --tile. Raises ValueError for files that are no images, and sizes that cannot be drawn.
    """
    from functional_sd3.cli import session

    start = inputs.prepare(arguments, opened, size)
    size = (start.images.shape[-1], start.images.shape[-2]) if start else size
    size = session.image_size(opened, size, bounded=tile is None)
    control = controls.prepare(arguments, opened.config, opened.fetch, size, opened.dtype, opened.device)
    places = regions.prepare(arguments, size)
    texts = [*prompts, *(region.prompt for region in places), arguments.negative]
    session.note_truncated(opened, texts, arguments)
    prompt_words.note_mistakes(arguments, texts, opened.words)
    settings = {
        # An image is fitted again as it was: by its own size, or the one that was given.
        **({"size": arguments.size or "x".join(map(str, size))} if arguments.size or not start else {}),
        **options.settings(arguments),
        **inputs.settings(arguments),
        **regions.settings(arguments),
    }
    text = session.text_options(arguments)

    def request(jobs: "Sequence[Job]", on_step: "OnStep") -> "Request":
        run = session.sampling_options(opened, arguments, on_step, control)
        return _request(jobs, opened=opened, text=text, run=run, size=size, start=start, places=places, tile=tile)

    return Plan(size, settings, request)


def grouped(jobs: list[Job], arguments: argparse.Namespace) -> list[list[Job]]:
    """The jobs that a request holds: one batch, or with --offload, where every component is read once, all.

    With --long never of two prompts, since the longest would lengthen the context of the others.
    """
    groups = [list(group) for _, group in itertools.groupby(jobs, lambda job: job.prompt)] if arguments.long else [jobs]
    if arguments.offload:
        return groups
    size = arguments.batch
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def _request(
    jobs: Sequence[Job],
    *,
    opened: "Session",
    text: "TextOptions",
    run: "SamplingOptions",
    size: tuple[int, int],
    start: "StartImages | None",
    places: "Sequence[Region]",
    tile: tuple[int, int] | None,
) -> "Request":
    import torch

    from functional_sd3.core import prng
    from functional_sd3.pipeline import Request, Tiling, Variation

    variation = None
    if jobs[0].variation_seed is not None:
        keys = torch.stack([prng.key(job.variation_seed or 0) for job in jobs])
        variation = Variation(keys, torch.tensor([job.amount for job in jobs], dtype=torch.float32, device="cpu"))
    return Request(
        [job.prompt for job in jobs],
        torch.stack([prng.key(job.seed) for job in jobs]),
        text,
        run,
        height=size[1],
        width=size[0],
        variation=variation,
        start=start,
        regions=places,
        tiling=tile and Tiling(*tile),
        loras=opened.loras,
        words=opened.words,
    )


def jobs_of(prompts: list[str], arguments: argparse.Namespace) -> list[Job]:
    """The images of --seed, --count and --variation, prompt by prompt. Raises ValueError for seeds out of range."""
    if arguments.variation is None:
        numbers.seed(arguments.seed + arguments.count - 1, f"--seed and --count {arguments.count}: the last seed")
        return [Job(prompt, arguments.seed + index) for prompt in prompts for index in range(arguments.count)]
    seed, colon, amount = arguments.variation.partition(":")
    if not colon:
        raise ValueError(f"--variation {arguments.variation!r} must be SEED:AMOUNT, such as 7:0.2")
    variation_seed = numbers.seed(seed, f"--variation {arguments.variation}: the seed")
    share = numbers.number(amount, f"--variation {arguments.variation}: the amount")
    last = variation_seed + arguments.count - 1
    numbers.seed(last, f"--variation {seed} with --count {arguments.count}: the last seed")
    if not 0 <= share <= 1:
        raise ValueError(f"--variation {arguments.variation}: the amount must be between 0 and 1 (the other seed)")
    return [
        Job(prompt, arguments.seed, variation_seed + index, share)
        for prompt in prompts
        for index in range(arguments.count)
    ]
