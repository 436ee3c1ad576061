"""Meshes: positions and groups of processes along named axes."""

import pytest
import torch

from functional_sd3.parallel import collectives, mesh


def positions(sizes):
    """Positions along single axes and data with fsdp, and the ranks of the groups."""
    grid = mesh.init(sizes)
    rank = torch.tensor([grid.rank])
    combinations = [(axis,) for axis in mesh.AXES] + [mesh.BATCH_AXES, ()]
    ranks = [collectives.all_gather(rank, grid.group(*axes)).tolist() for axes in combinations]
    indices = [grid.index(*axes) for axes in combinations]
    # A process's position in torch's group is its index along the axes.
    assert all(members[index] == grid.rank for members, index in zip(ranks, indices, strict=True))
    return indices, ranks


def test_the_innermost_axis_has_neighbouring_ranks(processes):
    results = processes(4, positions, {"tensor": 2, "data": 2})
    for rank, (indices, ranks) in enumerate(results):
        assert indices == [rank // 2, 0, 0, 0, rank % 2, rank // 2, rank]
        row, column = [rank - rank % 2, rank - rank % 2 + 1], [rank % 2, rank % 2 + 2]
        assert ranks == [column, [rank], [rank], [rank], row, column, [0, 1, 2, 3]]


def test_rows_of_a_batch_are_divided_over_data_and_fsdp(processes):
    results = processes(4, positions, {"data": 2, "fsdp": 2})
    assert [indices[-2] for indices, _ in results] == [0, 1, 2, 3]
    assert [ranks[1] for _, ranks in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def misfit():
    messages = []
    for sizes in ({"data": 3}, {"data": 2, "tensor": 2}, {"rows": 2}, {"data": 0}):
        with pytest.raises(ValueError) as error:
            mesh.init(sizes)
        messages.append(str(error.value))
    return messages


def test_a_mesh_that_does_not_fit_the_processes_is_refused(processes):
    for messages in processes(2, misfit):
        assert messages == [
            "the mesh data=3 is for 3 processes, but there are 2",
            "the mesh data=2,tensor=2 is for 4 processes, but there are 2",
            "mesh axes ['rows'] must be among data, fsdp, guidance, sequence, tensor",
            "sizes {'data': 0} of a mesh must be at least 1",
        ]


def test_one_process_is_a_mesh_without_torch_distributed():
    grid = mesh.init()
    assert grid.size() == 1 and grid.index("data", "fsdp") == 0 and grid.group() is None
    with pytest.raises(ValueError, match="mesh data=2 is for 2 processes, but there is 1"):
        mesh.init({"data": 2})
    with pytest.raises(ValueError, match="rows"):
        grid.size("rows")


def test_a_mesh_is_read_from_words():
    assert mesh.parse("data=2, fsdp=4") == {"data": 2, "fsdp": 4}
    assert mesh.describe({"fsdp": 4, "data": 2, "tensor": 1}) == "data=2,fsdp=4" and mesh.describe({}) == "data=1"
    for words in ("", "data", "data=", "data=0", "data=-1", "data=x", "rows=2", "data=2,", "data=٢"):
        with pytest.raises(ValueError, match="must be axis=size"):
            mesh.parse(words)
    with pytest.raises(ValueError, match="data is twice"):
        mesh.parse("data=2,data=2")
