"""Draw images of prompts."""

import argparse

from functional_sd3.cli import controls, inputs, numbers, options, output, prompt_words, regions, report
from functional_sd3.cli.timing import Timer, progress
from functional_sd3.cli.written import Job

HELP = "draw images of prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to draw; several give an image each")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a text file with a prompt on each line; - for standard input"
    )
    options.add_words(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image of a prompt (default 0)")
    parser.add_argument("--count", type=int, default=1, help="images of each prompt, with successive seeds")
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
        "--batch", type=int, default=options.BATCH, help=f"images drawn at once (default {options.BATCH})"
    )
    parser.add_argument(
        "--out",
        metavar="FILE-or-DIR",
        help="a .png, .jpg or .webp file (several images become a grid), or a folder for one file an image "
        "(default: out/)",
    )


def run(arguments: argparse.Namespace) -> int:
    timer = Timer()
    size, tile = options.size(arguments.size), regions.check(arguments)
    inputs.check(arguments)
    options.check_run(arguments)
    out, single = output.destination(arguments.out)
    prompts = prompt_words.listed(arguments.prompt, arguments.prompts)
    jobs = _jobs(prompts, arguments)
    prompt_words.note_missing_quotes(arguments.prompt)

    from functional_sd3.cli import drawing, session, writer

    opened = session.start(arguments, timer)
    begun = inputs.prepare(arguments, opened, size)
    size = session.picture_size(opened, begun.size if begun else size, bounded=tile is None)
    if single:
        writer.check_fits(out, size, len(jobs))
    control = controls.prepare(arguments, opened.config, opened.fetch, size, opened.dtype, opened.device)
    asked = regions.prepare(arguments, opened, size)
    timer.done("load")
    texts = [*prompts, *(regions.parse(text).prompt for text in arguments.region), arguments.negative]
    session.note_truncated(opened, texts, arguments)
    prompt_words.note_unknown(arguments, texts)

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
        batches_of_images = (drawing.offloaded if arguments.offload else drawing.together)(run, batches, arguments)
        writer.write(batches_of_images, jobs, settings, out, single=single, timer=timer)
    report.message(timer.summary())
    return 0


def _jobs(prompts: list[str], arguments: argparse.Namespace) -> list[Job]:
    if arguments.variation is None:
        numbers.seed(arguments.seed + arguments.count - 1, f"--seed and --count {arguments.count}: the last seed")
        return [Job(prompt, arguments.seed + index) for prompt in prompts for index in range(arguments.count)]
    seed, colon, amount = arguments.variation.partition(":")
    if not colon:
        raise ValueError(f"--variation {arguments.variation!r} must be SEED:AMOUNT, such as 7:0.2")
    towards = numbers.seed(seed, f"--variation {arguments.variation}: the seed")
    share = numbers.number(amount, f"--variation {arguments.variation}: the amount")
    numbers.seed(towards + arguments.count - 1, f"--variation {seed} with --count {arguments.count}: the last seed")
    if not 0 <= share <= 1:
        raise ValueError(f"--variation {arguments.variation}: the amount must be between 0 and 1 (the other seed)")
    return [
        Job(prompt, arguments.seed, towards + index, share) for prompt in prompts for index in range(arguments.count)
    ]
