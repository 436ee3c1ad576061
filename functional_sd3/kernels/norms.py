"""Norms in fewer passes over memory: PyTorch's layer norm, and others on CPUs for untracked float32 tensors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core.dispatch import in_forward_mode
from functional_sd3.core.types import Params

NAIVE_SUM = 1 << 16
"""Numbers of a group beyond which PyTorch's group norm of channels_last images, which adds them one after another on a
CPU, is wrong in the sixth decimal."""
NUMBERS_AT_ONCE = 1 << 17
"""Numbers summed together, few enough for a core's cache."""


def fits_layer_norm(params: Params, x: Tensor, eps: float) -> bool:
    """False under forward mode: PyTorch 2.13's tangent holds the mean and variance to be constant when it is itself
    differentiated, so that grad(jvp) and jvp(jvp) of it are wrong, without an error."""
    return not in_forward_mode()


def layer_norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """`layers.layer_norm` as PyTorch computes it."""
    return F.layer_norm(x, x.shape[-1:], params.get("weight"), params.get("bias"), eps)


def fits_rms_norm(params: Params, x: Tensor, eps: float) -> bool:
    """Float32 on a CPU."""
    return all(each.is_cpu and each.dtype is torch.float32 for each in (x, params["weight"]))


def rms_norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """`layers.rms_norm` with one tensor of its own."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, inverse).mul_(params["weight"])


def fits_group_norm(params: Params, x: Tensor, groups: int, eps: float) -> bool:
    """Large channels_last images, float32 on a CPU."""
    if any(not each.is_cpu or each.dtype is not torch.float32 for each in (x, *params.values())):
        return False
    large = x.ndim == 4 and len(x) > 0 and x.shape[1] % groups == 0 and x.shape[1:].numel() >= NAIVE_SUM * groups
    return large and x.is_contiguous(memory_format=torch.channels_last)


def group_norm(params: Params, x: Tensor, groups: int, eps: float) -> Tensor:
    """`layers.group_norm` in parts that stay in the cache."""
    return group_norm_into(params, x, groups, eps, torch.empty_like(x))


def group_norm_silu(params: Params, x: Tensor, groups: int, eps: float) -> Tensor:
    """`layers.group_norm_silu` in parts that stay in the cache."""
    return group_norm_into(params, x, groups, eps, torch.empty_like(x), silu=True)


def group_norm_into(params: Params, x: Tensor, groups: int, eps: float, out: Tensor, silu: bool = False) -> Tensor:
    """The group norm of x in `out`, which may be x: sums about a pivot near the mean, in float64."""
    batch, channels, height, width = x.shape
    each = channels // groups

    def parts(x: Tensor) -> Sequence[Tensor]:
        pixels = x.permute(0, 2, 3, 1).view(batch, height * width, channels)
        return pixels.split(max(1, NUMBERS_AT_ONCE // channels), dim=1)

    inputs = parts(x)
    pivot = inputs[0].mean(1).view(batch, groups, each).mean(-1, keepdim=True)
    flat = pivot.expand(batch, groups, each).reshape(batch, 1, channels)
    sums = torch.zeros(2, batch, channels, dtype=torch.float64, device=x.device)
    for part in inputs:
        centred = part - flat
        sums += torch.stack([centred.sum(1), centred.square_().sum(1)])
    mean, square = sums.view(2, batch, groups, each).sum(-1) / (height * width * each)
    inverse = torch.rsqrt(square - mean.square() + eps).to(torch.float32)
    scale = params["weight"].view(groups, each) * inverse[..., None]
    shift = params["bias"].view(groups, each) - (mean + pivot[..., 0]).to(torch.float32)[..., None] * scale
    scale, shift = scale.view(batch, 1, channels), shift.view(batch, 1, channels)
    for part, place in zip(inputs, parts(out), strict=True):
        torch.addcmul(shift, part, scale, out=place)
        if silu:
            F.silu(place, inplace=True)
    return out
