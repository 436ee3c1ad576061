"""Parameters that are materialised for one block, and again in its backward pass, instead of being saved for it.

The same memory as that of FSDP's parameters between the passes (Zhao et al. 2023, arXiv:2304.11277, section 3.2), for
whatever materialises them: gathering from other processes, copying from the host, casting. Activations are kept.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.dispatch import can_replace_saved_tensors, in_forward_mode, in_mode, in_transform
from functional_sd3.core.types import Params


def call(
    apply: Callable[..., Any], materialize: Callable[[Params], Params], block: Params, *args: Any, **kwargs
) -> Any:
    """apply(materialize(block), *args, **kwargs), of whose materialised parameters autograd saves none.

    The backward pass calls `materialize` once more, when it first reads one of them, and frees all when it has read the
    last. Under the transforms of torch.func, in forward mode and under `torch.compile` they are saved.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform() or in_forward_mode() or in_mode():
        return apply(materialize(block), *args, **kwargs)
    if not can_replace_saved_tensors():
        return apply(materialize(block), *args, **kwargs)
    whole = materialize(block)
    again = _Again(materialize, tree.map(Tensor.detach, block))
    # Tensors without elements all have the address 0.
    stored = {0, *(_address(leaf) for leaf in tree.leaves(block))}
    # By the address of their memory, which is theirs as long as `whole` is held.
    places = {_address(leaf): number for number, leaf in enumerate(tree.leaves(whole)) if _address(leaf) not in stored}

    def pack(tensor: Tensor) -> Tensor | _View:
        number = places.get(_address(tensor))
        if number is None:
            return tensor
        return _View(again, number, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return apply(whole, *args, **kwargs)


class _Again:
    """The parameters of one block for its backward pass: materialised at the first use, and held until the graph lets
    go of the last view of them."""

    def __init__(self, materialize: Callable[[Params], Params], block: Params) -> None:
        self.materialize, self.block = materialize, block
        self.leaves: list[Tensor] | None = None

    def leaf(self, number: int) -> Tensor:
        if self.leaves is None:
            with torch.no_grad():
                self.leaves = list(tree.leaves(self.materialize(self.block)))
        return self.leaves[number]


class _View(NamedTuple):
    """View of a saved tensor in the memory of a leaf."""

    again: _Again
    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: Tensor | _View) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    leaf = saved.again.leaf(saved.number)
    leaf = leaf if leaf.dtype == saved.dtype else leaf.view(saved.dtype)
    return torch.as_strided(leaf, saved.shape, saved.stride, saved.offset)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
