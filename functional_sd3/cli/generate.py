"""Draw pictures of prompts."""

import argparse
import sys
from pathlib import Path

from functional_sd3.cli import controls, inputs, options, regions, written
from functional_sd3.cli.timing import Timer, progress
from functional_sd3.cli.written import Job

HELP = "draw pictures of prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to draw; several give a picture each")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with a prompt on each line")
    options.add_words(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture of a prompt (default 0)")
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt, with successive seeds")
    parser.add_argument(
        "--variation",
        metavar="SEED:AMOUNT",
        help="move the noise towards that of another seed, by an amount in [0, 1]; --count then gives more such seeds",
    )
    inputs.add_arguments(parser)
    regions.add_arguments(parser)
    options.add_size(parser, "that of --image, or the model's own")
    options.add_run(parser)
    options.add_model(parser)
    parser.add_argument(
        "--batch", type=int, default=options.BATCH, help=f"pictures drawn at once (default {options.BATCH})"
    )
    parser.add_argument(
        "--out",
        metavar="FILE-or-DIR",
        help="a .png file (several pictures become a grid), or a folder for one file a picture (default: out/)",
    )


def run(arguments: argparse.Namespace) -> int:
    timer = Timer()
    prompts, size = _prompts(arguments), options.size(arguments.size)
    options.check_counts(arguments, "steps", "count", "batch")
    inputs.check(arguments)
    jobs, tile = _jobs(prompts, arguments), regions.check(arguments)
    out, single = options.out(arguments.out)

    from functional_sd3.cli import drawing, runtime, session

    opened = session.start(arguments, timer)
    begun = inputs.prepare(arguments, opened, size)
    size = session.picture_size(opened, begun.size if begun else size, bounded=tile is None)
    control = controls.prepare(arguments, opened.config, opened.fetch, size, opened.dtype, opened.device)
    asked = regions.prepare(arguments, opened, size)
    timer.done("load")
    texts = [*prompts, *(regions.parse(text).prompt for text in arguments.region), arguments.negative]
    session.note_truncated(opened, texts, arguments)

    settings = {
        # A picture is fitted again as it was: by its own size, or the one that was asked for.
        **({"size": arguments.size or "x".join(map(str, size))} if arguments.size or not begun else {}),
        **options.settings(arguments),
        **inputs.settings(arguments),
        **regions.settings(arguments),
    }
    batches = drawing.batches(jobs, arguments.batch, alone=arguments.long)
    with progress(arguments.steps * len(batches)) as bar:
        run = drawing.Run(opened, size, control, bar, begun, asked, tile)
        images = (drawing.offloaded if arguments.offload else drawing.together)(run, batches, arguments)
    runtime.check_finite(images)
    paths = (written.write_grid if single else written.write_each)(out, images, jobs, settings)
    timer.done("write")
    for path in paths:
        print(path)
    print(timer.summary(), file=sys.stderr)
    return 0


def _jobs(prompts: list[str], arguments: argparse.Namespace) -> list[Job]:
    if arguments.variation is None:
        return [Job(prompt, arguments.seed + index) for prompt in prompts for index in range(arguments.count)]
    seed, _, amount = arguments.variation.partition(":")
    try:
        towards, share = int(seed), float(amount)
    except ValueError:
        raise ValueError(f"--variation {arguments.variation!r} must be SEED:AMOUNT, such as 7:0.2") from None
    if not 0 <= share <= 1:
        raise ValueError(f"--variation {arguments.variation}: the amount must be between 0 and 1 (the other seed)")
    return [
        Job(prompt, arguments.seed, towards + index, share) for prompt in prompts for index in range(arguments.count)
    ]


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts:
        try:
            lines = Path(arguments.prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {arguments.prompts} is not UTF-8 text: {error}") from None
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts {arguments.prompts} holds no prompts")
    if not prompts:
        raise ValueError('no prompt; try: functional-sd3 generate "a large red circle on a white background"')
    return prompts
