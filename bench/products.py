"""`python -m bench.products [--threads N] [--rounds N] [--cpu-time]`: which library computes what faster here.

Times float32 products of many rows and sizes by PyTorch's BLAS and by oneDNN, 3x3 convolutions by Winograd's algorithm
and directly, and attention by PyTorch's fused kernel and by oneDNN's products, all interleaved, and prints the line of
`functional_sd3.kernels.products.TABLE` that follows for this processor, beside the one that is there. Then MMDiTs in
float32 and bfloat16, for that of `kernels.narrow.TABLE` (`--narrow`: these alone).
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import narrow
from functional_sd3.core import prng
from functional_sd3.kernels import attention_products, onednn, processor, products, winograd

ROWS = (1, 2, 4, 8, 16, 32, 77, 154, 256, 512, 1024, 2714)
LAYERS = ((256, 768), (512, 1536), (512, 2048), (2048, 512), (1024, 4096), (1536, 6144))
"""Inputs and outputs: the layers of MMDiTs of widths 256 to 1,536."""
CONVOLUTIONS = ((512, 32), (512, 64), (256, 128), (128, 128))
"""Channels and side of a VAE's images at 256 x 256 pixels."""
ATTENTIONS = ((8, 589), (8, 1357))
"""Heads of 64, and tokens."""
LARGEST = 1 << 33
SECONDS = 0.03
"""Least time of one sample: small products are repeated."""


class Product(NamedTuple):
    """Seconds of one product by both libraries."""

    rows: int
    inputs: int
    outputs: int
    blas: float
    onednn: float

    @property
    def size(self) -> int:
        return self.rows * self.inputs * self.outputs


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where PyTorch has no oneDNN."""
    parser = argparse.ArgumentParser(prog="python -m bench.products", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each, of which the median counts (default 7)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread and processor time, for busy machines")
    parser.add_argument("--narrow", action="store_true", help="narrow numbers alone")
    parsed = parser.parse_args(arguments)
    if not products.is_enabled():
        print("this PyTorch has no oneDNN, or its private names have changed: nothing to choose", file=sys.stderr)
        return 1
    clock = time.process_time if parsed.cpu_time else time.perf_counter
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if parsed.cpu_time else parsed.threads)
    try:
        with torch.no_grad():
            if not parsed.narrow:
                report(parsed.rounds, clock)
            narrow.report(lambda ways: medians(ways, parsed.rounds, clock))
    finally:
        torch.set_num_threads(threads)
    return 0


def report(rounds: int, clock: Callable[[], float]) -> None:
    """Measures and prints everything."""
    measured = []
    print("inputs -> outputs, rows: GFLOP/s of BLAS and oneDNN, oneDNN's time / BLAS's")
    for (inputs, outputs), rows in itertools.product(LAYERS, ROWS):
        if rows * inputs * outputs <= LARGEST:
            both = product(rows, inputs, outputs, rounds, clock)
            print(_line(f"{inputs} -> {outputs}, {rows}", 2 * both.size, both.blas, both.onednn))
            measured.append(both)
    print("\nGradient of a weight, 1,024 rows of 512 -> 2,048 (BLAS's in any case), as above")
    print(_line("", 2 * 1024 * 512 * 2048, *weight_gradient(rounds, clock)))
    print("\nchannels, side: GFLOP/s of the direct 3x3 convolution and Winograd's, time of the latter / the former")
    ratios = []
    for channels, side in CONVOLUTIONS:
        direct, fast = convolution(channels, side, rounds, clock)
        ratios.append(fast / direct)
        print(_line(f"{channels}, {side} x {side}", 18 * (channels * side) ** 2, direct, fast))
    print("\nheads of 64, tokens: GFLOP/s of PyTorch's attention and oneDNN's products, time of these / the former")
    for heads, tokens in ATTENTIONS:
        print(_line(f"{heads}, {tokens}", 256 * heads * tokens**2, *attention(heads, tokens, rounds, clock)))
    found, here = best(measured, geometric_mean(ratios) < 1), processor.identify()
    if onednn.has_bfloat16():
        print("\nthe same in bfloat16, by attention_products")
        narrow_ratios = []
        for heads, tokens in ATTENTIONS:
            fused, by_products = narrow_attention(heads, tokens, rounds, clock)
            narrow_ratios.append(by_products / fused)
            print(_line(f"{heads}, {tokens}", 256 * heads * tokens**2, fused, by_products))
        found = found._replace(attention=geometric_mean(narrow_ratios) < 1)
    print(f"\nthe line for this processor:\n    {here}: {_code(found)},\n")
    for name, choice in (("it", found), ("the table's line", products.CHOICE), ("oneDNN always", EVERYTHING)):
        print(f"products by {name} take {share(measured, choice):.3f} of BLAS's time ({_code(choice)})")


def product(rows: int, inputs: int, outputs: int, rounds: int, clock: Callable[[], float]) -> Product:
    """x (rows, inputs) weight^T + bias by both libraries."""
    x, weight, bias = _random((rows, inputs), (outputs, inputs), (outputs,))
    times = medians([lambda: F.linear(x, weight, bias), lambda: products.onednn_linear(x, weight, bias)], rounds, clock)
    return Product(rows, inputs, outputs, *times)


def weight_gradient(rounds: int, clock: Callable[[], float]) -> list[float]:
    """g^T x by both libraries."""
    g, x = _random((1024, 2048), (1024, 512))
    return medians([lambda: g.t().mm(x), lambda: products.onednn_linear(g.t(), x.t(), None)], rounds, clock)


def convolution(channels: int, side: int, rounds: int, clock: Callable[[], float]) -> list[float]:
    """A 3x3 convolution in channels_last, directly and by Winograd's algorithm."""
    x, weight, bias = _random((1, channels, side, side), (channels, channels, 3, 3), (channels,))
    x = x.contiguous(memory_format=torch.channels_last)
    ways = [lambda: F.conv2d(x, weight, bias, padding=1), lambda: winograd.convolve(weight, bias, x)]
    return medians(ways, rounds, clock)


def attention(heads: int, tokens: int, rounds: int, clock: Callable[[], float]) -> list[float]:
    """Softmax attention by both of `attention_ways`."""
    return medians(attention_ways(*_random(*((1, heads, tokens, 64) for _ in range(3)))), rounds, clock)


def narrow_attention(heads: int, tokens: int, rounds: int, clock: Callable[[], float]) -> list[float]:
    """Softmax attention in bfloat16 by PyTorch's fused kernel and by `attention_products`."""
    query, key, value = (x.bfloat16() for x in _random(*((1, heads, tokens, 64) for _ in range(3))))
    by_products = attention_products.untracked
    ways = [
        lambda: F.scaled_dot_product_attention(query, key, value),
        lambda: by_products(query, key, value, None, False, 0.125),
    ]
    return medians(ways, rounds, clock)


def attention_ways(query: Tensor, key: Tensor, value: Tensor, rows: int = 256) -> list[Callable[[], Tensor]]:
    """PyTorch's fused kernel, and head by head in blocks of `rows` by oneDNN's products."""

    def by_products() -> Tensor:
        out = torch.empty_like(query)
        keys = key[0] / query.shape[-1] ** 0.5
        for head, (q, k, v) in enumerate(zip(query[0], keys, value[0].mT.contiguous(), strict=True)):
            for first in range(0, query.shape[2], rows):
                part = slice(first, first + rows)
                weights = products.onednn_linear(q[part], k, None).softmax(-1)
                out[0, head, part] = products.onednn_linear(weights, v, None)
        return out

    return [lambda: F.scaled_dot_product_attention(query, key, value), by_products]


def medians(ways: Iterable[Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of one call of each, interleaved and warm."""
    ways = list(ways)
    repeats = []
    for way in ways:
        way()
        start = clock()
        way()
        repeats.append(max(1, math.ceil(SECONDS / max(clock() - start, 1e-6))))
    samples: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, repeat, own in zip(ways, repeats, samples, strict=True):
            start = clock()
            for _ in range(repeat):
                way()
            own.append((clock() - start) / repeat)
    return [statistics.median(own) for own in samples]


EVERYTHING = products.Choice(range(1, products.ANY), 0, False)


def best(measured: list[Product], by_winograd: bool) -> products.Choice:
    """The choice with the least total of logarithms of times, the simplest among those within half a percent of it."""
    ends = [*(rows + 1 for rows in ROWS[3:-1]), products.ANY]
    sizes = [0, *(1 << power for power in range(16, 27, 2))]
    # Simplest first: few rows and small products in, no upper end.
    candidates = [
        products.Choice(range(start, stop), size, by_winograd)
        for stop, size, start in itertools.product(reversed(ends), sizes, ROWS[:6])
    ] + [products.PYTORCH._replace(winograd=by_winograd)]
    least = min(share(measured, choice) for choice in candidates)
    return next(choice for choice in candidates if share(measured, choice) <= 1.005 * least)


def share(measured: list[Product], choice: products.Choice) -> float:
    """Geometric mean of the times under a choice, as a share of BLAS's."""
    ratios = [
        each.onednn / each.blas if each.rows in choice.rows and each.size >= choice.size else 1.0 for each in measured
    ]
    return geometric_mean(ratios)


def geometric_mean(numbers: list[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, numbers)))


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    keys = prng.split(prng.key(0), len(shapes))
    return [prng.normal(key, shape) / shape[-1] ** 0.5 for key, shape in zip(keys, shapes, strict=True)]


def _line(name: str, flops: int, first: float, second: float) -> str:
    return f"{name:>20}: {flops / first / 1e9:6.0f} {flops / second / 1e9:6.0f}   {second / first:.2f}"


def _code(choice: products.Choice) -> str:
    stop = "ANY" if choice.rows.stop == products.ANY else str(choice.rows.stop)
    rows = "range(0)" if not choice.rows else f"range({choice.rows.start}, {stop})"
    power = choice.size.bit_length() - 1
    size = f"1 << {power}" if choice.size == 1 << max(power, 0) else str(choice.size)
    attention = ", True" if choice.attention else ""
    return f"Choice({rows}, {size}, {choice.winograd}{attention})"


if __name__ == "__main__":
    sys.exit(main())
