"""The most bytes of tensors that a computation holds at once, known without computing it: of tensors on "meta".

Shapes, dtypes and lifetimes are those of what runs on a device without kernels of its own; attention holds its result
and a float32 for each query, as fused kernels do, and a convolution a copy of its input, in the layout that it is
computed in. Kernels that write in place hold less.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functional_sd3.core import dispatch


def peak_bytes(run: Callable[[], Any], given: Iterable[Tensor] = ()) -> int:
    """Bytes of tensors alive at the worst moment of `run`, what it returns included, storages of `given` not.

    Everything that `run` computes with must be on the device "meta".
    """
    live = _Live({tensor.untyped_storage()._cdata for tensor in given})
    with torch.no_grad(), dispatch.watched(), _FusedAttention(), live:
        result = run()
    del result
    return live.peak


class _Live(TorchDispatchMode):
    """Counts storages from the operation that makes them until the last tensor of them is gone."""

    def __init__(self, given: set[int]) -> None:
        super().__init__()
        self.counted, self.held, self.peak = set(given), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        held = args[0].nbytes if func.overloadpacket is torch.ops.aten.convolution else 0
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.counted:
                self.counted.add(storage._cdata)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.held + held)
        return result

    def _freed(self, name: int, size: int) -> None:
        self.counted.discard(name)
        self.held -= size


class _FusedAttention(TorchFunctionMode):
    """Attention by a fused kernel, which holds no scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            # Freed at once, but held together with the result.
            sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
            result = query.new_empty((*query.shape[:-1], value.shape[-1]))
            del sums
            return result
        return func(*args, **(kwargs or {}))
