"""torch.distributed.checkpoint reads what is written for it, and the other way round, on any number of processes."""

import os
import pickle

import pytest
import torch
import torch.distributed as dist

from functional_sd3.core import prng, tree
from functional_sd3.parallel import mesh, pieces
from functional_sd3.parallel.placement import Placement
from functional_sd3.parallel.tensor import Cut
from functional_sd3.training import dcp
from functional_sd3.weights import WeightsError

SHAPES = {"qkv": (12, 4), "out": (4, 8), "bias": (3,)}


def state():
    leaves = {name: prng.normal(prng.fold_in(prng.key(5), i), shape) for i, (name, shape) in enumerate(SHAPES.items())}
    return {"params": leaves, "half": [leaves["out"].to(torch.bfloat16)], "step": torch.tensor(7)}


def placed(grid):
    dim, cut = (0 if grid.size("fsdp") > 1 else None), grid.size("tensor") > 1
    leaves = {
        "params.qkv": Placement((6, 4), dim, Cut(0, 3)) if cut else Placement((12, 4), dim),
        "params.out": Placement((4, 8), None if dim is None else 1),
    }
    return tree.map_with_path(lambda path, leaf: leaves.get(path, Placement(tuple(leaf.shape))), state())


def part_of(grid):
    return tree.map(lambda leaf, at: pieces.cut(leaf, pieces.piece(at, grid)), state(), placed(grid))


def write(sizes, folder):
    grid = mesh.init(sizes)
    dcp.save(folder, part_of(grid), placements=placed(grid), mesh=grid)


def read(sizes, folder):
    grid = mesh.init(sizes)
    like = tree.map(torch.zeros_like, part_of(grid))
    return tree.diff(dcp.load(folder, like, placements=placed(grid), mesh=grid), part_of(grid))


def read_by_torch(folder, alone=False):
    """As a program of its own would: whole tensors, and a DTensor divided in another way."""
    import torch.distributed.checkpoint as torch_dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, zeros

    values = {name: torch.zeros_like(leaf) for name, leaf in tree.flatten_paths(state()).items()}
    if not alone:
        values["params.out"] = zeros(4, 8, device_mesh=init_device_mesh("cpu", (2,)), placements=[Shard(0)])
    torch_dcp.load(values, checkpoint_id=folder, no_dist=alone)
    whole = {name: leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf for name, leaf in values.items()}
    return tree.diff(tree.unflatten_paths(whole), state())


def write_by_torch(folder):
    import torch.distributed.checkpoint as torch_dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    values = dict(tree.flatten_paths(state()))
    values["params.qkv"] = distribute_tensor(values["params.qkv"], init_device_mesh("cpu", (2,)), [Shard(1)])
    torch_dcp.save(values, checkpoint_id=folder)
    dist.barrier()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # PyTorch's own call, of one process.
def test_what_is_written_here_is_read_by_torch_and_on_any_mesh(processes, tmp_path):
    for index, sizes in enumerate([{"fsdp": 2}, {"tensor": 2}, {"data": 2}, {}]):
        folder = tmp_path / str(index)
        write(sizes, folder) if not sizes else processes(2, write, sizes, folder)
        assert processes(2, read_by_torch, folder) == [[], []] and read_by_torch(folder, alone=True) == []
        assert processes(2, read, {"fsdp": 2}, folder) == [[], []] and read({}, folder) == []
        assert processes(2, read, {"tensor": 2}, folder) == [[], []]


def test_what_torch_writes_is_read_here_on_any_mesh(processes, tmp_path):
    processes(2, write_by_torch, tmp_path / "theirs")
    for sizes in ({"fsdp": 2}, {"tensor": 2}, {"data": 2}):
        assert processes(2, read, sizes, tmp_path / "theirs") == [[], []]
    assert read({}, tmp_path / "theirs") == []


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_what_does_not_fit_or_would_run_is_refused(tmp_path, monkeypatch):
    write({}, tmp_path / "ours")
    with pytest.raises(ValueError, match="is not empty"):
        write({}, tmp_path / "ours")
    other = {**state(), "step": torch.tensor(7, dtype=torch.int32), "more": torch.zeros(2)}
    with pytest.raises(WeightsError) as caught:
        dcp.load(tmp_path / "ours", other)
    assert "step is torch.int64 [], here it is torch.int32 []" in str(caught.value) and "more is missing" in str(
        caught.value
    )
    with pytest.raises(WeightsError, match="none of torch.distributed.checkpoint"):
        dcp.load(tmp_path, state())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours" / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(WeightsError, match=r"names posix.mkdir, which no index of DCP has"):
        dcp.load(tmp_path / "ours", state())
    assert not (tmp_path / "harm").exists()
