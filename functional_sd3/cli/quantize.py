"""Store a model's weights in one byte each, and say what that costs."""

import argparse
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from functional_sd3.cli import options, output, report

if TYPE_CHECKING:
    import torch

    from functional_sd3.cli.quantize_trial import Trial
    from functional_sd3.core.types import Params
    from functional_sd3.weights.merge import Change
    from functional_sd3.weights.model import Model

HELP = "store weights in one byte each, and say what that costs"
FORMATS = ("int8", "float8")
PROMPTS = ("a large red circle on a white background", "a lighthouse in fog", "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="PATH", help="weights of any form")
    options.add_variant(parser)
    add("--format", choices=FORMATS, default="int8", help="of the weights inside blocks (default int8)")
    add("--part", nargs="+", metavar="NAME", default=("transformer",), help="components (default transformer)")
    add("--compute", choices=FORMATS, help="products of it, too: of int8 on CPUs that have instructions for them, of "
        "float8 on GPUs of Nvidia's from Ada on")  # fmt: skip
    add("--limit", type=float, default=0.05, metavar="ERROR", help="with --compute: layers whose products are off by "
        "more keep floats for them (default 0.05)")  # fmt: skip
    add("--keep", nargs="+", default=(), metavar="PATTERN", help="weights that stay floats, such as "
        "'transformer.blocks.0.*' or '*.modulation.weight'")  # fmt: skip
    add("--max-error", type=float, metavar="ERROR", help="relative error of the velocity of the run (see --prompt, "
        "--steps), 0.03 say: weights of the transformer stay floats, worst first, until it is below")  # fmt: skip
    add("--out", metavar="PATH", help="a .safetensors file or a folder for the result; without it, only report")
    add("--prompt", nargs="+", metavar="TEXT", default=PROMPTS, help="what the velocity is compared for")
    add("--steps", type=int, default=4, help="of the run along which it is compared (default 4; 0: do not)")
    add("--all", action="store_true", help="a line for every weight, not for every layer")
    add("--device", default="auto", help="auto, cpu, cuda or mps")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    import torch

    from functional_sd3 import weights
    from functional_sd3.cli import runtime
    from functional_sd3.cli.quantize_trial import Trial
    from functional_sd3.core import tree
    from functional_sd3.weights import quantize

    dtype = {"int8": torch.int8, "float8": torch.float8_e4m3fn}[arguments.format]
    model = weights.load(arguments.model, dtype="stored", variant=arguments.variant)
    runtime.require(model, arguments.part, Path(arguments.model))
    for part in weights.describe(arguments.model, variant=arguments.variant, values=False).parts:
        if part.component in arguments.part and (part.scaled or part.blocks):
            report.note(f"{part.component} is stored in few bits already: what that rounded away is no error here")
    stored = {name: _quantized(name, model.params[name], dtype, arguments) for name in arguments.part}
    trial = Trial.of(model, arguments) if arguments.steps and ("transformer" in stored or arguments.compute) else None
    for name, params in stored.items():
        before, after = (tree.nbytes(each) / 2**20 for each in (model.params[name], params))
        report.say(f"{name}: {before:,.1f} MiB -> {after:,.1f} MiB")
        for place, error in _rows(quantize.errors({name: model.params[name]}, {name: params}), arguments.all):
            report.say(f"  {place:50} relative error {error:.2e}")
        if arguments.compute:
            stored[name] = _with_good_products(name, params, trial, arguments)
    notes: dict[str, str] = {}
    if "transformer" in stored and trial:
        if arguments.max_error is not None:
            stored["transformer"], notes = _within_budget(model, stored["transformer"], trial, arguments)
        trial.report_velocity(stored["transformer"])
    if arguments.out is not None:
        saved = model._replace(params={**model.params, **stored})
        weights.save(arguments.out, saved, layout="native", notes=notes)
        report.say(arguments.out)
        if Path(arguments.out).is_file() and any(tables is not None for tables in model.tokenizers):
            report.say("tokenizers are not in the file: keep their folders, and pass them beside it")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        output.check_weights(arguments.out)
    if arguments.steps < 0:
        raise ValueError(f"--steps {arguments.steps} must be at least 0")
    if arguments.compute and arguments.format != arguments.compute:
        compute = arguments.compute
        raise ValueError(f"--compute {compute} needs weights of --format {compute}, not {arguments.format}")
    if not arguments.limit > 0:
        raise ValueError(f"--limit {arguments.limit:g} must be above 0")
    if arguments.max_error is None:
        return
    if not 0 < arguments.max_error < math.inf:
        raise ValueError(f"--max-error {arguments.max_error:g} must be above 0")
    if "transformer" not in arguments.part:
        raise ValueError("--max-error is of the transformer's velocity: add --part transformer")
    if not arguments.steps:
        raise ValueError("--max-error is measured along a run, which --steps 0 leaves out: --steps 4, say")


def _quantized(name: str, params: "Params", dtype: "torch.dtype", arguments: argparse.Namespace) -> "Params":
    from functional_sd3.weights import quantize

    # Patterns are of whole paths: the component before the path within it.
    return quantize.quantize({name: params}, dtype, keep=arguments.keep, compute=arguments.compute)[name]


def _within_budget(
    model: "Model", params: "Params", trial: "Trial", arguments: argparse.Namespace
) -> "tuple[Params, dict[str, str]]":
    """The transformer within --max-error, and the notes of its file: the errors, and what stays floats for which."""
    from functional_sd3.core import tree
    from functional_sd3.weights import error_budget

    limit, floats = arguments.max_error, model.params["transformer"]
    budget = error_budget.within_error(floats, params, trial.velocity_error, limit)
    for path, error in budget.kept.items():
        report.say(f"  {'transformer.' + path:50} stays {tree.flatten_paths(floats)[path].dtype}: the velocity is off "
            f"by {error:.2e} by it alone")  # fmt: skip
    numbers = {path: leaf.numel() for path, leaf in tree.flatten_paths(budget.params).items()}
    held = sum(count for path, count in numbers.items() if path in tree.flatten_paths(floats))
    narrow = sum(leaf.numel() for leaf in tree.leaves(budget.params) if leaf.dtype.itemsize == 1)
    summary = (
        f"{arguments.format}{' with products' if arguments.compute else ''}: the velocity is off by {budget.error:.2e} "
        f"(--max-error {limit:g}; {budget.before:.2e} before {len(budget.kept)} weights were kept in floats), over "
        f"{arguments.steps} steps of {len(trial.prompts)} prompts; {narrow / held:.0%} of the numbers take one byte"
    )
    report.say(f"transformer: {summary}")
    kept = ", ".join(f"{path} {error:.1e}" for path, error in budget.kept.items())
    return budget.params, {"quantization": summary, "quantization_kept": kept or "nothing"}


def _with_good_products(name: str, params: "Params", trial: "Trial | None", arguments: argparse.Namespace) -> "Params":
    """The component without the products whose error is above --limit, with a note of their number."""
    from functional_sd3.core import tree
    from functional_sd3.weights import quantize
    from functional_sd3.weights.product_errors import product_errors

    if trial is not None:
        errors = product_errors(trial.model.params[name], params, lambda leaves: trial.run(name, leaves))
        for place, error in _grouped(((f"{name}.{path}", error) for path, error in errors.items()), arguments.all):
            report.say(f"  {place:50} products of {arguments.compute}: relative error {error:.2e}")
        bad = {path: error for path, error in errors.items() if not error <= arguments.limit}
        for path, error in bad.items():
            what = f"{name}.{path}: products of {arguments.compute}"
            report.note(f"{what} are off by {error:.2e}, above --limit: computed in floats")
        params = quantize.without_products(params, bad)
    paths = tree.flatten_paths(params)
    count, others = (sum(path.endswith(end) for path in paths) for end in (f".{arguments.compute}_scale", ".scale"))
    small = f"weights below {quantize.SMALLEST_PRODUCT:,} numbers, modulations, convolutions, what is above --limit"
    floats = f", of floats in {others} ({small})" if others else ""
    report.say(f"{name}: products of {arguments.compute} in {count} layers{floats}")
    return params


def _rows(errors: "Iterable[Change]", every: bool) -> Iterable[tuple[str, float]]:
    return _grouped(((row.path, row.relative) for row in errors), every)


def _grouped(errors: Iterable[tuple[str, float]], every: bool) -> Iterator[tuple[str, float]]:
    """(path, relative error); of a layer, the root mean square over its weights."""
    from functional_sd3.weights import merge

    grouped: dict[str, list[float]] = {}
    for path, error in errors:
        grouped.setdefault(path if every else merge.layer(path), []).append(error**2)
    for place, squares in grouped.items():
        yield place, (sum(squares) / len(squares)) ** 0.5
