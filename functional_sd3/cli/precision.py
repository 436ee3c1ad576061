"""The dtype of --dtype auto: bfloat16 on a CPU that multiplies it in hardware, for models that are worth its rounding.

Others are computed in float32 there, as are commands that solve or differentiate a velocity, where rounding shows.
Elsewhere than on a CPU the default is that of `formats.default_dtype`.
"""

import argparse
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from functional_sd3 import weights
from functional_sd3.cli import report, runtime
from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.formats.default_dtype import Default
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.trees import Storage
from functional_sd3.kernels import cuda, int8, narrow
from functional_sd3.weights import describing, quantize

MOSTLY = 0.9
"""Least share of numbers stored in 16 bits or fewer: files of blocks keep norms and biases in float32."""
_SOLVES = ("inverts", "measures_flow")
"""Set by commands that solve a velocity for its start or differentiate it: `edit` without --direct, `likelihood`."""


class Chosen(NamedTuple):
    """dtype: to load with. word: of --dtype, for the record of an image; "auto" where every machine decides alike."""

    dtype: torch.dtype | Default
    word: str


def choose(
    arguments: argparse.Namespace,
    source: str | os.PathLike | Sequence[str | os.PathLike],
    device: torch.device,
) -> Chosen:
    """The dtype of --dtype for the model at `source`, whose transformer decides; says in a line if it is bfloat16.

    Files that cannot be read decide nothing: loading them raises the error.
    """
    if arguments.dtype != "auto" or device.type != "cpu" or solves(arguments):
        return Chosen(runtime.dtype(arguments.dtype), arguments.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Loading notes it.
        try:
            stored = describing.storage(source, "transformer", variant=arguments.variant)
        except (WeightsError, OSError, ValueError):
            stored = None
    if stored is None or not is_candidate(stored):
        return Chosen(runtime.dtype("auto"), "auto")
    if not pays(stored, narrow.here()):
        return Chosen(runtime.dtype("auto"), "float32")
    report.note(
        f"computed in bfloat16, which this processor multiplies faster: the transformer is stored in 16 bits or fewer "
        f"and {stored.width:,} wide; --dtype float32 is slower and rounds less"
    )
    return Chosen(torch.bfloat16, "bfloat16")


def solves(arguments: argparse.Namespace) -> bool:
    """True for commands that solve a velocity for its start or differentiate it, where rounding shows."""
    return any(getattr(arguments, name, False) for name in _SOLVES)


def with_products_of(
    params: Params, device: torch.device, dtype: torch.dtype | Default | None = None, *, exact: bool = False
) -> Params:
    """Parameters without products of int8 or float8 where the device is slower at them, with a note.

    On a CPU that multiplies int8, without those of layers that are too small for it (`narrow.Narrow.int8`) in the dtype
    that is computed in: `dtype`, where it is one, whatever they are stored in. exact: without any, as for `solves`."""
    if exact:
        return quantize.without_products(params)
    computes = {"int8": device.type == "cpu" and int8.LEAST_SIZE is not None, "float8": cuda.multiplies_float8(device)}
    slower = [
        compute for compute, is_fast in computes.items() if not is_fast and quantize.has_products(params, compute)
    ]
    if not slower:
        return params if device.type != "cpu" else quantize.without_products(params, _too_small(params, dtype))
    what = "this processor has no instructions" if device.type == "cpu" else f"a device {device.type} has no kernels"
    report.note(f"the weights were quantised for products of {slower[0]}, for which {what} here: they are "
        "dequantised instead")  # fmt: skip
    return quantize.without_products(params)


def _too_small(params: Params, dtype: torch.dtype | Default | None) -> set[str]:
    """Paths of the weights whose products of int8 take longer than dequantising does, as do all in other dtypes."""
    processor = narrow.here()
    least = {torch.float32: processor.int8, torch.bfloat16: processor.int8_bfloat16}
    leaves = tree.flatten_paths(params)
    small = set()
    for path, scale in leaves.items():
        if path.endswith(".int8_scale"):
            layer = path.removesuffix("int8_scale")
            stored = leaves.get(layer + "bias", scale).dtype
            # By default a CPU computes everything else in float32.
            computed = dtype if isinstance(dtype, torch.dtype) else stored if stored in least else torch.float32
            if leaves[layer + "weight"].numel() < (least.get(computed, math.inf) or 0):
                small.add(layer + "weight")
    return small


def fetcher(
    place: torch.device,
    source: Any,
    /,
    *,
    computed: torch.dtype | Default | None = None,
    exact: bool = False,
    **options: Any,
) -> Callable[[str], Params]:
    """`weights.fetcher` with `with_products_of` of the device that computes, which need not be that of what is read."""
    fetch = weights.fetcher(source, **options)
    return lambda name: with_products_of(fetch(name), place, computed, exact=exact)


def is_candidate(stored: Storage) -> bool:
    """True if some processor would compute it in bfloat16, so that an image's record must name the dtype."""
    widths = [line.bfloat16 for line in (narrow.MEASURED, *narrow.TABLE.values()) if line.bfloat16 is not None]
    return stored.narrow >= MOSTLY and stored.width >= min(widths)


def pays(stored: Storage, processor: narrow.Narrow) -> bool:
    """True if bfloat16 is faster on the processor for a network stored so."""
    return stored.narrow >= MOSTLY and processor.bfloat16 is not None and stored.width >= processor.bfloat16
