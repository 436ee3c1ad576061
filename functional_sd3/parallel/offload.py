"""Parameters that stay in the host's memory, or mapped from a file, and are copied to the device a block at a time.

    stored = offload.keep(params, 8, device)                       # the last 8 blocks stay where they are
    copied = offload.materialize(stored["blocks"], device, dtype=torch.bfloat16)
    velocity = mmdit.apply(stored, config, x, t, context, pooled, materialize=copied, block_transform=transform.remat)

Tensors of a mapped safetensors file (`weights.load(dtype="stored")`) are read from it when they are copied, and the
system drops the pages of what was read when it needs memory.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.dispatch import in_forward_mode, in_transform
from functional_sd3.core.types import Params


def check_count(count: int, depths: Mapping[str, int], name: str = "count") -> None:
    """Raises ValueError unless 0 <= count <= the most blocks that a component has.

    depths: blocks of each component of which the last `count` stay on the host; all of those that have fewer do.
    name: of the argument or option that gives the count.
    """
    depths = depths or {"model": 0}
    deepest = max(depths, key=lambda component: depths[component])
    if count < 0:
        raise ValueError(f"{name} {count} must be a number of blocks, 0 or more")
    if count > depths[deepest]:
        most = depths[deepest]
        raise ValueError(f"{name} {count} is more than the {most} blocks of the {deepest}: give at most {most}")


def keep(
    params: Params,
    count: int,
    device: torch.device | str,
    *,
    dtype: torch.dtype | None = None,
    host: tree.Chooser = (),
    pin: bool = True,
) -> Params:
    """The parameters on `device`, but for the last `count` blocks, which stay where they are; where the device is a GPU
    in pinned memory, of which copies are faster and do not wait.

    dtype: of floats of 16 or more bits of what is moved, None for their own. host: leaves of any block that stay where
    they are too, such as "*.modulation.*", which a run needs once; they are not pinned. pin: False for weights that are
    copied once, which pinning would copy twice. Raises ValueError for more blocks than there are.
    """
    blocks = params["blocks"]
    check_count(count, {"network": len(blocks)})
    stays, first = set(tree.select({"blocks": blocks}, host)), len(blocks) - count
    holds: Callable[[Tensor], Tensor] = _pinned if pin and torch.device(device).type == "cuda" else lambda leaf: leaf

    def place(path: str, leaf: Tensor) -> Tensor:
        if path in stays:
            return leaf
        is_swapped = path.startswith("blocks.") and int(path.split(".")[1]) >= first
        return holds(leaf) if is_swapped else _moved(leaf, device, dtype)

    return tree.map_with_path(place, params)


def materialize(
    blocks: Sequence[Params],
    device: torch.device | str,
    *,
    dtype: torch.dtype | None = None,
    ahead: bool | None = None,
) -> Callable[[Params], Params]:
    """The function from a block's parameters, wherever they are, to those on `device`.

    For `materialize=` of the networks, with `block_transform=transform.remat` or without: the backward pass copies
    again, but under a transform of torch.func it keeps the copies unless blocks are rematerialised. Leaves that require
    gradients get them where they are. dtype: of floats of 16 or more bits, None for their own. ahead: whether the block
    that comes next, of `blocks` in the direction of the last two calls, is copied while one is computed, by a stream of
    its own: by default on a GPU. Only leaves without gradients are, outside of the transforms of torch.func; at most
    one block is, and of it the leaves that the last call had: a call may be of part of a block.
    """
    device = torch.device(device)
    copies = Copies(device, device.type == "cuda" if ahead is None else ahead)
    copies.follow(blocks, dtype)
    return copies


class Copies:
    """`materialize` of blocks that are known later, by `follow`, as those of a component that is read when needed."""

    # Slots: `closures` must not take the blocks of all calls for tensors that the function of one block reads.
    __slots__ = ("ahead", "blocks", "copies", "device", "dtype", "last", "numbers", "stream")

    def __init__(self, device: torch.device, ahead: bool) -> None:
        self.device, self.ahead = device, ahead
        self.stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        self.follow(())

    def follow(self, blocks: Sequence[Params], dtype: torch.dtype | None = None) -> None:
        """Copy these blocks from now on, in `dtype`; those before, and what was copied ahead of them, are dropped."""
        self.blocks, self.dtype = blocks, dtype
        self.numbers = {leaf.data_ptr(): number for number, block in enumerate(blocks) for leaf in tree.leaves(block)}
        self.copies: dict[int, Tensor] = {}
        self.last = -1

    def __call__(self, part: Params) -> Params:
        if not self.ahead or torch.compiler.is_compiling() or in_transform() or in_forward_mode():
            return tree.map(self.copy, part)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        current = tree.map(self.take, part)
        number = next((self.numbers[at] for leaf in tree.leaves(part) if (at := leaf.data_ptr()) in self.numbers), None)
        if number is not None:
            following = number + (1 if number >= self.last else -1)
            self.last = number
            self.prepare(following, part)
        return current

    def take(self, leaf: Tensor) -> Tensor:
        """A copy that was made ahead, or one made now."""
        copied = self.copies.pop(leaf.data_ptr(), None)
        if copied is None or leaf.requires_grad:
            return self.copy(leaf)
        if self.stream is not None:
            copied.record_stream(torch.cuda.current_stream(self.device))
        return copied

    def prepare(self, number: int, like: Params) -> None:
        """Copy the leaves of a block that `like` has, for the next call; copies that no call took are dropped."""
        self.copies.clear()
        if not 0 <= number < len(self.blocks):
            return
        paths = tree.flatten_paths(like)
        with torch.no_grad(), torch.cuda.stream(self.stream):
            for path, leaf in tree.flatten_paths(self.blocks[number]).items():
                if path in paths and (copied := self.copy(leaf)) is not leaf:
                    self.copies[leaf.data_ptr()] = copied

    def copy(self, leaf: Tensor) -> Tensor:
        return _moved(leaf, self.device, self.dtype)


def _moved(leaf: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    is_wide = leaf.is_floating_point() and leaf.element_size() > 1
    return leaf.to(device, dtype if dtype and is_wide else leaf.dtype, non_blocking=True)


def _pinned(leaf: Tensor) -> Tensor:
    return leaf.pin_memory() if leaf.device.type == "cpu" else leaf
