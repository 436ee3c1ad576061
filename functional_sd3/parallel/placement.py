"""Placement of a leaf over the mesh axes "fsdp" and "tensor": the description that layouts are made of."""

from dataclasses import dataclass

from functional_sd3.core import prng
from functional_sd3.core.types import Tree
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.tensor import Cut

AXIS = "fsdp"


@dataclass(frozen=True)
class Placement:
    """Shape of a whole leaf, and the dimension along which it is divided over "fsdp"; None: whole everywhere.

    cut: how it is divided over "tensor" before that (`tensor.cut_of`), None for not at all; the shape is the part's.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    cut: Cut | None = None

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """Shape of this process's part."""
        return self.shape if self.dim is None else tuple(self.part(mesh))

    @property
    def is_divided(self) -> bool:
        """True where a process has a part."""
        return self.dim is not None or self.cut is not None

    def whole_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """Shape of the leaf before it is divided over "tensor" too."""
        return tuple(
            size * mesh.size("tensor") if self.cut is not None and dim == self.cut.dim else size
            for dim, size in enumerate(self.shape)
        )

    def part(self, mesh: Mesh) -> prng.Part:
        """Part of the whole that this process has."""
        assert self.dim is not None
        size = self.shape[self.dim] // mesh.size(AXIS)
        return prng.Part(self.shape, self.dim, mesh.index(AXIS) * size, size)


Layout = Tree
"""A tree of `Placement`, like the parameters."""


def is_sharded(placement: Placement | None) -> bool:
    """True if a process has a part over "fsdp"; placement None: of a leaf that no layout has."""
    return placement is not None and placement.dim is not None
