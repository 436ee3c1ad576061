"""What PyTorch has for Nvidia's GPUs beside its own layers: kernels made of a line of C++ (`torch.cuda.jiterator`),
products with GELU inside, one launch for the dtypes of many leaves.

Eager code on a GPU often waits for the processor that launches its kernels: what is one kernel here is up to 125 there.
None of it is promised by PyTorch: where it is gone, the same is computed in more steps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from functional_sd3.core.types import Params
from functional_sd3.core.watching import in_mode, in_transform, is_ordinary, plain


def has_kernels(*tensors: Tensor) -> bool:
    """Whether `kernel` computes on these: tensors on a GPU that nothing watches, nor what is dispatched."""
    if not all(_here(x) and plain(x) for x in tensors):
        return False
    return hasattr(torch.cuda.jiterator, "_create_multi_output_jit_fn")


@functools.cache
def kernel(code: str, outputs: int = 1) -> Callable[..., Any]:
    """The elementwise function of a C++ template over one type, `void name(T in, ..., T& out, ...)`, tensors broadcast;
    a tensor, or a tuple of several."""
    run = torch.cuda.jiterator._create_multi_output_jit_fn(code, num_outputs=outputs)

    def on_their_device(*tensors: Tensor) -> Any:
        with torch.cuda.device(tensors[0].device):
            return run(*tensors)

    return on_their_device


def has_rms_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's `rms_norm` is one kernel for this, and a few backwards: eager, one dtype, on a GPU."""
    if not _here(x) or x.dtype != weight.dtype or torch.compiler.is_compiling() or in_transform() or in_mode():
        return False
    eager = not torch.is_autocast_enabled("cuda") and is_ordinary(x) and is_ordinary(weight)
    return eager and hasattr(torch.ops.aten, "_fused_rms_norm")


def has_linear_gelu_tanh(params: Params, x: Tensor) -> bool:
    """Whether `linear_gelu_tanh` computes this layer: the weight as it is, nothing that watches."""
    return (
        _here(x)
        and x.ndim > 1
        and params.keys() == {"weight", "bias"}
        and all(plain(leaf) and leaf.dtype == x.dtype for leaf in (x, *params.values()))
        and not torch.is_autocast_enabled("cuda")
        and hasattr(torch, "_addmm_activation")
    )


def linear_gelu_tanh(params: Params, x: Tensor) -> Tensor:
    """GELU's tanh form of a linear layer, computed while the product is in registers."""
    y = torch._addmm_activation(params["bias"], x.flatten(0, -2), params["weight"].t(), use_gelu=True)
    return y.unflatten(0, x.shape[:-1])


def has_cast(leaves: Sequence[Tensor]) -> bool:
    """Whether `cast` computes this: tensors on a GPU, watched at most by eager autograd."""
    if torch.compiler.is_compiling() or in_transform() or in_mode():
        return False
    return all(_here(leaf) and is_ordinary(leaf) for leaf in leaves)


def cast(leaves: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each leaf in `dtype`, in a few kernels for all of them, and so backwards, once all their gradients are there."""
    learned = [leaf for leaf in leaves if leaf.requires_grad and torch.is_grad_enabled()]
    if not learned:
        return _copies(leaves, [dtype] * len(leaves))
    found = iter(_Cast.apply(dtype, *learned))
    frozen = iter(_copies([leaf for leaf in leaves if not leaf.requires_grad], [dtype] * (len(leaves) - len(learned))))
    return [next(found if leaf.requires_grad else frozen) for leaf in leaves]


def has_lerp(starts: Sequence[Tensor], ends: Sequence[Tensor], weight: Tensor) -> bool:
    """Whether `lerp_` computes this: float32 on one GPU that nothing watches, in order in memory, through which the
    kernel walks."""
    shapes = [start.shape for start in starts] == [end.shape for end in ends]
    return shapes and all(
        _here(leaf) and leaf.device == weight.device and leaf.dtype == torch.float32 and leaf.is_contiguous()
        and plain(leaf) for leaf in (weight, *starts, *ends)
    )  # fmt: skip


def lerp_(starts: Sequence[Tensor], ends: Sequence[Tensor], weight: Tensor) -> None:
    """starts += weight (ends - starts), in a few kernels: a step of gradient descent along -ends with decay 1."""
    torch._fused_sgd_(
        list(starts), list(ends), [], weight_decay=1.0, momentum=0.0, lr=weight, dampening=0.0, nesterov=False,
        maximize=True, is_first_step=False,
    )  # fmt: skip


class _Cast(Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [leaf.dtype for leaf in leaves]
        return tuple(_copies(leaves, [dtype] * len(leaves)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        dtypes = [dtype for dtype, gradient in zip(ctx.dtypes, gradients, strict=True) if gradient is not None]
        if torch.is_grad_enabled() or not all(map(is_ordinary, given)):
            found = iter([gradient.to(dtype) for gradient, dtype in zip(given, dtypes, strict=True)])
        else:
            found = iter(_copies(given, dtypes))
        return None, *(None if gradient is None else next(found) for gradient in gradients)


def _copies(leaves: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    copies = [torch.empty_like(leaf, dtype=dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    if copies:
        torch._foreach_copy_(copies, list(leaves))
    return copies


def _here(x: Tensor) -> bool:
    # A device of AMD's is called "cuda" too; nobody has seen these there.
    return x.device.type == "cuda" and torch.version.hip is None
