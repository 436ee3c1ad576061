"""A page of how an image came to be: tokens, times, steps, attention of every word, norms; or plots of logs."""

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from functional_sd3.cli import (
    generate,
    image_settings,
    inputs,
    options,
    output,
    preview,
    regions,
    report,
)
from functional_sd3.cli.parser import subparser
from functional_sd3.cli.timing import Timer, progress

if TYPE_CHECKING:
    from functional_sd3.cli.image_settings import Job

HELP = "a page of how an image came to be: tokens, steps, attention; or plots of a training"
OUT = "out/look"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    parser.add_argument(
        "--attention-steps",
        type=int,
        default=8,
        metavar="N",
        help="steps of which the maps of attention are computed, evenly spaced; 0 for none (default 8)",
    )
    parser.add_argument(
        "--attention-blocks", metavar="I,I,...", help="blocks of which the maps are computed, from 0 (default: all)"
    )
    parser.add_argument(
        "--image-steps", type=int, metavar="N", help="steps that are shown as images, evenly spaced (default: all)"
    )
    parser.add_argument(
        "--log",
        action="append",
        default=[],
        metavar="FILE",
        help="instead of an image: plots of the log.csv of a training, or of the folder it is in; several are compared",
    )
    options.add_settings(parser)
    generate.add_image(parser)
    parser.set_defaults(count=1, batch=1)
    parser.add_argument(
        "--out", default=OUT, metavar="DIR", help=f"a folder for the page and its PNGs (default: {OUT}/)"
    )


def run(arguments: argparse.Namespace) -> int:
    timer = Timer()
    out = folder(arguments.out)
    if arguments.log:
        return _look_at_logs(arguments, out)
    blocks = attention_blocks(arguments.attention_blocks)
    if blocks is not None and arguments.attention_steps == 0:
        raise ValueError("--attention-blocks needs maps of attention, and --attention-steps 0 is none of them")
    if arguments.prompt is None:
        raise ValueError('no prompt; try: functional-sd3 look "a large red circle on a white background"')
    size, tile = options.size(arguments.size), regions.check(arguments)
    inputs.check(arguments)
    options.check_run(arguments)
    preview.check(arguments, out, single=False)
    (job,) = generate.jobs_of([arguments.prompt], arguments)
    check_plots()
    _look(arguments, timer, job, size, tile, blocks, out)
    report.message(timer.summary())
    return 0


def _look_at_logs(arguments: argparse.Namespace, out: Path) -> int:
    usual = vars(subparser("look").parse_args([]))
    given = [name for name, value in vars(arguments).items() if name in usual and value != usual[name]]
    if others := [name for name in given if name not in ("log", "out")]:
        named = " and ".join("PROMPT" if name == "prompt" else f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(f"--log plots logs and draws no image: leave out {named}, or --log")
    check_plots()
    from functional_sd3 import look

    for path in look.save_logs(out, [look.read_log(path) for path in arguments.log]):
        report.say(path)
    return 0


def _look(
    arguments: argparse.Namespace,
    timer: Timer,
    job: "Job",
    size: tuple[int, int] | None,
    tile: tuple[int, int] | None,
    blocks: tuple[int, ...] | None,
    out: Path,
) -> None:
    from functional_sd3 import look
    from functional_sd3.cli import records, session
    from functional_sd3.look import sheets

    opened = session.open_session(arguments, timer)
    plan = generate.plan_of(arguments, opened, [job.prompt], size, tile)
    show = preview.prepare(arguments, opened, out, single=False)
    timer.done("load")
    with progress(arguments.steps) as bar:
        request = plan.request([job], lambda info: (bar.update(), show(info)))
        made = look.trace_request(
            opened.fetch,
            opened.config,
            opened.tokenizers,
            # The components of the session have its LoRAs and words.
            session.without_adapters(request),
            attention_steps=arguments.attention_steps,
            attention_blocks=blocks,
            image_steps=arguments.image_steps,
        )
    timer.done("drawing and maps", opened.device)
    timer.stage = "writing the page"
    record = records.recorder(opened, arguments)(request, image_settings.joint_settings([job], plan.settings))
    image = output.encoded(sheets.to_pil(made.image), ".png", record)
    for path in look.save(out, made, image=image):
        report.say(path)
    timer.done("page")


def folder(text: str) -> Path:
    """The folder that --out is. Raises ValueError for what is or looks like a file."""
    path = Path(text)
    if not text.strip() or path.suffix.lower() in (".html", ".htm", *output.IMAGES):
        raise ValueError(f"--out {text!r} must be a folder, such as look/: its page is index.html, beside its PNGs")
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {text} is a file; a folder is needed, such as look/")
    output.check_writable(path)
    return path


def attention_blocks(text: str | None) -> tuple[int, ...] | None:
    """The blocks of --attention-blocks; None where it is not given."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 10 for word in words):
        raise ValueError(f"--attention-blocks {text!r} must be numbers of blocks with commas between, such as 0,3")
    return tuple(sorted({int(word) for word in words}))


def check_plots() -> None:
    """Raises ValueError where matplotlib is not installed, before anything is drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            'look draws with matplotlib, which is not installed: pip install "functional_sd3[look]" (or matplotlib)'
        )
