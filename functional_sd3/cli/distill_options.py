"""Options of `functional-sd3 distill`, and what is wrong with them before anything is loaded."""

import argparse
import math
from typing import Any

from functional_sd3.cli import memory_options, mesh_options, options, output, run_options
from functional_sd3.training.distill_options import METHODS, OPTIONS, Option, foreign, listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--to", type=int, required=True, metavar="STEPS", help="steps that the student draws in, at most 1,000")
    run_options.add(parser, out=None)
    options.add_params(parser)
    add("--method", choices=METHODS, default="segments", help="what the student learns (default segments)")
    run_options.add(parser, data="shapes", lora=None, steps=400, batch_size=48)
    add("--cfg", type=float, help="guidance scale that is folded in, 1 for none (default 5; 1 where it is already)")
    for name, option in OPTIONS.items():
        words = {"action": "store_true", "default": None} if option.kind is bool else _valued(option)
        add(f"--{name.replace('_', '-')}", help=_help(option), **words)
    add("--shift", type=float, help="of the student's even grid towards noise (default 3)")
    run_options.add(parser, lr=2e-4, warmup=20, ema=0.98, seed=None, resume=None, force=None, accumulate=None)
    run_options.add_images(parser, pictures=4096)
    run_options.add(parser, save_every=50, log_every=10, sample_every=50, result_every=None)
    computed = "of the teacher's computation (default: what the model is stored in where the device computes that well)"
    add("--teacher-dtype", choices=("float32", "bfloat16"), help=computed)
    add("--dtype", choices=("float32", "bfloat16"), help="of the student's computation (default float32)")
    run_options.add(parser, device=None)
    memory_options.add_arguments(parser)
    mesh_options.add_arguments(parser)


def _valued(option: Option) -> dict[str, Any]:
    return {"type": option.kind, "metavar": option.metavar}


def _help(option: Option) -> str:
    """The methods that have the option, what it is, and its default."""
    methods: dict[Any, list[str]] = {}
    for method, default in option.defaults.items():
        methods.setdefault(default, []).append(method)
    names = ", ".join(option.defaults)
    if option.kind is bool:
        return f"of {names}: {option.help}"
    each = "; ".join(
        f"{default:g}" + (f" of {listed(of)}" if len(methods) > 1 else "") for default, of in methods.items()
    )
    return f"of {names}: {option.help} (default {each})"


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an option, or options together, that make no sense, and for data that is not there."""
    if arguments.cfg is not None and not 1 <= arguments.cfg < math.inf:
        raise ValueError(f"--cfg {arguments.cfg} must be at least 1, which is no guidance")
    if arguments.batch_size % arguments.accumulate:
        raise ValueError(
            f"--batch-size {arguments.batch_size} cannot be taken in {arguments.accumulate} equal parts (--accumulate)"
        )
    run_options.check_images(arguments)
    if arguments.force and not arguments.resume:
        raise ValueError("--force is for --resume: it lets a run go on with other options, weights or images")
    for name in foreign(arguments.method, vars(arguments)):
        owners = listed(list(OPTIONS[name].defaults))
        raise ValueError(f"--{name.replace('_', '-')} is for --method {owners}, not for {arguments.method}")
    options.check_params(arguments.params)
    output.check_folder(arguments.out)
