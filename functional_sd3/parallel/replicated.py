"""Values that are the same on all processes of a group, and functions of them whose work is divided.

Such a function is that of one process, derivatives too: its arguments pass through `enter` or `take`, its results
through `join` (or `collectives.psum`), and between them every process computes something else. The loss is then the
same everywhere, and so is every gradient, of every argument: no other sum over this group is needed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import tree as trees
from functional_sd3.core.types import Tree
from functional_sd3.parallel import collectives
from functional_sd3.parallel.transport import Group, group_index, group_size


def part_sizes(count: int, group: Group) -> tuple[int, ...]:
    """Sizes of the parts of `count` rows or tokens, the first ones one longer where it does not divide.

    Parts of fewer than processes are empty.
    """
    parts = group_size(group)
    size, longer = divmod(count, parts)
    return tuple(size + (index < longer) for index in range(parts))


def enter(tree: Tree, group: Group) -> Tree:
    """The tree (or None), for a function that is divided over the group: cotangents are summed over the processes."""
    if group is None or tree is None or not torch.is_grad_enabled():  # Forwards it is the identity, tangents too.
        return tree

    def entered(leaf: Any) -> Any:
        """Numbers and integers have no cotangents."""
        return collectives.broadcast(leaf, group) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return trees.map(entered, tree)


def take(x: Tensor, group: Group, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
    """This process's part of x along `dim`; sizes: of the parts, by default `part_sizes`. `join` puts it together."""
    if group is None:
        return x
    sizes = sizes or part_sizes(x.shape[dim], group)
    return own_part(enter(x, group), group, dim, sizes)


def own_part(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Tensor:
    """A copy of this process's part of x along `dim`: a view would keep the whole in memory."""
    index = group_index(group)
    return x.narrow(dim, sum(sizes[:index]), sizes[index]).clone()


def join(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Tensor:
    """The parts of all processes along `dim`, on all of them, to the bit.

    Unlike `collectives.all_gather` its transpose takes this process's part of the cotangent, the same on all. It sends
    twice as much, and is for results, which are small beside what is computed of them.
    """
    if group is None:
        return x
    index, padding = group_index(group), [0, 0] * x.ndim
    at = 2 * (x.ndim - 1 - dim % x.ndim)
    padding[at : at + 2] = [sum(sizes[:index]), sum(sizes[index + 1 :])]
    return collectives.psum(F.pad(x, padding), group)
