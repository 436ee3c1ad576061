"""Lists of tensors in few launches: PyTorch's foreach functions and its fused AdamW."""

from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import dispatch
from functional_sd3.core.leafwise import Leaves

LARGE, ROWS = 1 << 15, 64
"""A leaf of at least LARGE numbers is summed in ROWS rows on a CPU, which its threads share."""


def fits(leaves: Leaves, *_: Any) -> bool:
    """True if this PyTorch has the foreach functions of this module."""
    return bool(leaves) and _ALL_PRESENT


def multiply(leaves: Leaves, factor: Tensor | float) -> list[Tensor]:
    """`leafwise.multiply`."""
    return list(torch._foreach_mul(leaves, factor))


def add(leaves: Leaves, others: Leaves, factor: float = 1.0) -> list[Tensor]:
    """`leafwise.add`."""
    return list(torch._foreach_add(leaves, others, alpha=factor))


def add_inplace(leaves: Leaves, others: Leaves) -> None:
    """`leafwise.add_inplace`."""
    torch._foreach_add_(leaves, others)


def lerp(starts: Leaves, ends: Leaves, weight: Tensor) -> list[Tensor]:
    """`leafwise.lerp`: one pass over both lists, without a list of differences."""
    return list(torch._foreach_lerp(starts, ends, [weight.to(start.dtype) for start in starts]))


def lerp_inplace(starts: Leaves, ends: Leaves, weight: Tensor) -> None:
    """`leafwise.lerp_inplace`."""
    torch._foreach_lerp_(starts, ends, [weight.to(start.dtype) for start in starts])


def global_norm(leaves: Leaves) -> Tensor:
    """`leafwise.global_norm`, leaf by leaf."""
    return torch.stack(torch._foreach_norm(leaves, 2, dtype=torch.float32)).norm()


def fits_global_norm_in_rows(leaves: Leaves) -> bool:
    """Large contiguous leaves on a CPU: one norm there is one thread's work, and of 80 MB 6e-6 from the exact one."""
    return any(map(_is_large, leaves)) and _ALL_PRESENT


def global_norm_in_rows(leaves: Leaves) -> Tensor:
    """`leafwise.global_norm`, the large leaves row by row."""
    rows = [
        torch.linalg.vector_norm(leaf.view(ROWS, -1), dim=1, dtype=torch.float32) for leaf in leaves if _is_large(leaf)
    ]
    if rest := [leaf for leaf in leaves if not _is_large(leaf)]:
        rows.append(torch.stack(torch._foreach_norm(rest, 2, dtype=torch.float32)))
    return torch.cat(rows).norm()


def adam(
    gradients: Leaves, mean: Leaves, square: Leaves, bias1: Tensor, bias2: Tensor, b1: float, b2: float, eps: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`leafwise.adam`."""
    mean = torch._foreach_mul(mean, b1)
    torch._foreach_add_(mean, gradients, alpha=1 - b1)
    square = torch._foreach_mul(square, b2)
    torch._foreach_addcmul_(square, gradients, gradients, value=1 - b2)
    scale = torch._foreach_sqrt(square)
    torch._foreach_div_(scale, bias2.sqrt())
    torch._foreach_add_(scale, eps)
    directions = torch._foreach_div(mean, scale)
    torch._foreach_div_(directions, bias1)
    return list(directions), list(mean), list(square)


def fits_adamw_inplace(weights: Leaves, gradients: Leaves, mean: Leaves, *_: Any) -> bool:
    """Float32."""
    return all(leaf.dtype is torch.float32 for leaf in (*weights, *gradients, *mean)) and _FUSED_ADAMW is not None


def adamw_inplace(
    weights: Leaves, gradients: Leaves, mean: Leaves, square: Leaves, count: Tensor, divisor: Tensor | None,
    rate: Tensor, b1: float, b2: float, eps: float, decay: float,
) -> None:  # fmt: skip
    """`leafwise.adamw_inplace` as one kernel; the tensors of all four lists have the same strides."""
    # It only reads the step count, one tensor for each leaf.
    _FUSED_ADAMW(
        list(weights), list(gradients), list(mean), list(square), [], [count] * len(weights), lr=rate, beta1=b1,
        beta2=b2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False, grad_scale=divisor,
    )  # fmt: skip


def _is_large(leaf: Tensor) -> bool:
    return leaf.is_cpu and leaf.numel() >= LARGE and leaf.numel() % ROWS == 0 and leaf.is_contiguous()


_ONES = [torch.ones((), dtype=torch.float32, device="cpu")]
_TRIALS: dict[str, tuple[Any, ...]] = {
    "_foreach_mul": (_ONES, 1.0),
    "_foreach_add": (_ONES, _ONES),
    "_foreach_add_": (_ONES, _ONES),
    "_foreach_addcmul_": (_ONES, _ONES, _ONES),
    "_foreach_sqrt": (_ONES,),
    "_foreach_div": (_ONES, _ONES),
    "_foreach_div_": (_ONES, _ONES[0]),
    "_foreach_lerp": (_ONES, _ONES, _ONES),
    "_foreach_lerp_": (_ONES, _ONES, _ONES),
    "_foreach_norm": (_ONES, 2),
}
# Constants, not functions: a compiler reads them.
_ALL_PRESENT = all(dispatch.private(f"torch.{name}", *trial) is not None for name, trial in _TRIALS.items())
_FUSED_ADAMW = dispatch.private(
    "torch._fused_adamw_", *([torch.ones((), dtype=torch.float32, device="cpu")] for _ in range(4)), [], _ONES, lr=0.0,
    beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False, grad_scale=None,
)  # fmt: skip
