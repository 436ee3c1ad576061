"""Who watches a tensor: what may be overwritten, and what may be differentiated by hand."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def plain(x: Tensor) -> bool:
    """Whether x is neither differentiated nor mapped nor traced, nor of a kind with rules of its own (a DTensor): if
    nobody else holds it, it may be overwritten."""
    return not torch.compiler.is_compiling() and not x.requires_grad and _ordinary(x)


def by_autograd(*tensors: Tensor) -> bool:
    """Whether reverse-mode autograd, and nothing else, watches these: tensors of float32 or float64."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _autocasts(tensors[0].device.type):
        return False
    return any(x.requires_grad for x in tensors) and all(map(_known_to_autograd_alone, tensors))


def _known_to_autograd_alone(x: Tensor) -> bool:
    known = x.dtype in (torch.float32, torch.float64) and _ordinary(x)
    return known and forward_ad.unpack_dual(x).tangent is None


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _ordinary(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and torch.func.debug_unwrap(x) is x
