"""Options that every command which draws has: the model, the words, the run, and where the pictures go."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from functional_sd3.cli import controls, guidance, lora_options, written

BATCH = 16
_RECORDED = (
    "negative", "steps", "cfg", "method", "rtol", "atol", "dtype", "params", "embedding", "weighted", "long", "lora",
)  # fmt: skip


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--params",
        metavar="PATH",
        action="append",
        help="a folder or file of weights of any form; given several times, they are put together (default: the "
        "shipped tiny model)",
    )
    lora_options.add_arguments(parser)
    parser.add_argument(
        "--offload",
        action="store_true",
        help="hold one part of the model in memory at a time: each text encoder, the transformer, the VAE",
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")


def add_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--negative", default="", metavar="TEXT", help="what to keep away from")
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="[WORD=]FILE",
        help="a textual inversion; typed as WORD, or as the file's name in angle brackets. May be repeated",
    )
    parser.add_argument("--weighted", action="store_true", help="(words:1.3) weighs words of a prompt; \\( is itself")
    parser.add_argument("--long", action="store_true", help="let CLIP read prompts beyond its length, in chunks")


def add_run(parser: argparse.ArgumentParser, *, steps: int = 28, cfg: float = 5.0) -> None:
    parser.add_argument("--steps", type=int, default=steps, help=f"steps of the sampler (default {steps})")
    parser.add_argument("--cfg", type=float, default=cfg, help=f"guidance scale, 1 for none (default {cfg:g})")
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
        "--compile", action="store_true", help="compile the transformer's blocks first: for large pictures and many"
    )
    guidance.add_arguments(parser)
    controls.add_arguments(parser)


def add_size(parser: argparse.ArgumentParser, default: str = "the model's own") -> None:
    parser.add_argument("--size", metavar="WxH", help=f"in pixels, such as 1024x1024 (default: {default})")


def settings(arguments: argparse.Namespace) -> written.Settings:
    """What a picture keeps of these options; another option is recorded by its name in `_RECORDED`."""
    return {**written.given(arguments, _RECORDED), **guidance.settings(arguments), **controls.settings(arguments)}


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """ValueError where one of these options is below 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} must be at least 1")


def size(text: str | None) -> tuple[int, int] | None:
    """Width and height in pixels."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip())
    if not match:
        raise ValueError(f"--size {text!r} must be WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(match[1]), int(match[2])


def out(text: str | None, suffixes: Sequence[str] = (".png",)) -> tuple[Path, bool]:
    """Where to write, and whether it is one file; fails before the work when nothing can be written there."""
    path = Path(text) if text else Path("out")
    single = path.suffix.lower() in suffixes
    written.check_writable(path.parent if single else path)
    return path, single
