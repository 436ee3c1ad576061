"""`python -m bench.gpu_attention`: attention's derivatives and a MeanFlow step at true size on a CUDA machine.

Derivatives of attention over 4,096 + 333 tokens, 24 heads of 64, bfloat16, beside the formula (time, peak memory,
relative difference), and the gradient of a MeanFlow step of SD3.5-medium's size with random weights at 1024 px beside
that of a plain step. Takes minutes. `--out FILE` keeps the table, row by row; `--device cpu --size small` runs the same
lines in seconds without such a machine, to see that they run.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from bench import bench_attention, gpu, gpu_command, timing
from functional_sd3.core import attention, prng, transform
from functional_sd3.training import objectives
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config


class Size(NamedTuple):
    """Numbers of a run: tokens, heads and their dimension of attention; side of the latents and context tokens."""

    tokens: int
    heads: int
    head_dim: int
    transformer: mmdit.Config
    side: int
    context: int


SIZES = {
    "true": Size(4096 + 333, 24, 64, replace(mmdit.SD35_MEDIUM, interval_size=256), 128, 333),
    "small": Size(
        64 + 13, 2, 16, mmdit.Config(depth=2, heads=2, position_size=96, qk_norm=True, interval_size=16), 8, 13
    ),
}


def derivatives(place: gpu.Place, size: Size) -> Iterator[gpu.Row]:
    """Each of `bench_attention.DERIVATIVES` beside the formula."""
    shape = (1, size.heads, size.tokens, size.head_dim)
    inputs = tuple(gpu.drawn(place, shape, shape, shape))
    along = tuple(x.cos() for x in inputs)
    formula = partial(attention.attention, implementation="math")
    for name, derivative in bench_attention.DERIVATIVES.items():
        what = f"{name} of attention, {size.heads} heads of {size.head_dim}, {size.tokens:,} tokens, bfloat16"
        ours, theirs = (partial(derivative, attend, inputs, along) for attend in (attention.attention, formula))
        yield compared(place, what, ours, theirs)


def meanflow(place: gpu.Place, size: Size) -> Iterator[gpu.Row]:
    """Gradient of a MeanFlow step, all of whose samples have r < t, beside that of a plain step."""
    config = Config(transformer=size.transformer)
    key = prng.key(0, device=place.device)
    params = {"transformer": mmdit.init(key, size.transformer, dtype=torch.bfloat16, device=place.device)}
    sizes = size.transformer
    shapes = (1, 16, size.side, size.side), (1, size.context, sizes.context_width), (1, sizes.pooled_width)
    latents, context, pooled = gpu.drawn(place, *shapes)
    batch = {"latents": latents.float(), "context": context, "pooled": pooled}

    def step(loss: Callable[..., Any]) -> torch.Tensor:
        keys = prng.split(key, 1)
        return transform.value_and_grad(loss, has_aux=True)(params, batch, keys)[1][0].detach()

    plain, mean = objectives.flow_loss(config), objectives.meanflow_loss(config, equal=0.0)
    what = f"MeanFlow step beside a plain step, {sizes.depth} blocks of width {sizes.width}, bfloat16"
    yield compared(place, what, partial(step, mean), partial(step, plain), same=False)


def compared(
    place: gpu.Place, what: str, ours: Callable[[], Any], theirs: Callable[[], Any], same: bool = True
) -> gpu.Row:
    """A row of two sides; of ours alone where the other's does not fit into the memory."""
    result, memory = ours(), gpu.peak(place, ours)
    try:
        other, other_memory = theirs(), gpu.peak(place, theirs)
    except torch.OutOfMemoryError:
        return gpu.Row(what, *gpu.milliseconds(place, ours), more=f"peak {memory}; the other side: out of memory")
    difference = timing.relative_difference(result, other) if same else None
    del result, other
    return gpu.Row(what, *gpu.milliseconds(place, ours, theirs), difference, f"peak {memory} / {other_memory}")


def main(arguments: list[str] | None = None) -> int:
    """`gpu_command.run` of these tables."""
    parts = {each.__name__: partial(_lines, each) for each in (derivatives, meanflow)}
    columns = ("what", "ours", "other side", "ratio", "relative difference", "more")
    says = "; medians, interleaved; peaks beyond what is held before a call."
    module = sys.modules[__name__]
    return gpu_command.run(module, parts, says=says, columns=columns, rounds=5, arguments=arguments)


def _lines(part: Callable[..., Iterator[gpu.Row]], place: gpu.Place, size: Any) -> Iterator[str]:
    return (row.line() for row in part(place, size))


if __name__ == "__main__":
    sys.exit(main())
