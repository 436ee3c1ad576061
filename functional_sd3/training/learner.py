"""Trained parameters of a model: its transformer, or a LoRA over it; and the frozen model at the start."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from functional_sd3 import lora
from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.layouts.components import SPECS, Config, require
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh
from functional_sd3.parallel.placement import Layout
from functional_sd3.training import division, step
from functional_sd3.transformer import mmdit
from functional_sd3.weights.model import Model


class Learner(NamedTuple):
    """Trained parameters, and the functions that make a whole model of them.

    params: at the start: {"transformer": ...}, or the tree of a LoRA. whole: params -> those of the whole model; of a
    LoRA with the adapters beside the weights, for training and drawing. merged: params -> those of the whole model,
    adapters added to the weights, for saving. start: the whole model's at the start, the LoRA off: the reference.
    trained: names of the trained components, () for a LoRA. layout: of `params` where they are parts over a mesh, None
    where they are whole on every process.
    """

    params: Params
    spec: Tree
    whole: Callable[[Params], Params]
    merged: Callable[[Params], Params]
    start: Params
    trained: tuple[str, ...]
    layout: Layout | None = None

    @property
    def trainable(self) -> tree.Chooser:
        """Chooser of the trained leaves of `params`."""
        return step.trainable(self.spec)


def with_extra(key: Key, learns: Learner, name: str, spec: Tree) -> Learner:
    """The learner with the objective's own parameters `name`, which are in no model: in `whole`, not in `merged`."""
    some = tree.leaves(learns.params)[0]
    own = specs.init(key, spec, device=some.device)

    def model_part(params: Params) -> Params:
        return {part: leaves for part, leaves in params.items() if part != name}

    return learns._replace(
        params={**learns.params, name: own},
        spec={**learns.spec, name: spec},
        whole=lambda params: {**learns.whole(model_part(params)), name: params[name]},
        merged=lambda params: learns.merged(model_part(params)),
    )


def extended(key: Key, model: Model, config: Config) -> Model:
    """The model with the config's transformer: parameters that it lacks are fresh, in the dtype of its others."""
    present, wanted = model.params["transformer"], SPECS["transformer"](config.transformer)
    absent = {name: part for name, part in wanted.items() if name not in present}
    some = tree.leaves(present["time"])[0]
    fresh = specs.init(prng.fold_in(key, 1), absent, dtype=some.dtype, device=some.device)
    transformer = {name: present.get(name, fresh.get(name)) for name in wanted}
    return model._replace(params={**model.params, "transformer": transformer}, config=config)


def with_weights(learns: Learner, dtype: torch.dtype) -> Learner:
    """The learner whose trained components are in `dtype`; what an objective learns beside them is as it is."""
    params = {name: tree.cast(part, dtype) if name in learns.trained else part for name, part in learns.params.items()}
    return learns._replace(params=params)


def learner(
    key: Key, model: Model, *, rank: int = 0, config: Config | None = None, mesh: Mesh = ONE_PROCESS
) -> Learner:
    """Learner of a model's transformer; with a `rank`, of a fresh LoRA of its attentions instead.

    config: of the learner, by default the model's; what its transformer has beyond the model's is fresh, and of a LoRA
    a difference from zeros. The trained transformer is float32; other components are used as they are. `model` is not
    written to. mesh: over which it is divided (`division.divide`); what the config has beyond it is whole.
    """
    config = config or model.config
    spec = {"transformer": SPECS["transformer"](config.transformer)}
    absent = {name: part for name, part in spec["transformer"].items() if name not in model.params["transformer"]}
    if rank:
        network = require(config, "transformer")
        start = {**model.params, "transformer": mmdit.with_interval(model.params["transformer"], network)}
    else:
        start = extended(key, model, config).params
    if not rank:
        params = {"transformer": start["transformer"]}
        together = lambda learned: {**start, **learned}  # noqa: E731
        layout = division.layouts(model.config, ["transformer"])
        return Learner(params, spec, together, together, start, ("transformer",), layout)
    spec = lora.spec(spec, rank, lora.ATTENTION)
    spec, layout = division.adapter_spec(spec, config, mesh)
    spec["transformer"] |= specs.map_params(lambda path, leaf: {"diff": leaf}, absent)
    params = specs.init(prng.fold_in(key, 0), spec, device=tree.leaves(start["transformer"])[0].device)
    shapes = division.shapes(model.config, model.params)
    lazily = lambda learned: lora.apply(start, learned, lazy=True, shapes=shapes)  # noqa: E731
    return Learner(params, spec, lazily, lambda learned: lora.apply(start, learned), start, (), layout)
