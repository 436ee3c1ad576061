"""Work of a run that is divided over processes above the networks: rows of an evaluation, and text encoders.

Both belong to the mesh of the transformer's `Computation` in the model's config. Every process then calls the same
functions with the same arguments, and has the same result.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from functional_sd3.core import computation
from functional_sd3.core import spec as specs
from functional_sd3.core import tree as trees
from functional_sd3.core.types import Tree
from functional_sd3.layouts.components import SPECS, Config
from functional_sd3.parallel import collectives
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.replicated import enter, join, part_sizes, take
from functional_sd3.parallel.transport import Group, group_size
from functional_sd3.text.conditioning import Conditioning

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def with_mesh(config: Config, mesh: Mesh) -> Config:
    """The config of a model whose runs are divided over the mesh: rows by its axis guidance, each row by sequence and
    tensor (of which the transformer's parameters are then a part, `parallel.tensor.cut`), text encoders by all."""
    computed = replace(computation.of(config, "transformer"), mesh=mesh)
    return replace(config, computations={**config.computations, "transformer": computed})


def mesh_of(config: Config) -> Mesh | None:
    """The mesh of a model's runs, None for one process."""
    return computation.of(config, "transformer").mesh


def rows_group(config: Config) -> Group:
    """The processes over which the rows of an evaluation are divided."""
    mesh = mesh_of(config)
    return None if mesh is None else mesh.group("guidance")


def divide_rows(network: Callable[..., Tensor], group: Group) -> Callable[..., Tensor]:
    """network(params, x, *rest) of x (rows, ...), of which each process computes some rows.

    params: what all rows need; a leaf of `rest` with as many rows as x is divided, another one is not. Guidance puts
    its conditionings into rows: on two processes one has the prompts, the other the negative prompts. Raises ValueError
    for fewer rows than processes.
    """
    if group is None:
        return network

    def divided(params: Tree, x: Tensor, *rest: Tree) -> Tensor:
        count, processes = len(x), group_size(group)
        if count < processes:
            raise ValueError(
                f"the mesh has guidance={processes}, but an evaluation of {count} row{'s' * (count > 1)}: one for each "
                "image, and with guidance (cfg above 1) one for its negative prompt"
            )
        sizes = part_sizes(count, group)

        def own(leaf: Any) -> Any:
            has_rows = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count
            return take(leaf, group, 0, sizes) if has_rows else enter(leaf, group)

        velocity = network(enter(params, group), own(x), *(trees.map(own, each) for each in rest))
        return join(velocity, group, 0, sizes)

    return divided


Encode = Callable[[str], Conditioning]


def divide_encoders(
    config: Config, names: Sequence[str]
) -> Callable[[Sequence[str], Encode], list[Conditioning]] | None:
    """`encode_each` of `conditioning.apply_from` over a mesh: each text encoder on one process,
    which alone reads it, and sent to the others. Without derivatives in the encoders. None for one process."""
    mesh = mesh_of(config)
    if mesh is None or mesh.size() == 1:
        return None
    owners = encoder_owners(config, names, mesh.size())
    group = mesh.group()

    def encode(names: Sequence[str], compute: Encode) -> list[Conditioning]:
        # All of its own first, so that the processes encode at the same time.
        own = {name: compute(name) for name in names if owners[name] == mesh.rank}
        return [Conditioning(*_sent(own.get(name), owners[name], group)) for name in names]

    return encode


def encoder_owners(config: Config, names: Sequence[str], processes: int) -> dict[str, int]:
    """The process that has each text encoder: the largest first, each to the process with the least parameters."""
    sizes = {name: specs.count(SPECS[name](getattr(config, name))) for name in names}
    loads, owners = [0] * processes, {}
    for name in sorted(names, key=lambda name: -sizes[name]):
        owners[name] = min(range(processes), key=lambda rank: loads[rank])
        loads[owners[name]] += sizes[name]
    return owners


def _sent(own: Conditioning | None, owner: int, group: Group) -> list[Tensor]:
    """The context and pooled vector that `owner` has, on all processes."""
    place = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    header = torch.zeros(6, dtype=torch.int64, device=place)
    if own is not None:
        shapes = [*own.context.shape, *own.pooled.shape, _DTYPES.index(own.context.dtype)]
        header = torch.tensor(shapes, dtype=torch.int64, device=place)
    *shape, dtype = collectives.broadcast_from(header, group, owner).tolist()
    sent = []
    for index, size in enumerate((shape[:3], shape[3:])):
        empty = torch.empty(size, dtype=_DTYPES[dtype], device=place)
        sent.append(collectives.broadcast_from(empty if own is None else own[index].to(place), group, owner))
    return sent
