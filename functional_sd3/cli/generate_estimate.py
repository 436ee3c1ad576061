"""`generate --estimate`: a table of the memory of a run and of options that change it, before anything is loaded."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from functional_sd3 import pipeline, weights
from functional_sd3.cli import options, precision, report, runtime, train_checks, train_estimate
from functional_sd3.cli.parser import subparser
from functional_sd3.core import tree
from functional_sd3.formats import default_dtype
from functional_sd3.formats.default_dtype import Default
from functional_sd3.formats.trees import Storage
from functional_sd3.image import vae
from functional_sd3.kernels import narrow
from functional_sd3.layouts.components import Config, require
from functional_sd3.pipeline import estimate, swapping
from functional_sd3.pipeline.estimate import Choice
from functional_sd3.weights import shipped

GB = 1e9
_COUNTED = {"params", "variant", "dtype", "device", "offload", "block_swap", "size", "prompt", "count", "batch", "cfg",
            "guidance", "steps", "without"}  # fmt: skip
"""Options of `generate` that the estimate reads."""
_WITHOUT_MEMORY = {"estimate", "seed", "negative", "variation", "out", "quiet", "debug", "timeout", "run", "leaf"}


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Raises ValueError for a size that the model cannot draw."""
    options.check_swap(arguments)
    paths = arguments.params or [shipped.NAME]
    if train_estimate.released_config(paths) is None:
        train_checks.check_estimate_params(paths, train_estimate.TRANSFORMERS)
    if others := not_counted(arguments):
        report.note(f"what {' and '.join(others)} may need is not in these numbers")
    config, stored, is_quantized = _model(paths, arguments.variant)
    left_out: dict[str, Any] = dict.fromkeys(arguments.without)
    config = replace(config, **left_out)
    if arguments.block_swap is not None:
        swapping.check_count(config, arguments.block_swap, "--block-swap")
    choice = choice_of(arguments, config, stored, is_quantized)
    factor = vae.factor(require(config, "vae"))
    where = "the device" if choice.on_device else "the processor"
    report.say(
        f"{' '.join(paths)}: {choice.images} of {choice.width * factor} x {choice.height * factor}, "
        f"{str(choice.computed).removeprefix('torch.')}, computed by {where}; in GB"
    )
    columns = ("text", "modulations", "steps", "decoding", *(("device",) if choice.on_device else ()), "host", "mapped")
    rows = list(_others(choice, require(config, "transformer").depth))
    width = max(len(name) for name, _ in rows)
    report.say(" ".join([" " * width, *(f"{name:>11}" for name in columns)]))
    for name, each in rows:
        report.say(" ".join([f"{name:<{width}}", *(f"{number / GB:>11.2f}" for number in _numbers(config, each))]))
    return 0


def not_counted(arguments: argparse.Namespace) -> list[str]:
    """The options that are given, may need memory and are not read."""
    usual = vars(subparser("generate").parse_args([]))
    given = [name for name, value in vars(arguments).items() if name in usual and value != usual[name]]
    return [f"--{name.replace('_', '-')}" for name in given if name not in _COUNTED | _WITHOUT_MEMORY]


def choice_of(arguments: argparse.Namespace, config: Config, stored: torch.dtype, is_quantized: bool) -> Choice:
    """The `Choice` of a command line, by which the memory of its run is estimated."""
    # The memory of another machine can be estimated on this one.
    device = torch.device(arguments.device) if arguments.device in ("cuda", "mps") else runtime.device(arguments.device)
    size = options.size(arguments.size)
    height, width = pipeline.latent_size(config, *(size[::-1] if size else ()))
    prompts = max(1, len(arguments.prompt))
    computed = default_dtype.choose(_dtype(arguments, config, device), {stored}, device)
    return Choice(
        height,
        width,
        images=min(arguments.batch, prompts * arguments.count),
        rows=1 if arguments.cfg <= 1 and not arguments.guidance else 2,
        texts=prompts + (arguments.cfg > 1 or bool(arguments.guidance)),
        steps=arguments.steps,
        stored=stored,
        computed=computed or stored,
        quantized=is_quantized,
        offload=arguments.offload,
        swapped=arguments.block_swap,
        on_device=device.type != "cpu",
    )


def _dtype(arguments: argparse.Namespace, config: Config, device: torch.device) -> torch.dtype | Default:
    """The dtype of --dtype, as `generate` chooses it."""
    paths = arguments.params or [shipped.NAME]
    if train_estimate.released_config(paths) is None:
        return precision.choose(arguments, [shipped.resolve(path) for path in paths], device).dtype
    stored = Storage(1.0, require(config, "transformer").width)
    is_narrow = arguments.dtype == "auto" and device.type == "cpu" and precision.pays(stored, narrow.here())
    return torch.bfloat16 if is_narrow else runtime.dtype(arguments.dtype)


def _model(paths: list[str], variant: str | None) -> tuple[Config, torch.dtype, bool]:
    """The config of --params, the dtype that it is stored in, and whether weights have one byte."""
    if (released := train_estimate.released_config(paths)) is not None:
        return released, torch.bfloat16, False
    places = [shipped.resolve(path) for path in paths]
    model = weights.load(places, dtype="stored", variant=variant, finite=False, quantized=True)
    runtime.require(model, ("transformer", "vae"), " and ".join(paths))
    leaves = tree.leaves(model.params["transformer"])
    wide = max((leaf.dtype for leaf in leaves if leaf.dtype.itemsize > 1), key=lambda dtype: dtype.itemsize)
    return model.config, wide, any(leaf.dtype.itemsize == 1 for leaf in leaves)


def _others(base: Choice, depth: int) -> Iterator[tuple[str, Choice]]:
    """This command, then choices from most to least memory."""
    yield "this command", base
    whole = replace(base, offload=False, swapped=None, quantized=False)
    yield "no option", whole
    yield "--offload", replace(whole, offload=True)
    for count in (0, depth // 2, depth):
        yield f"--block-swap {count}", replace(whole, swapped=count)
    yield "int8 or float8 weights, --offload", replace(whole, offload=True, quantized=True)
    yield "int8 or float8 weights, --block-swap 0", replace(whole, swapped=0, quantized=True)


def _numbers(config: Config, choice: Choice) -> list[int]:
    """Bytes of each stage where it is computed; the peaks of device and host, and the largest part mapped."""
    stages = estimate.stages(config, choice)
    of = {stage.name: stage.device + (0 if choice.on_device else stage.host) for stage in stages}
    text = max((of.pop(name) for name in ("clip_l", "clip_g", "t5") if name in of), default=0)
    device, host = estimate.peak(stages, on_device=choice.on_device)
    return [text, *of.values(), *([device] if choice.on_device else []), host, max(each.mapped for each in stages)]
