"""Store a model's weights in one byte each, and say what that costs."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from functional_sd3.cli import options, output, report

if TYPE_CHECKING:
    from torch import Tensor

    from functional_sd3.core.types import Params
    from functional_sd3.weights.merge import Change
    from functional_sd3.weights.model import Model

HELP = "store weights in one byte each, and say what that costs"
FORMATS = ("int8", "float8")
PROMPTS = ("a large red circle on a white background", "a lighthouse in fog", "")
ENCODERS = ("clip_l", "clip_g", "t5")


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
    from functional_sd3.core import tree
    from functional_sd3.weights import quantize

    dtype = {"int8": torch.int8, "float8": torch.float8_e4m3fn}[arguments.format]
    model = weights.load(arguments.model, dtype="stored", variant=arguments.variant)
    runtime.require(model, arguments.part, Path(arguments.model))
    stored = {name: quantize.quantize(model.params[name], dtype, compute=arguments.compute) for name in arguments.part}
    trial = _Trial.of(model, arguments) if arguments.steps and ("transformer" in stored or arguments.compute) else None
    for name, params in stored.items():
        before, after = (tree.nbytes(each) / 2**20 for each in (model.params[name], params))
        report.say(f"{name}: {before:,.1f} MiB -> {after:,.1f} MiB")
        for place, error in _rows(quantize.errors({name: model.params[name]}, {name: params}), arguments.all):
            report.say(f"  {place:50} relative error {error:.2e}")
        if arguments.compute:
            stored[name] = _with_good_products(name, params, trial, arguments)
    if "transformer" in stored and trial:
        _report_velocity(model, stored["transformer"], trial)
    if arguments.out is not None:
        weights.save(arguments.out, model._replace(params={**model.params, **stored}), layout="native")
        report.say(arguments.out)
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


class _Trial(NamedTuple):
    """A run along which errors are measured: float32 parameters, noise, times, and the prompts' conditioning."""

    model: "Model"
    noise: "Tensor"
    sigmas: "Tensor"
    conditioning: tuple["Tensor", "Tensor"]
    prompts: list[str]

    @classmethod
    def of(cls, model: "Model", arguments: argparse.Namespace) -> "_Trial":
        import torch

        from functional_sd3 import pipeline
        from functional_sd3.cli import runtime
        from functional_sd3.core import prng, tree

        device, prompts = runtime.device(arguments.device), list(arguments.prompt)
        wide = {name: tree.to(tree.cast(part, torch.float32), device) for name, part in model.params.items()}
        model = model._replace(params=wide)
        with torch.no_grad():
            conditioning = pipeline.encode(_encoders(wide), model.config, model.tokenizers, prompts).positive
        noise = pipeline.initial_noise(prng.key(0), model.config, len(prompts), device=device)
        sigmas = pipeline.sigmas(model.config, noise, arguments.steps)
        return cls(model, noise, sigmas, (conditioning.context, conditioning.pooled), prompts)

    def run(self, name: str, params: "Params") -> None:
        """Computes what the component `name`, with these parameters, is there for."""
        from functional_sd3 import pipeline
        from functional_sd3.layouts.components import require
        from functional_sd3.transformer import mmdit

        wide, config = self.model.params, self.model.config
        if name in ENCODERS:
            encoders = _encoders(wide) | {name: params}
            pipeline.encode(encoders, config, self.model.tokenizers, self.prompts)
        elif name == "transformer":
            x = self.noise
            for t, t_next in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
                x = x + (t_next - t) * mmdit.apply(params, require(config, "transformer"), x, t, *self.conditioning)


def _encoders(params: "dict[str, Params]") -> "dict[str, Params]":
    return {name: part for name, part in params.items() if name in ENCODERS}


def _with_good_products(name: str, params: "Params", trial: _Trial | None, arguments: argparse.Namespace) -> "Params":
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
    small = f"weights below {quantize.SMALLEST_PRODUCT:,} numbers, convolutions and what is above --limit"
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


def _report_velocity(model: "Model", stored: "Params", trial: _Trial) -> None:
    import torch

    from functional_sd3.core import tree
    from functional_sd3.layouts.components import require
    from functional_sd3.transformer import precision

    config, reference = require(model.config, "transformer"), trial.model.params["transformer"]
    stored = tree.to(stored, trial.noise.device)
    with torch.no_grad():
        errors = precision.velocity_errors(reference, stored, config, trial.noise, trial.sigmas, *trial.conditioning)
    for t, error in zip(trial.sigmas.tolist(), errors.tolist(), strict=False):
        report.say(f"velocity at t = {t:.3f}: relative error {error:.2e} against float32")
