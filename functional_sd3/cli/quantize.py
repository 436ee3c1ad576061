"""Store a model's weights in one byte each, and say what that costs."""

import argparse
from pathlib import Path

from functional_sd3.cli import options, report

HELP = "store weights in one byte each, and say what that costs"
FORMATS = ("int8", "float8")
PROMPTS = ("a large red circle on a white background", "a lighthouse in fog", "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="PATH", help="weights of any form")
    options.add_variant(parser)
    add("--format", choices=FORMATS, default="int8", help="of the weights inside blocks (default int8)")
    add("--part", nargs="+", metavar="NAME", default=("transformer",), help="components (default transformer)")
    add("--out", metavar="PATH", help="a .safetensors file or a folder for the result; without it, only report")
    add("--prompt", nargs="+", metavar="TEXT", default=PROMPTS, help="what the velocity is compared for")
    add("--steps", type=int, default=4, help="of the run along which it is compared (default 4; 0: do not)")
    add("--all", action="store_true", help="a line for every weight, not for every layer")
    add("--device", default="auto", help="auto, cpu, cuda or mps")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from functional_sd3 import weights
    from functional_sd3.cli import runtime
    from functional_sd3.core import tree
    from functional_sd3.weights import quantize

    if arguments.steps < 0:
        raise ValueError(f"--steps {arguments.steps} must be at least 0")
    dtype = {"int8": torch.int8, "float8": torch.float8_e4m3fn}[arguments.format]
    model = weights.load(arguments.model, dtype="stored", variant=arguments.variant)
    runtime.require(model, arguments.part, Path(arguments.model))
    stored = {name: quantize.quantize(model.params[name], dtype) for name in arguments.part}
    for name, params in stored.items():
        before, after = (tree.nbytes(each) / 2**20 for each in (model.params[name], params))
        report.say(f"{name}: {before:,.1f} MiB -> {after:,.1f} MiB")
        for place, error in _rows(quantize.errors({name: model.params[name]}, {name: params}), arguments.all):
            report.say(f"  {place:50} relative error {error:.2e}")
    if "transformer" in stored and arguments.steps:
        _report_velocity(model, stored["transformer"], arguments)
    if arguments.out:
        weights.save(arguments.out, model._replace(params={**model.params, **stored}), layout="native")
        report.say(arguments.out)
    return 0


def _rows(errors, every: bool):
    """(path, relative error); of a layer, the root mean square over its weights."""
    from functional_sd3.weights import merge

    if every:
        return [(row.path, row.relative) for row in errors]
    grouped: dict[str, list[float]] = {}
    for row in errors:
        grouped.setdefault(merge.layer(row.path), []).append(row.relative**2)
    return [(place, (sum(squares) / len(squares)) ** 0.5) for place, squares in grouped.items()]


def _report_velocity(model, stored, arguments: argparse.Namespace) -> None:
    import torch

    from functional_sd3 import pipeline
    from functional_sd3.cli import runtime
    from functional_sd3.core import prng, tree
    from functional_sd3.transformer import precision

    device = runtime.device(arguments.device)
    prompts = list(arguments.prompt)
    with torch.no_grad():
        encoders = {name: part for name, part in model.params.items() if name not in ("transformer", "vae")}
        encoders = tree.to(tree.cast(encoders, torch.float32), device)
        conditioning = pipeline.encode(encoders, model.config, model.tokenizers, prompts).positive
        noise = pipeline.initial_noise(prng.key(0), model.config, len(prompts), device=device)
        sigmas = pipeline.sigmas(model.config, noise, arguments.steps)
        reference = tree.to(tree.cast(model.params["transformer"], torch.float32), device)
        errors = precision.velocity_errors(
            reference, tree.to(stored, device), model.config.transformer, noise, sigmas, *conditioning
        )
    for t, error in zip(sigmas.tolist(), errors.tolist(), strict=False):
        report.say(f"velocity at t = {t:.3f}: relative error {error:.2e} against float32")
