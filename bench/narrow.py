"""From which width on bfloat16, and from which size of a layer on int8, is worth its rounding on a processor: its line
of `kernels.narrow.TABLE`."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from functional_sd3.core import layers, prng, tree
from functional_sd3.core.types import Params
from functional_sd3.kernels import int8, int8_functions, narrow, processor
from functional_sd3.transformer import mmdit
from functional_sd3.weights import quantize

WIDTHS = (64, 128, 192, 256, 384, 512)
SIZES = ((8, 24), (16, 77), (32, 154))
"""Side of the latents in patches, tokens of the text."""
PAYS = 0.85
"""Largest share of float32's time, at every size, from which bfloat16 is worth its rounding."""

LAYERS = (
    (128, 512),
    (256, 256),
    (160, 480),
    (160, 640),
    (256, 768),
    (512, 512),
    (384, 1536),
    (1024, 1024),
    (1024, 4096),
)
"""Inputs and outputs of layers that are multiplied in int8, by size."""
ROWS = (2, 77, 154, 512, 1024)
MANY = 77
"""Rows from which on a layer counts: the tokens of a text."""

Medians = Callable[[Iterable[Callable[[], Any]]], list[float]]


def report(medians: Medians) -> None:
    """Measures and prints. medians: seconds of one call of each of several functions."""
    print("\nMMDiT of two blocks, width, side, tokens of text: ms in float32 and bfloat16, bfloat16's time / float32's")
    ratios: dict[int, list[float]] = {}
    for width in WIDTHS:
        for side, tokens in SIZES:
            wide, slim = medians(forwards(width, side, tokens))
            ratios.setdefault(width, []).append(slim / wide)
            print(f"{width:>6}, {side}, {tokens}: {1e3 * wide:8.1f} {1e3 * slim:8.1f}   {slim / wide:.2f}")
    found, here = least_width(ratios), narrow.here()
    sizes = least_sizes(medians) if int8_functions.product() is not None else [None] * 3
    print(
        f"\nbfloat16 pays from a width of {found} on; int8 from {sizes[0]} weights in float32, {sizes[1]} in bfloat16"
    )
    print(f"and {sizes[2]} dequantised to bfloat16; the table of kernels/narrow.py says {here} for")
    print(f"{processor.identify()} with {', '.join(instructions()) or 'no instructions for bfloat16 or int8'}")


def least_sizes(medians: Medians) -> list[int | None]:
    """Measures and prints layers in int8. The least size from which on the geometric mean of int8's time over many
    rows, beside the weight in float32, in bfloat16 and dequantised to bfloat16, is below 1; None where it never is."""
    print("\ninputs -> outputs, rows: int8's time / that of float32, of bfloat16, of int8 dequantised to bfloat16")
    means: dict[int, list[list[float]]] = {}
    for inputs, outputs in LAYERS:
        for rows in ROWS:
            times = medians(layer_ways(inputs, outputs, rows))
            ratios = [times[0] / times[1], times[2] / times[3], times[2] / times[4]]
            print(f"{inputs:>6} -> {outputs}, {rows}: {' '.join(f'{ratio:.2f}' for ratio in ratios)}")
            if rows >= MANY:
                means.setdefault(inputs * outputs, []).append(ratios)
    logs = {
        size: [statistics.fmean(map(math.log, way)) for way in zip(*many, strict=True)] for size, many in means.items()
    }
    return [least_size({size: way[index] for size, way in logs.items()}) for index in range(3)]


def least_size(logs: Mapping[int, float]) -> int | None:
    """The least size from which on all logarithms are negative; None where the largest's is not."""
    paying = None
    for size in sorted(logs, reverse=True):
        if logs[size] >= 0:
            break
        paying = size
    return paying


def layer_ways(inputs: int, outputs: int, rows: int) -> list[Callable[[], torch.Tensor]]:
    """One random layer: int8 and float32 of an input in float32; int8, bfloat16 and dequantised of one in bfloat16."""
    keys = prng.split(prng.key(0), 3)
    weight, bias, x = (
        prng.normal(key, shape)
        for key, shape in zip(keys, ((outputs, inputs), (outputs,), (rows, inputs)), strict=True)
    )
    wide = {"weight": weight / inputs**0.5, "bias": bias}
    slim, narrow_x = tree.cast(wide, torch.bfloat16), x.bfloat16()
    stored = [quantize.quantize({"blocks": [{"attention": {"out": each}}]}) for each in (wide, slim)]
    of_float32, of_bfloat16 = (each["blocks"][0]["attention"]["out"] for each in stored)
    multiplied = [
        {"int8_scale" if name == "scale" else name: leaf for name, leaf in layer.items()}
        for layer in (of_float32, of_bfloat16)
    ]

    def by_int8(layer: Params, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: int8.linear(layer, x)

    return [
        by_int8(multiplied[0], x), lambda: layers.linear(wide, x),
        by_int8(multiplied[1], narrow_x), lambda: layers.linear(slim, narrow_x),
        lambda: layers.linear(of_bfloat16, narrow_x),
    ]  # fmt: skip


def forwards(width: int, side: int, tokens: int) -> list[Callable[[], torch.Tensor]]:
    """The velocity of two samples in float32 and in bfloat16, by the same random weights."""
    config = mmdit.Config(
        depth=2, heads=width // 64, position_size=96, sample_size=2 * side, context_width=1024, pooled_width=512
    )
    params = mmdit.init(prng.key(0), config)
    shapes = (2, 16, 2 * side, 2 * side), (2, tokens, 1024), (2, 512)
    latents, *text = (prng.normal(key, shape) for key, shape in zip(prng.split(prng.key(1), 3), shapes, strict=True))
    t = torch.full((2,), 0.5, dtype=torch.float32)

    def forward(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        cast, x, (context, pooled) = tree.cast(params, dtype), latents.to(dtype), (each.to(dtype) for each in text)
        return lambda: mmdit.apply(cast, config, x, t, context, pooled)

    return [forward(torch.float32), forward(torch.bfloat16)]


def least_width(ratios: Mapping[int, Sequence[float]]) -> int | None:
    """The least width from which on no size takes more than `PAYS`; None where the widest does."""
    paying = None
    for width in sorted(ratios, reverse=True):
        if max(ratios[width]) > PAYS:
            break
        paying = width
    return paying


def instructions() -> list[str]:
    """Those of this processor that multiply narrow numbers."""
    here = torch.cpu.get_capabilities()
    return sorted(name for name in narrow.BFLOAT16 | narrow.INT8 if here.get(name))
