"""Options that every command which draws has: the model, the words, the run, and where the images go."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from functional_sd3.cli import caching, controls, distilled, guidance, image_settings, lora_options, preview
from functional_sd3.cli.parser import suggestion as nearest
from functional_sd3.formats.printable import shorten

BATCH = 16
_RECORDED = (
    "negative", "steps", "cfg", "method", "rtol", "atol", "dtype", "params", "variant",
    "embedding", "weighted", "long", "lora", "cache", "without",
)  # fmt: skip


ADAPTIVE = ("bosh3", "dopri5", "tsit5")
METHODS = (
    "euler", "midpoint", "heun", "heun_edm", "ralston", "rk4", "dpmpp_2m", "unipc", "adams_bashforth_2",
    "adams_bashforth_3", "adams_bashforth_4", *ADAPTIVE, "euler_ancestral", "euler_renoised", "heun_churn",
    "flow_sde", "cps", "dance", "meanflow",
)  # fmt: skip
"""Names of `ode.NAMES`, known here without torch."""
ENCODERS = ("clip_l", "clip_g", "t5")
"""The text encoders: the fields of `weights.model.Tokenizers`, known here without torch."""
SHIPPED = ("tiny", "tiny-4")
"""Names of `weights.shipped.NAMES`, the default first, known here without torch."""
_MAX_SIDE = 100_000


def add_model(parser: argparse.ArgumentParser) -> None:
    add_params(parser)
    parser.add_argument(
        "--without",
        metavar="ENCODER",
        action="append",
        choices=ENCODERS,
        default=[],
        help="a text encoder to leave out, t5, clip_l or clip_g: zeros take the place of its output. Without t5 the "
        "released models take 9.5 GB less and follow the prompt less closely. May be repeated",
    )
    lora_options.add_arguments(parser)
    parser.add_argument(
        "--offload",
        action="store_true",
        help="hold one part of the model in memory at a time: each text encoder, the transformer, the VAE",
    )
    parser.add_argument(
        "--block-swap",
        metavar="N",
        type=int,
        action=_Swap,
        help="the last N blocks of the transformer and of each text encoder (all, of one that has fewer) stay on the "
        "host (on a CPU in their file), and so do weights that are used once; implies --offload",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the computation (default auto: on a CPU float32, or bfloat16 where the processor is faster at it "
        "and a wide model is stored in 16 bits; elsewhere what the weights are stored in)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")


class _Swap(argparse.Action):
    """--block-swap, which is of one component at a time."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.block_swap, namespace.offload = values, True


def add_params(parser: argparse.ArgumentParser) -> None:
    """--params, for every command that reads one model, which several paths may make up."""
    parser.add_argument(
        "--params",
        metavar="PATH",
        action="append",
        help="a folder or file of weights of any form; given several times, they are put together (default: the "
        "shipped tiny model; tiny-4 is its student of four steps)",
    )
    add_variant(parser)


def add_variant(parser: argparse.ArgumentParser) -> None:
    """--variant, for every command that reads a model."""
    parser.add_argument(
        "--variant", metavar="NAME", help="of the files in a folder of weights that has several, such as fp16"
    )


def add_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--negative", default="", metavar="TEXT", help="what to keep away from")
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="[WORD=]FILE",
        help="a textual inversion, or the folder of `train --inversion`; typed as WORD (default: as its file says, or "
        "the file's name in angle brackets). May be repeated",
    )
    parser.add_argument("--weighted", action="store_true", help="(words:1.3) weighs words of a prompt; \\( is itself")
    parser.add_argument("--long", action="store_true", help="let CLIP read prompts beyond its length, in chunks")


def add_batch(parser: argparse.ArgumentParser) -> None:
    """The option of the number of images drawn at once."""
    parser.add_argument("--batch", type=int, default=BATCH, help=f"images drawn at once (default {BATCH})")


def add_run(parser: argparse.ArgumentParser, *, steps: int | None = 28, cfg: float | None = 5.0) -> None:
    """Options of a run; steps, cfg: None where the command chooses (`edit`)."""
    for_steps, for_cfg = steps or "28; 50 with --direct", cfg or "5; 13.5 with --direct"
    parser.add_argument(
        "--steps",
        type=int,
        default=steps,
        action=distilled.Given,
        help=f"steps of the sampler (default {for_steps}, or what a distilled model was made for)",
    )
    parser.add_argument(
        "--cfg",
        type=float,
        default=cfg,
        action=distilled.Given,
        help=f"guidance scale; 1 or less for none (default {for_cfg}, or 1 where guidance is folded into the model)",
    )
    parser.add_argument(
        "--method",
        help="integrator: euler, heun, dpmpp_2m, unipc, dopri5, ... (default euler, or euler_renoised where the "
        "model's scheduler config says stochastic_sampling)",
    )
    for name in ("rtol", "atol"):
        parser.add_argument(
            f"--{name}", type=float, metavar="TOL", help="of bosh3, dopri5 and tsit5, which choose their own steps"
        )
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer's blocks first: for large images and many"
    )
    caching.add_arguments(parser)
    preview.add_arguments(parser)
    guidance.add_arguments(parser)
    controls.add_arguments(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The option whose image has the defaults of all others (`recorded.parse`)."""
    parser.add_argument(
        "--settings",
        metavar="IMAGE",
        help="an image that this program drew: its prompt and options, but for those that are given here",
    )


def add_size(parser: argparse.ArgumentParser, default: str = "the model's own") -> None:
    parser.add_argument("--size", metavar="WxH", help=f"in pixels, such as 1024x1024 (default: {default})")


def settings(arguments: argparse.Namespace) -> image_settings.Settings:
    """These options, for the settings in an image; another option is recorded by its name in `_RECORDED`."""
    return {
        **image_settings.given_options(arguments, _RECORDED),
        **guidance.settings(arguments),
        **controls.settings(arguments),
    }


def check_run(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options of a run that make no sense together; notes those that have no effect.

    Without torch, so that a mistyped word costs no time.
    """
    method = arguments.method or "euler"
    check_method(method)
    if method not in ADAPTIVE and (arguments.rtol is not None or arguments.atol is not None):
        raise ValueError(f"--rtol and --atol are for {', '.join(ADAPTIVE)}, not for --method {method}")
    check_params(arguments.params)
    check_without(arguments.without)
    check_swap(arguments)
    caching.check(arguments, ADAPTIVE)
    guidance.check(arguments)


def check_swap(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a --block-swap that makes no sense, alone or with another option."""
    if arguments.block_swap is None:
        return
    if getattr(arguments, "compile", False):
        raise ValueError("--block-swap copies a block's weights when it is computed, which --compile does not: leave "
                         "out one")  # fmt: skip
    if getattr(arguments, "mesh", None):
        raise ValueError("--block-swap is of one process, and --mesh divides a model over several: leave out one")


def check_without(names: Sequence[str]) -> None:
    """Raises ValueError where --without leaves no text encoder."""
    if set(names) == set(ENCODERS):
        raise ValueError(f"--without {', '.join(ENCODERS)} leaves no text encoder to read the prompts: keep one")


def check_file(path: str, what: str) -> None:
    """Raises ValueError, beginning with `what`, where an input is no file: what it is, or the nearest name."""
    if os.path.isfile(path):
        return
    if os.path.isdir(path):
        raise ValueError(f"{what} is no file: it is a folder")
    if os.path.lexists(path):
        raise ValueError(f"{what} is no file: it is a pipe, a device or a broken link")
    raise ValueError(f"{what} is no file{nearest(path, _neighbours(path))}")


def check_method(name: str | None) -> None:
    """Raises ValueError where there is no integrator of that name; None is the model's own."""
    if name is not None and name not in METHODS:
        near = nearest(name, METHODS)
        raise ValueError(f"--method {shorten(repr(name))} must be one of {', '.join(METHODS)}{near}")


def check_params(paths: Sequence[str] | None) -> None:
    """Raises ValueError for a --params that is not there, with the name that is nearest to it."""
    for path in paths or ():
        if path in SHIPPED or os.path.lexists(path):
            continue
        near = nearest(path, [*SHIPPED, *_neighbours(path)])
        raise ValueError(
            f"--params {shorten(path, 300)}: there is no such file or folder{near} "
            "(the shipped models are --params tiny and tiny-4; README.md says where the released ones are)"
        )


def _neighbours(path: str) -> list[str]:
    """Names of models beside a path that is not there, and in `params/`."""
    places = {Path(path).parent, Path("params")}
    return [str(entry) for place in sorted(places) if place.is_dir() for entry in sorted(place.iterdir())[:1000]]


def size(text: str | None) -> tuple[int, int] | None:
    """Width and height in pixels."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,12})[xX×]([0-9]{1,12})", text.strip())
    if not match:
        raise ValueError(f"--size {text!r} must be WIDTHxHEIGHT in pixels, such as 1024x768")
    sides = int(match[1]), int(match[2])
    if not 0 < min(sides) <= max(sides) <= _MAX_SIDE:
        raise ValueError(f"--size {shorten(text)}: width and height must be from 1 to {_MAX_SIDE:,} pixels")
    return sides
