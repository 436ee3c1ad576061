"""What PyTorch has for CPUs beside its own layers: oneDNN's products with an activation inside and its GELU, and MKL's
products by a weight that is packed once.

None of it is promised by PyTorch: where it is gone, layers compute the same in two steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from functional_sd3.core.types import Params
from functional_sd3.core.watching import unwatched

ONE_DNN_ROWS = range(16, 513)
"""Rows of a matrix whose product oneDNN computes faster than PyTorch's BLAS: a fifth faster for 77 to 256 rows of 1,024
to 6,144 numbers, a twentieth for 512 (two cores with AVX-512, PyTorch 2.13)."""


def has_linear(params: Params, x: Tensor) -> bool:
    """Whether `linear` computes this layer: float32 on a CPU, the weight as it is, nothing that watches."""
    return (
        params.keys() <= {"weight", "bias", "packed"}
        and x.ndim > 1
        and unwatched(x, *_leaves(params))
        and _one_dnn("_linear_pointwise")
    )


def linear(params: Params, x: Tensor, fused: str = "none", algorithm: str = "", scale: float = 1.0) -> Tensor:
    """f(scale y) / scale of the linear layer's y, f being oneDNN's activation of that name."""
    rows, bias = x.flatten(0, -2), params.get("bias")
    if scale != 1:
        rows, bias = rows * scale, None if bias is None else bias * scale
    y = torch.ops.mkldnn._linear_pointwise(rows, params["weight"], bias, fused, [], algorithm)
    return (y if scale == 1 else y.mul_(1 / scale)).unflatten(0, x.shape[:-1])


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear layer by BLAS, of rows that nobody watches: PyTorch's copies the bias to every row first and has the
    product added to it, which takes 3 to 8 % longer at 384 inputs."""
    y = rows.mm(weight.t())
    return y if bias is None else y.add_(bias)


@dataclass(frozen=True)
class Packed:
    """A linear layer's weight in the order in which MKL multiplies so many `rows` by it; nothing else can read it."""

    weight: Tensor
    rows: int


def packed(params: Params, rows: int) -> Params:
    """A linear layer that holds its weight packed too, for inputs of so many `rows`, where MKL is there.

    A product then takes a tenth less time at 512 rows of 512 numbers, a fifth less than oneDNN's at 48; to pack takes
    as long as a tenth of a product of 512 rows. It writes as many bytes as the weight has, of 6 to 18 MB more that MKL
    asks for, and is of no use but here: not to be saved, moved or learned from.
    """
    fits = params.keys() <= {"weight", "bias"} and unwatched(*_leaves(params))
    if not (fits and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")):
        return params
    weight = torch.ops.mkl._mkl_reorder_linear_weight(params["weight"].contiguous(), rows)
    return {**params, "packed": Packed(weight, rows)}


def has_packed_linear(params: Params, x: Tensor) -> bool:
    """Whether `packed_linear` computes this: a packed layer, and rows as many as it is packed for that nothing
    watches."""
    packed = params.get("packed")
    return packed is not None and unwatched(x) and x.shape[:-1].numel() == packed.rows


def packed_linear(params: Params, x: Tensor) -> Tensor:
    """x (..., inputs) -> (..., outputs)."""
    rows, packed = x.flatten(0, -2), params["packed"]
    y = torch.ops.mkl._mkl_linear(rows, packed.weight, params["weight"], params.get("bias"), packed.rows)
    return y.unflatten(0, x.shape[:-1])


def has_gelu_tanh(x: Tensor) -> bool:
    """Whether `gelu_tanh` computes this: float32 on a CPU, of many numbers."""
    here = x.device.type == "cpu" and x.dtype == torch.float32
    return here and x.ndim > 1 and x.numel() >= 1 << 16 and _one_dnn("_convolution_pointwise")


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form in half the time of PyTorch's, whose tanh is what takes it there.

    oneDNN's is reached through what it is put into: here a convolution of each number with 1.
    """
    rows, channels = x.flatten(0, -2), x.shape[-1]
    picture = rows[None, :, None].permute(0, 3, 1, 2)
    ones, none = x.new_ones(channels, 1, 1, 1), [0, 0]
    y = torch.ops.mkldnn._convolution_pointwise(picture, ones, None, none, [1, 1], [1, 1], channels, "gelu", [], "tanh")
    return y.permute(0, 2, 3, 1).reshape(x.shape)


def _leaves(params: Params) -> list[Tensor]:
    return [leaf for name, leaf in params.items() if name != "packed"]


def _one_dnn(name: str) -> bool:
    enabled = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return enabled and hasattr(torch.ops.mkldnn, name)
