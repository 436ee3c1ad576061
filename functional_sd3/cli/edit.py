"""Change an image from what one prompt describes to what another describes, keeping the rest of it."""

import argparse
import re
from typing import TYPE_CHECKING

from functional_sd3.cli import (
    controls,
    guidance,
    image_settings,
    inputs,
    options,
    output,
    preview,
    prompt_words,
    report,
)
from functional_sd3.cli.timing import Timer, progress

if TYPE_CHECKING:
    from functional_sd3.pipeline import FlowEdit, InversionEdit

HELP = "change an image from one prompt to another"
DEFAULTS = {"steps": 28, "cfg": 5.0, "source_cfg": 1.0, "eta": 0.9, "window": "0-0.25"}
"""Defaults of `pipeline.edit`, known here without torch."""
DIRECT_DEFAULTS = {"steps": 50, "cfg": 13.5, "source_cfg": 3.5, "strength": 0.66}
"""Defaults of `pipeline.flow_edit`."""
_RECORDED = ("seed", "size", "eta", "window", "source_cfg", "exact", "direct", "strength")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="the image")
    parser.add_argument("--from", dest="source", metavar="PROMPT", required=True, help="a prompt of what it shows")
    parser.add_argument("--to", dest="target", metavar="PROMPT", required=True, help="a prompt of what it is to show")
    parser.add_argument(
        "--eta", type=float, help="in [0, 1], how much the way back is pulled to the image (default 0.9)"
    )
    parser.add_argument(
        "--window", metavar="START-END", help="when it is pulled so, as fractions of the run (default 0-0.25)"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="solve each step back to noise for where it started, at several evaluations a step",
    )
    parser.add_argument(
        "--direct",
        action="store_true",
        help="FlowEdit: follow the difference of the prompts' flows from the image, without going back to noise",
    )
    parser.add_argument("--strength", type=float, help="with --direct: the part of the steps taken (default 0.66)")
    parser.add_argument("--source-cfg", type=float, help="guidance scale of --from (default 1; 3.5 with --direct)")
    parser.add_argument("--seed", type=int, default=0, help="with --direct: of its noise (default 0)")
    options.add_size(parser, "that of the image")
    options.add_words(parser)
    options.add_run(parser, steps=None, cfg=None)
    options.add_model(parser)
    parser.add_argument("--out", metavar="FILE-or-DIR", help="a .png, .jpg or .webp file, or a folder (default: out/)")


def run(arguments: argparse.Namespace) -> int:
    timer = Timer()
    size = options.size(arguments.size)
    _check(arguments)
    options.check_file(arguments.image, arguments.image)
    options.check_run(arguments)
    if arguments.source_cfg is not None and arguments.source_cfg < 1:
        report.note(f"--source-cfg {arguments.source_cfg:g} is no guidance, as every scale up to 1")
    out, single = output.destination(arguments.out)
    preview.check(arguments, out, single=single)

    from functional_sd3 import pipeline
    from functional_sd3.cli import records, runtime, session
    from functional_sd3.core import prng
    from functional_sd3.flow import ode
    from functional_sd3.flow.ode import fixed_point
    from functional_sd3.image import pixels
    from functional_sd3.pipeline import Request, StartImages

    arguments.inverts = not arguments.direct
    opened = session.open_session(arguments, timer)
    image = inputs.fitted_image(arguments.image, opened, size)
    shown = session.image_size(opened, (image.shape[-1], image.shape[-2]))
    control = controls.prepare(arguments, opened.config, opened.fetch, shown, opened.dtype, opened.device)
    show = preview.prepare(arguments, opened, out, single=single)
    timer.done("load")
    texts = [arguments.source, arguments.target, arguments.negative]
    session.note_truncated(opened, texts, arguments)
    prompt_words.note_mistakes(arguments, texts, opened.words)
    if single:
        output.check_fits(out, *shown)
    with timer.named_failures(), progress((1 if arguments.direct else 2) * arguments.steps) as bar:
        # A run that draws noise at its steps leads nowhere twice, hence Euler's method.
        usual = pipeline.default_method(opened.config)
        default = "euler" if usual in ode.STOCHASTIC else usual
        run = session.sampling_options(
            opened, arguments, lambda info: (bar.update(), show(info)), control, default=default
        )
        request = Request(
            arguments.target,
            prng.key(arguments.seed)[None],
            session.text_options(arguments),
            run,
            start=StartImages(image, arguments.strength if arguments.direct else 1.0),
            edit=_edit(arguments),
            loras=opened.loras,
            words=opened.words,
        )
        record = records.recorder(opened, arguments)(request, _settings(arguments))
        try:
            (images,) = session.draw(opened, [request], 1, offload=arguments.offload)
        except fixed_point.InversionFailed as error:
            advice = "use more --steps or a lower --source-cfg, or leave out --exact"
            raise ValueError(f"--exact: {error.finding}; {advice}") from None
    runtime.check_finite(images)
    edited = pixels.to_pil(images)[0]
    if single:
        output.save(out, edited, record)
    else:
        out = output.save_new(out, f"{output.slug(arguments.target)}-edited", edited, record)
    timer.done("write")
    report.say(out)
    report.message(timer.summary())
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Give options that are absent their values; raise ValueError for those that make no sense."""
    for name in ("eta", "strength"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{name} {value} must be between 0 and 1")
    if arguments.direct and (arguments.eta is not None or arguments.window or arguments.exact):
        raise ValueError("--eta, --window and --exact are of the way to noise and back, which --direct does not go")
    if not arguments.direct and arguments.strength is not None:
        raise ValueError("--strength needs --direct: without it the image goes all the way to noise")
    if arguments.window:
        _window(arguments.window)
    for name, value in (DIRECT_DEFAULTS if arguments.direct else DEFAULTS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def _edit(arguments: argparse.Namespace) -> "InversionEdit | FlowEdit":
    from functional_sd3.flow.ode import fixed_point
    from functional_sd3.pipeline import FlowEdit, InversionEdit

    source, scale = [arguments.source], guidance.scale(arguments.source_cfg)
    if arguments.direct:
        return FlowEdit(source, scale)
    inversion = fixed_point.inverse if arguments.exact else None
    return InversionEdit(source, scale, arguments.eta, _window(arguments.window), inversion)


def _window(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"([0-9.]+)-([0-9.]+)", text)
    try:
        start, end = map(float, match.groups() if match else ())
    except ValueError:
        raise ValueError(f"--window {text!r} must be START-END, such as 0-0.25") from None
    if not start <= end <= 1:
        raise ValueError(f"--window {text} must be START <= END <= 1: fractions of the run")
    return start, end


def _settings(arguments: argparse.Namespace) -> image_settings.Settings:
    first = {"subcommand": "edit", "picture": arguments.image, "from": arguments.source, "to": arguments.target}
    return {**first, **image_settings.given_options(arguments, _RECORDED), **options.settings(arguments)}
