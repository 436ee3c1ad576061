"""Choice of the library for float32 products and 3x3 convolutions on a CPU: a table by processor, and its products.

PyTorch multiplies float32 matrices by its BLAS, on x86 Intel's MKL, which does not use all that other vendors'
processors can; oneDNN, which PyTorch has for convolutions and bfloat16, compiles its code for the processor at hand.
oneDNN is reached by an operator of PyTorch's compiler that has neither derivatives nor a rule for mapped tensors:
`linear` and `mm` are for plain tensors, inside of functions that have these (`linear_functions`) or where none is
needed.

Attention in float32 stays PyTorch's fused kernel, though its products are MKL's: head by head in blocks of 256 rows
oneDNN's took 1.28 times as long for 1,357 tokens on Zen 4. In bfloat16 oneDNN's are faster there
(`attention_products`).

`python -m bench.products` measures the machine at hand and prints its line of `TABLE`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core.clean_state import once_per_process
from functional_sd3.core.dispatch import is_plain, private
from functional_sd3.kernels.operators import define
from functional_sd3.kernels.processor import AMD, INTEL, Processor, identify


class Choice(NamedTuple):
    """Operations that oneDNN computes faster than BLAS.

    rows, size: products of so many rows, of which the numbers of rows, inputs and outputs multiply to at least `size`.
    winograd: True if `kernels.winograd` is faster than oneDNN's direct convolutions; attention: True if
    `attention_products` is faster than PyTorch's kernel in bfloat16.
    """

    rows: range
    size: int
    winograd: bool
    attention: bool = False


ANY = 1 << 62
SMALLEST_IN_GRAPH = 1 << 18
"""Least size of a weight that oneDNN multiplies in a graph, of whose rows nothing is known."""
SMALLEST_TRACKED = 1 << 27
"""Least rows x inputs x outputs of products that autograd differentiates: a function of our own costs 45 microseconds
beyond PyTorch's, and oneDNN is slow with few rows and a transposed weight. Value and gradients of 1,024 rows of
512 -> 2,048 take 0.94 of BLAS's time, of 256 rows 0.93, of 256 of 512 -> 512 1.05 (Zen 4, 1 thread)."""
PYTORCH = Choice(range(0), 0, False)
"""PyTorch's own choice."""
FORMER = Choice(range(16, 513), 1 << 20, True)
"""The choice of an Intel Xeon, which was taken on every processor before others were measured."""
# A Zen 4 kept to AVX2 (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS), 1 thread. oneDNN / BLAS for
# 256 -> 768: 1.1 to 1.2 of 16 to 2,714 rows; for 512 -> 2,048: 1.15 of 16, 0.86 of 77, 0.93 of 512, 1.0 of 2,714; for
# 1,024 -> 4,096: 0.69 of 2 and 77, 0.82 of 512, 0.90 of 1,024. Winograd / direct: 0.50 of 256 channels at 128 x 128.
AMD_AVX2 = Choice(range(1, ANY), 1 << 26, True)
"""Choice for AMD's processors without AVX512: Zen 2 and 3."""
TABLE: dict[Processor, Choice] = {
    # Xeon at 2.5 GHz, 2 threads. oneDNN / BLAS: 0.8 of 77 to 256 rows of 1,024 to 6,144 numbers, 0.95 of 512, above 1
    # beyond. A VAE decodes 256 x 256 pixels in 0.55 of diffusers' time by Winograd's algorithm, in 0.90 directly.
    Processor(INTEL, 6, "AVX512"): Choice(range(16, 513), 1 << 20, True),
    # Zen 4 at 2.6 GHz, 1 thread, whose units for 256 bits both libraries nearly fill in large products. oneDNN / BLAS
    # for 1,536 -> 6,144: 0.55 of 2 rows, 0.63 of 16, 0.63 of 77, 0.78 of 256, 0.91 of 1,024; for 512 -> 2,048: 0.93 of
    # 16, 0.81 of 77, 0.83 of 512, 0.92 of 2,714; for 256 -> 768: 1.3 of 4, 1.0 of 77, 0.93 of 256, 0.97 of 2,714.
    # Winograd / direct: 0.51 of 256 channels at 128 x 128, 0.55 of 512 at 64 x 64, 0.74 at 32 x 32. Attention in
    # bfloat16, by oneDNN / PyTorch's: 0.88 for 200 tokens, 0.85 for 589, 0.83 for 1,357.
    Processor(AMD, 25, "AVX512"): Choice(range(1, ANY), 1 << 22, True, True),
    # Zen 5, 2 threads, units for 512 bits. oneDNN / BLAS: 0.44 for 512 rows of 512 -> 1,536, 0.45 for 2,714 of
    # 512 -> 2,048, 0.49 for 8,192 of 1,536 -> 6,144. VAE decode: 0.84 of diffusers by Winograd, 0.77 directly.
    # PyTorch's attention in bfloat16 reaches 177 GFLOP/s there, oneDNN's products 750 to 830.
    Processor(AMD, 26, "AVX512"): Choice(range(1, ANY), 1 << 22, False, True),
}
"""Processor -> what is faster on it, measured with PyTorch 2.13."""


def choose(processor: Processor) -> Choice:
    """The table's line of a processor; for an unmeasured one, that of those most like it.

    An AMD processor newer than the table is as the newest there, one with AVX2 alone (Zen 2 and 3) as `AMD_AVX2`, since
    it is the vendor's check in MKL that costs them their speed. Any other x86 processor has the `FORMER` choice. On Arm
    PyTorch chooses between its BLAS and oneDNN, with Arm's Compute Library, by measurements of Arm's own.
    """
    if processor in TABLE:
        return TABLE[processor]
    if processor.vendor == AMD and processor.capability == "AVX512":
        return TABLE[max(line for line in TABLE if line.vendor == AMD)]
    if processor.vendor == AMD and processor.capability == "AVX2":
        return AMD_AVX2
    return FORMER if processor.capability in ("AVX2", "AVX512") else PYTORCH


CHOICE = choose(identify())
"""Choice for this machine."""


def is_onednn(rows: int, weight: Tensor) -> bool:
    """True if oneDNN multiplies so many rows by a weight (outputs, inputs) faster, and may be used."""
    return rows in CHOICE.rows and rows * weight.numel() >= CHOICE.size and is_enabled()


def is_onednn_tracked(rows: int, weight: Tensor) -> bool:
    """True where `is_onednn` is, for a product that autograd differentiates, and oneDNN is faster for all rows."""
    return is_onednn_for_all_rows(weight) and rows * weight.numel() >= SMALLEST_TRACKED and is_onednn(rows, weight)


def is_onednn_for_all_rows(weight: Tensor) -> bool:
    """True if oneDNN is faster for as many rows as give a weight work enough, for graphs that leave rows open."""
    return CHOICE.rows.stop == ANY and weight.numel() >= SMALLEST_IN_GRAPH


def fits(*tensors: Tensor | None) -> bool:
    """True if all, None aside, are float32 on a CPU."""
    return all(x is None or (x.is_cpu and x.dtype is torch.float32) for x in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (rows, inputs) weight^T + bias by the faster library."""
    if fits(x, weight, bias) and is_plain(x, weight, bias) and _is_chosen(x, weight):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_chosen(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return is_onednn_for_all_rows(weight) and is_enabled()
    return is_onednn(len(x), weight)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (rows, inner) b (inner, columns) by the faster library.

    A transposed left factor, as in the gradient of a weight, is BLAS's: oneDNN has it copied first, and then takes 1.0
    to 1.2 times as long on Zen 4.
    """
    return linear(a, b.t()) if a.is_contiguous() else a.mm(b)


def is_enabled() -> bool:
    """True if PyTorch has oneDNN, it is switched on, and its operator is there."""
    backend = torch.backends.mkldnn
    return backend.is_available() and bool(backend.enabled) and pointwise() is not None


@once_per_process
def pointwise() -> Any:
    """oneDNN's linear layer with an activation: (x (rows, inputs), weight, bias or None, activation, [], algorithm)."""
    ones = torch.ones(2, 2, dtype=torch.float32, device="cpu")
    return private("torch.ops.mkldnn._linear_pointwise", ones, ones, None, "none", [], "")


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return pointwise()(x, weight, bias, "none", [], "")


# An operator of its own, since the compiler takes PyTorch's for one of weights that it has frozen.
onednn_linear = define(
    "onednn_linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _onednn_linear,
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)
