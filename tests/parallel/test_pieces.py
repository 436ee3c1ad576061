"""Pieces of a leaf: any division is put together from any other."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.parallel import pieces
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh
from functional_sd3.parallel.pieces import Piece
from functional_sd3.parallel.placement import Placement
from functional_sd3.parallel.tensor import Cut

MESHES = [{}, {"data": 2}, {"fsdp": 2}, {"data": 2, "fsdp": 3}, {"tensor": 2}, {"fsdp": 2, "tensor": 3, "sequence": 2}]


def mesh_of(sizes):
    return Mesh({**ONE_PROCESS.sizes, **sizes})


@st.composite
def divisions(draw):
    """A mesh and the placement of a leaf of shape (36, 12), of which 3 matrices lie along the first dimension."""
    mesh = mesh_of(draw(st.sampled_from(MESHES)))
    shape, cut = [36, 12], None
    if mesh.size("tensor") > 1:
        cut = draw(st.sampled_from([None, Cut(0, 3), Cut(0, 1), Cut(1, 1), Cut(1, 2)]))
        if cut:
            shape[cut.dim] //= mesh.size("tensor")
    dim = draw(st.sampled_from([0, 1])) if mesh.size("fsdp") > 1 else None
    return mesh, Placement(tuple(shape), dim, cut)


def every(mesh, placement):
    return [pieces.piece(placement, replace(mesh, rank=rank)) for rank in range(mesh.size())]


@given(divisions(), divisions())
def test_the_pieces_of_one_mesh_are_put_together_from_those_of_another(one, other):
    whole = torch.arange(36 * 12).view(36, 12)
    written = pieces.writers({"w": one[1]}, {"w": 4}, one[0])["w"]
    held = [(pieces.cut(whole, part), part) for part in written]
    assert math.prod(whole.shape) == sum(part.numel() for part, _ in held)
    for wanted in every(*other):
        assert wanted.shape == (36, 12)
        assert torch.equal(pieces.assemble(wanted, held), pieces.cut(whole, wanted))
    assert torch.equal(pieces.assemble(Piece((36, 12)), held), whole)


@given(divisions())
def test_a_piece_is_what_sharding_leaves_a_process(division):
    mesh, placement = division
    for rank, part in enumerate(every(mesh, placement)):
        own = replace(mesh, rank=rank)
        value = torch.arange(36 * 12).view(36, 12)
        if placement.cut:
            # As `tensor.cut` does: of every matrix along the dimension its own rows.
            at, count = placement.cut, mesh.size("tensor")
            matrices = value.movedim(at.dim, 0).unflatten(0, (at.parts, count, -1))
            value = matrices[:, own.index("tensor")].flatten(0, 1).movedim(0, at.dim)
        if placement.dim is not None:
            value = value.chunk(mesh.size("fsdp"), placement.dim)[own.index("fsdp")]
        assert torch.equal(pieces.cut(torch.arange(36 * 12).view(36, 12), part), value)
        assert part.local_shape == placement.local_shape(own)


def test_what_is_read_is_what_overlaps():
    rows = [Piece((8, 2), ((0, ((start, start + 2),)),)) for start in range(0, 8, 2)]
    held = [(torch.full((2, 2), float(index)), part) for index, part in enumerate(rows)]
    held[0] = (torch.full((2, 2), math.nan), rows[0])
    wanted = Piece((8, 2), ((0, ((3, 5),)),))
    assert pieces.assemble(wanted, held).tolist() == [[1, 1], [2, 2]]
    with pytest.raises(ValueError, match="lacks 2 of 4 values"):
        pieces.assemble(wanted, [held[0], held[1], held[3]])
    assert pieces.assemble(Piece(()), [(torch.tensor(3), Piece(()))]).item() == 3


def test_writers_share_what_all_have():
    mesh = mesh_of({"data": 2, "fsdp": 2})
    layout = {f"w{index}": Placement((4, 4)) for index in range(8)} | {"cut": Placement((4, 4), 0)}
    plan = pieces.writers(layout, {name: 64 if name != "cut" else 32 for name in layout}, mesh)
    ranks = [rank for name, each in plan.items() for rank in each.values() if name != "cut"]
    assert sorted(ranks) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(plan["cut"]) == 2 and {rank % 2 for rank in plan["cut"].values()} == {0, 1}
