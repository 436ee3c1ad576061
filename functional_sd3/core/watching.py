"""Who watches a tensor: what may be overwritten, and what may be differentiated by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext


def plain(x: Tensor) -> bool:
    """Whether x is neither differentiated nor mapped nor traced, nor of a kind with rules of its own (a DTensor): if
    nobody else holds it, it may be overwritten."""
    return not torch.compiler.is_compiling() and not x.requires_grad and is_ordinary(x) and not in_mode()


def by_autograd(*tensors: Tensor, devices: Sequence[str] = ("cpu",)) -> bool:
    """Whether eager reverse-mode autograd, and nothing else, watches all of these: tensors on one of `devices`, of one
    dtype (on a CPU float32 or float64), the first with rows."""
    first, device = tensors[0], tensors[0].device.type
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or first.ndim < 2 or device not in devices:
        return False
    narrow = device == "cpu" and first.dtype not in (torch.float32, torch.float64)
    if narrow or any(x.dtype != first.dtype or x.device.type != device for x in tensors):
        return False
    # Inside a transform of torch.func even what it does not wrap may not go through a function of one's own.
    if in_transform() or in_mode() or torch.is_autocast_enabled(device):
        return False
    # Of what is frozen nothing need be kept for a backward pass, and autograd knows best what.
    return all(x.requires_grad and is_ordinary(x) for x in tensors)


def unwatched(*tensors: Tensor) -> bool:
    """Whether nothing watches any of these, autocast neither: tensors on a CPU, float32."""
    here = all(x.device.type == "cpu" and x.dtype == torch.float32 and plain(x) for x in tensors)
    return here and not torch.is_autocast_enabled("cpu")


def is_ordinary(x: Tensor) -> bool:
    """Whether x is a tensor or a parameter, neither mapped nor the value of a dual number."""
    if type(x) not in (Tensor, torch.nn.Parameter) or torch.func.debug_unwrap(x) is not x:
        return False
    mapped = torch._C._functorch.is_legacy_batchedtensor(x)  # as autograd.grad's is_grads_batched maps
    return not mapped and forward_ad.unpack_dual(x).tangent is None


def in_transform() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_mode() -> bool:
    """Whether a dispatch mode (`FlopCounterMode`, a tracer) or a function mode is active, which must be shown PyTorch's
    own operations.

    The function mode of a default device is none of these: it changes where tensors are created, no result.
    """
    if torch._C._len_torch_dispatch_stack():
        return True
    depth = torch._C._len_torch_function_stack()
    return depth > 0 and not all(
        isinstance(torch._C._get_function_stack_at(index), DeviceContext) for index in range(depth)
    )
