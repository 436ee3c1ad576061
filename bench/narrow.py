"""From which width on bfloat16 is worth its rounding on a processor: its line of `kernels.narrow.TABLE`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from functional_sd3.core import prng, tree
from functional_sd3.kernels import narrow, processor
from functional_sd3.transformer import mmdit

WIDTHS = (64, 128, 192, 256, 384, 512)
SIZES = ((8, 24), (16, 77), (32, 154))
"""Side of the latents in patches, tokens of the text."""
PAYS = 0.85
"""Largest share of float32's time, at every size, from which bfloat16 is worth its rounding."""

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
    print(f"\nbfloat16 pays from a width of {found} on; the table of kernels/narrow.py says {here.bfloat16} for")
    print(f"{processor.identify()} with {', '.join(instructions()) or 'no instructions for bfloat16 or int8'}")


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
