"""Kernels of Nvidia's GPUs: elementwise functions of a few lines of C++ (`torch.cuda.jiterator`), products with GELU
inside, products of float8, one launch for the dtypes of many leaves.

Eager code on a GPU often waits for the processor that launches its kernels: one kernel here replaces up to 125 there.
AMD's devices are called "cuda" too; nothing here was tried on them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from functional_sd3.core import dispatch, layers, prng
from functional_sd3.core.clean_state import once_per_process
from functional_sd3.core.types import Params


def fits_threefry(key0: Tensor, key1: Tensor, low: Tensor, high: Tensor | None = None) -> bool:
    """Counters of 32 bits."""
    return high is None and _on_nvidia(key0, key1, low) and _has_jiterator()


def threefry(key0: Tensor, key1: Tensor, low: Tensor, high: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`prng.threefry` as one kernel."""
    return _elementwise(_threefry_source(), 2)(key0, key1, low)


def fits_gaussian(draw: Tensor) -> bool:
    """Float32."""
    return draw.dtype is torch.float32 and _on_nvidia(draw) and _has_jiterator()


def gaussian(draw: Tensor) -> Tensor:
    """`prng.gaussian` as one kernel."""
    return _elementwise(_gaussian_source(), 1)(draw)


def fits_rms_norm(params: Params, x: Tensor, eps: float) -> bool:
    """One dtype."""
    return _on_nvidia(x, params["weight"]) and x.dtype is params["weight"].dtype and hasattr(F, "rms_norm")


def rms_norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """`layers.rms_norm` as PyTorch's one kernel, and a few backwards."""
    return F.rms_norm(x, x.shape[-1:], params["weight"], eps)


def fits_linear_activation(params: Params, x: Tensor, activation: str) -> bool:
    """GELU's tanh form, the layer's weight and bias alone, one dtype."""
    return (
        activation == "gelu_tanh"
        and x.ndim > 1
        and params.keys() == {"weight", "bias"}
        and _on_nvidia(x, *params.values())
        and all(leaf.dtype is x.dtype for leaf in params.values())
        and _addmm_activation() is not None
    )


def linear_activation(params: Params, x: Tensor, activation: str) -> Tensor:
    """`layers.linear_activation`, the activation computed while the product is in registers."""
    rows, weight = x.flatten(0, -2), params["weight"].t()
    return _addmm_activation()(params["bias"], rows, weight, use_gelu=True).unflatten(0, x.shape[:-1])


def fits_linear_float8(params: Params, x: Tensor) -> bool:
    """A layer with "float8_scale" in bfloat16, its sizes multiples of 16, on a GPU that multiplies float8 (Ada, Hopper,
    Blackwell)."""
    if "float8_scale" not in params or not params.keys() <= _FLOAT8 or not _HAS_SCALED_PRODUCT:
        return False
    weight = params["weight"]
    return (
        _on_nvidia(x, weight)
        and x.dtype is torch.bfloat16
        and weight.dtype is torch.float8_e4m3fn
        and not any(size % 16 for size in weight.shape)
        and multiplies_float8(x.device)
    )


def linear_float8(params: Params, x: Tensor) -> Tensor:
    """`layers.linear` of a layer with "float8_scale": a product of float8 whose sums are scaled by rows of both
    factors."""
    numbers, steps = layers.to_float8(x.flatten(0, -2))
    scales = params["float8_scale"].to(torch.float32)[None]
    y = torch._scaled_mm(numbers, params["weight"].t(), scale_a=steps, scale_b=scales, out_dtype=x.dtype)
    y = y.unflatten(0, x.shape[:-1])
    if "bias" in params:
        y = y + params["bias"]
    return layers.add_low_rank(params, x, y)


def multiplies_float8(device: torch.device) -> bool:
    """True for Nvidia's GPUs from Ada (8.9) on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    # Of these questions the one that a compiler answers itself.
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor) >= (8, 9)


_FLOAT8 = {"weight", "float8_scale", "bias", "low_rank"}
_HAS_SCALED_PRODUCT = hasattr(torch, "_scaled_mm")


def fits_cast_leaves(leaves: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """All on GPUs."""
    return _on_nvidia(*leaves) and _foreach_copy() is not None


def cast_leaves(leaves: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`layers.cast_leaves` in a few kernels, and so backwards, once all gradients are there."""
    learned = [leaf for leaf in leaves if leaf.requires_grad and torch.is_grad_enabled()]
    if not learned:
        return _copies(leaves, [dtype] * len(leaves))
    converted = iter(_Cast.apply(dtype, *learned))
    rest = [leaf for leaf in leaves if not leaf.requires_grad]
    frozen = iter(_copies(rest, [dtype] * len(rest)))
    return [next(converted if leaf.requires_grad else frozen) for leaf in leaves]


class _Cast(Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [leaf.dtype for leaf in leaves]
        return tuple(_copies(leaves, [dtype] * len(leaves)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [gradient for gradient in gradients if gradient is not None]
        dtypes = [dtype for dtype, gradient in zip(ctx.dtypes, gradients, strict=True) if gradient is not None]
        if dispatch.tracking(*present) == "none":
            converted = iter(_copies(present, dtypes))
        else:
            converted = iter([gradient.to(dtype) for gradient, dtype in zip(present, dtypes, strict=True)])
        return None, *(None if gradient is None else next(converted) for gradient in gradients)


def _copies(leaves: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    copies = [torch.empty_like(leaf, dtype=dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    if copies:
        _foreach_copy()(copies, list(leaves))
    return copies


def _on_nvidia(*tensors: Tensor) -> bool:
    return torch.version.hip is None and all(x.is_cuda for x in tensors)


@functools.cache
def _elementwise(code: str, outputs: int) -> Callable[..., Any]:
    """The elementwise function of a C++ template over one type, `void name(T in, ..., T& out, ...)`, tensors broadcast;
    a tensor, or a tuple of several."""
    run = _jiterator()(code, num_outputs=outputs)

    def on_their_device(*tensors: Tensor) -> Any:
        with torch.cuda.device(tensors[0].device):
            return run(*tensors)

    return on_their_device


@once_per_process
def _jiterator():
    return dispatch.private("torch.cuda.jiterator._create_multi_output_jit_fn", _DOUBLED, 1)


def _has_jiterator() -> bool:
    return _jiterator() is not None


@once_per_process
def _addmm_activation():
    ones = torch.ones(2, 2, dtype=torch.float32, device="cuda")
    return dispatch.private("torch._addmm_activation", ones[0], ones, ones, use_gelu=True)


@once_per_process
def _foreach_copy():
    zeros = [torch.zeros(1, dtype=torch.float32, device="cpu")]
    return dispatch.private("torch._foreach_copy_", zeros, zeros)


_DOUBLED = "template <typename T> void doubled(T x, T& out) { out = x + x; }"


@functools.cache
def _threefry_source() -> str:
    """`prng.threefry` of the counters `low` in C++."""
    lines = []
    for group in range(5):
        for rotation in prng.ROTATIONS[group % 2]:
            rotated = f"(y << {rotation}) | (y >> {32 - rotation})"
            lines.append(f"x += y; y = ({rotated}) ^ x;")
        lines.append(f"x += k{(group + 1) % 3}; y += k{(group + 2) % 3} + {group + 1}u;")
    return f"""template <typename T> void threefry(T key0, T key1, T low, T& out0, T& out1) {{
    unsigned int k0 = key0, k1 = key1, k2 = k0 ^ k1 ^ {prng.PARITY}u, x = k0, y = k1 + (unsigned int)low;
    {" ".join(lines)}
    out0 = x; out1 = y; }}"""


@functools.cache
def _gaussian_source() -> str:
    """`prng.gaussian` in C++, every product and sum rounded, as tensors compute it."""
    steps = " ".join(
        f"centre = __fadd_rn(__fmul_rn(centre, near), {a!r}f); tails = __fadd_rn(__fmul_rn(tails, far), {b!r}f);"
        for a, b in zip(prng.ERFINV_CENTRE[1:], prng.ERFINV_TAILS[1:], strict=True)
    )
    return f"""template <typename T> void normal(T draw, T& out) {{
    float x = __fadd_rn(__fmul_rn(draw, 2.0f), {-1.0 + 2.0**-24!r}f);
    float w = -log1pf(__fmul_rn(-x, x)), near = __fadd_rn(w, -2.5f), far = __fadd_rn(sqrtf(w), -3.0f);
    float centre = {prng.ERFINV_CENTRE[0]!r}f, tails = {prng.ERFINV_TAILS[0]!r}f;
    {steps}
    out = __fmul_rn(__fmul_rn(w < 5.0f ? centre : tails, x), {math.sqrt(2.0)!r}f); }}"""
