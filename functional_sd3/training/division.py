"""Components of a model divided over a mesh: this process's parts of their parameters, and how they are computed.

Trained and frozen parameters are divided alike. `model.params` has the parts, and the config has their layout
they are parts and how one block of them is gathered inside the function that is rematerialised (`core.computation`):
objectives and pipeline compute with them as with whole ones, and nothing is whole on a process but one block.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch

from functional_sd3.core import computation, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.layouts.components import SPECS, Config, require
from functional_sd3.parallel import sharding, tensor
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.placement import Layout, Placement
from functional_sd3.weights.model import Model

TRANSFORMER: Final = "transformer"
"""The component that "tensor" and "sequence" divide."""


def has_parts(mesh: Mesh) -> bool:
    """True if a process has parts of parameters."""
    return mesh.size("fsdp", "tensor") > 1


def is_joint(mesh: Mesh) -> bool:
    """True if processes compute together what one draws: samples are then drawn by all of them."""
    return mesh.size("fsdp", "sequence", "tensor") > 1


def part_spec(name: str, config: Any, mesh: Mesh) -> Tree:
    """Spec of a component, of its part over "tensor" where it has one. Raises ValueError where it does not divide."""
    described = SPECS[name](config)
    return tensor.part_spec(described, mesh, heads=config.heads) if name == TRANSFORMER else described


def layout(name: str, config: Any, mesh: Mesh) -> Layout:
    """Layout of the leaves of a component."""
    return sharding.layout(part_spec(name, config, mesh), mesh, is_cut=name == TRANSFORMER)


class Part:
    """This process's part of a component: of its whole parameters, or of a block or all but the blocks of them, which
    may be stored with scales."""

    def __init__(self, name: str, config: Any, mesh: Mesh) -> None:
        self.name, self.config, self.mesh = name, config, mesh
        self.spec, self.layout = SPECS[name](config), layout(name, config, mesh)

    def __call__(self, params: Params) -> Params:
        return self._of(params, self.spec, self.layout)

    def block(self, number: int, block: Params) -> Params:
        """The part of a block."""
        return self._of(block, self.spec["blocks"][number], self.layout["blocks"][number])

    def rest(self, rest: Params) -> Params:
        """The part of everything that is in no block."""
        spec, layout = ({name: tree[name] for name in rest} for tree in (self.spec, self.layout))
        return self._of(rest, spec, layout)

    def _of(self, params: Tree, spec: Tree, layout: Layout) -> Tree:
        is_cut = self.name == TRANSFORMER
        own = tensor.cut(params, spec, self.mesh, heads=self.config.heads) if is_cut else params
        return sharding.shard_known(own, layout, self.mesh)


def with_parts(config: Config, names: Iterable[str], mesh: Mesh) -> Config:
    """The config by which parts of these components are computed, and by which the transformer is where its work is
    divided; it is the config itself for a mesh of data alone."""
    computations = dict(config.computations)
    for name in names:
        computed = computation.of(config, name)
        if has_parts(mesh):
            own = layout(name, getattr(config, name), mesh)
            gather = sharding.materialize(own, mesh) if mesh.size("fsdp") > 1 else None
            steps = [step for step in (computed.materialize, gather) if step is not None]
            gathered = computation.then(*steps) if len(steps) > 1 else next(iter(steps), None)
            computed = replace(computed, materialize=gathered, layout=own)
        if name == TRANSFORMER and mesh.size("sequence", "tensor") > 1:
            computed = replace(computed, mesh=mesh)
        if computed != computation.of(config, name):
            computations[name] = computed
    return replace(config, computations=computations)


def divide(model: Model, names: Iterable[str], mesh: Mesh) -> Model:
    """A whole model with these components in parts."""
    names, params = tuple(names), dict(model.params)
    for name in names if has_parts(mesh) else ():
        params[name] = Part(name, getattr(model.config, name), mesh)(params[name])
    return model._replace(params=params, config=with_parts(model.config, names, mesh))


def layouts(config: Config, names: Iterable[str]) -> dict[str, Layout] | None:
    """The layouts of those of these components that are parts; None where all are whole."""
    by_name = {name: computation.of(config, name).layout for name in names}
    return {name: own for name, own in by_name.items() if own is not None} or None


def shapes(config: Config, params: Params) -> dict[str, tuple[int, ...]] | None:
    """Path -> shape of the whole leaf, over "fsdp", of the components that are parts; None where all are whole."""
    by_name = layouts(config, params)
    return by_name and {
        f"{name}.{path}": placement.shape
        for name, own in by_name.items()
        for path, placement in tree.flatten_paths(own).items()
    }


def init(
    key: Key, name: str, config: Config, mesh: Mesh, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> Params:
    """Initial parameters of a component, this process's part where the config divides it."""
    sizes, own = getattr(config, name), computation.of(config, name).layout
    if own is None:
        return specs.init(key, SPECS[name](sizes), dtype=dtype, device=device)
    return sharding.init(key, part_spec(name, sizes, mesh), own, mesh, dtype=dtype, device=device)


def adapter_spec(spec: Tree, config: Config, mesh: Mesh) -> tuple[Tree, Layout | None]:
    """The spec of a LoRA's part, {component: ...}, and its layout; None where it is whole, as it is over "fsdp": it is
    small."""
    if mesh.size("tensor") == 1 or TRANSFORMER not in spec:
        return spec, None
    heads = require(config, TRANSFORMER).heads
    own = {**spec, TRANSFORMER: tensor.part_spec(spec[TRANSFORMER], mesh, heads=heads)}

    def place(path: str, param: Param) -> Placement:
        is_cut = path.startswith(TRANSFORMER + ".")
        return Placement(param.shape, None, tensor.cut_of(param) if is_cut else None)

    return own, specs.map_params(place, own)


class StateDivision(NamedTuple):
    """Functions from this process's part of a state to the whole one, which all processes call, and back.

    placements: of its leaves, None where every process has all of them.
    """

    whole: Callable[[Any], Any] = lambda state: state
    shard: Callable[[Any], Any] = lambda state: state
    placements: Tree | None = None


def of_state(state: Any, layout: Layout | None, mesh: Mesh) -> StateDivision:
    """Division of a state; layout: of the parameters that learn, None where they are whole on every process."""
    if layout is None or not has_parts(mesh):
        return StateDivision()
    placements = sharding.state_layout(state, layout, mesh)
    return StateDivision(
        lambda state: sharding.whole(state, placements, mesh),
        lambda state: sharding.shard(state, placements, mesh),
        placements,
    )
