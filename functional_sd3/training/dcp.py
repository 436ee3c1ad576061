"""torch.distributed.checkpoint (DCP): states and parameters written for it, and read from what it wrote, on any mesh.

A leaf is under its path ("params.transformer.blocks.0..."). Parts of leaves are DTensors at this edge alone; what is
divided over "tensor", of which a part may be several ranges, is whole. DCP's index of a folder is a pickle: it is read
by an unpickler that makes nothing but the index.
"""

import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Tree
from functional_sd3.formats.errors import WeightsError
from functional_sd3.parallel import pieces, sharding
from functional_sd3.parallel.mesh import AXES, ONE_PROCESS, Mesh
from functional_sd3.parallel.placement import AXIS, Placement
from functional_sd3.training import sharded

_INDEX = ".metadata"


def save(folder: str | os.PathLike, state: Tree, *, placements: Tree | None = None, mesh: Mesh = ONE_PROCESS) -> None:
    """Write a tree as a folder that `torch.distributed.checkpoint.load` reads; all processes of the mesh call this.

    placements: of the leaves of which each has its part, None where each has all. Raises ValueError for a folder that
    is not empty, WeightsError where it cannot be written.
    """
    import torch.distributed.checkpoint as dcp

    if mesh.rank == 0 and Path(folder).is_dir() and os.listdir(folder):
        raise ValueError(f"{folder} is not empty: DCP's files go to a folder that is new or empty")
    flat = tree.flatten_paths(state)
    placed = sharded.placements_of(flat, placements)
    devices = _device_mesh(placed, flat, mesh)
    named = {name: _at_edge(leaf, placed[name], mesh, devices) for name, leaf in flat.items()}
    try:
        with _without_warnings():
            dcp.save(named, checkpoint_id=os.fspath(folder), no_dist=mesh.size() == 1)
    except (OSError, dcp.CheckpointException) as error:
        raise WeightsError(f"{folder}: cannot be written: {_first_line(error)}") from error


def load(folder: str | os.PathLike, like: Tree, *, placements: Tree | None = None, mesh: Mesh = ONE_PROCESS) -> Tree:
    """A tree from a folder that DCP wrote, in the structure and on the devices of `like`; all processes call this.

    placements: as in `save`, of any mesh. Each process reads its parts. Raises WeightsError, naming each path that is
    missing or of another shape or dtype, and for a folder that is none of DCP's.
    """
    import torch.distributed.checkpoint as dcp

    flat = tree.flatten_paths(like)
    placed = sharded.placements_of(flat, placements)
    reader = _reader(folder)
    _check(folder, reader.read_metadata(), flat, placed, mesh)
    devices = _device_mesh(placed, flat, mesh)
    named: dict[str, Any] = {}
    for name, leaf in flat.items():
        if placed[name].cut is None:
            named[name] = _at_edge(torch.empty_like(leaf), placed[name], mesh, devices)
        else:
            named[name] = leaf.new_empty(placed[name].whole_shape(mesh))
    try:
        with _without_warnings():
            dcp.load(named, storage_reader=reader, no_dist=mesh.size() == 1)
    except (OSError, dcp.CheckpointException) as error:
        raise WeightsError(f"{folder}: cannot be read: {_first_line(error)}") from error

    def own(name: str, leaf: Tensor) -> Tensor:
        value, placement = named.pop(name), placed[name]
        if placement.cut is not None:
            return pieces.cut(value, pieces.piece(placement, mesh))
        return value.to_local() if devices is not None and placement.dim is not None else value

    return tree.map_with_path(own, like)


def _device_mesh(placed: dict[str, Placement], flat: dict[str, Tensor], mesh: Mesh) -> Any:
    """torch's mesh of the same axes; None where no leaf is divided. All processes call it."""
    if all(placement.dim is None for placement in placed.values()):
        return None
    from torch.distributed.device_mesh import init_device_mesh

    device = next(iter(flat.values())).device.type
    return init_device_mesh(device, tuple(mesh.sizes[axis] for axis in AXES), mesh_dim_names=AXES)


def _at_edge(leaf: Tensor, placement: Placement, mesh: Mesh, devices: Any) -> Any:
    """A leaf as DCP takes it: a DTensor of a part, the whole of what "tensor" divides, or the leaf itself."""
    if placement.cut is not None:
        return sharding.whole({"leaf": leaf}, {"leaf": placement}, mesh)["leaf"]
    if placement.dim is None or devices is None:
        return leaf
    from torch.distributed.tensor import DTensor, Replicate, Shard

    along = [Shard(placement.dim) if axis == AXIS else Replicate() for axis in AXES]
    stride = torch.empty(placement.shape, dtype=leaf.dtype, device="meta").stride()
    return DTensor.from_local(
        leaf.contiguous(), devices, along, run_check=False, shape=torch.Size(placement.shape), stride=stride
    )


def _check(folder: Any, index: Any, flat: dict[str, Tensor], placed: dict[str, Placement], mesh: Mesh) -> None:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    problems = []
    for name, leaf in flat.items():
        entry, wanted = index.state_dict_metadata.get(name), (placed[name].whole_shape(mesh), leaf.dtype)
        if not isinstance(entry, TensorStorageMetadata):
            # Anything else is a pickle of any object.
            problems.append(f"{folder}: {name} is {'missing' if entry is None else 'no tensor'}")
        elif (tuple(entry.size), entry.properties.dtype) != wanted:
            theirs = f"{entry.properties.dtype} {list(entry.size)}"
            problems.append(f"{folder}: {name} is {theirs}, here it is {wanted[1]} {list(wanted[0])}")
    if problems:
        raise WeightsError(problems)


def _reader(folder: str | os.PathLike) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        """torch's, but that its index is read without running what a pickle names."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            path = Path(folder) / _INDEX
            try:
                with open(path, "rb") as file:
                    index = _IndexUnpickler(file).load()
                names = [str(info.relative_path) for info in index.storage_data.values()]
            except FileNotFoundError:
                raise WeightsError(f"{path}: is missing: the folder is none of torch.distributed.checkpoint") from None
            except Exception as error:
                raise WeightsError(f"{path}: cannot be read: {_first_line(error)}") from error
            if other := next((name for name in names if Path(name).name != name), None):
                raise WeightsError(f"{path}: names the file {other!r}, which is not beside it")
            if getattr(index, "storage_meta", None) is not None:
                index.storage_meta.load_id = self.load_id
            return index

    return Reader(folder)


class _IndexUnpickler(pickle.Unpickler):
    """Makes what an index of DCP is made of, and nothing else."""

    _KNOWN = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "collections": {"OrderedDict"},
        **dict.fromkeys(("pathlib", "pathlib._local"), {"PosixPath", "WindowsPath"}),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """The class or dtype of that name. Raises UnpicklingError for any that an index does not have."""
        if name in self._KNOWN.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no index of DCP has")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Context without the warning that a single process is one, though no_dist implies it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
