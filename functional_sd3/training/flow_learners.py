"""Learners of the flow loss: the transformer (and text encoders), a LoRA, a ControlNet or a word's vectors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3 import lora
from functional_sd3.core import computation, prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.layouts.components import SPECS, Config, require
from functional_sd3.parallel import sharding
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh
from functional_sd3.parallel.placement import Layout, Placement
from functional_sd3.text import textual_inversion
from functional_sd3.text.textual_inversion import Word
from functional_sd3.training import division, objectives
from functional_sd3.transformer import controlnet
from functional_sd3.weights import quantize
from functional_sd3.weights.model import Model

Objective = Callable[..., objectives.Loss]
"""`objectives.flow_loss`, or one that takes its options: `prior_loss` with its own given."""


@dataclass(frozen=True)
class Inversion:
    """A new word: what is typed, the text that it starts from, its vectors, and the encoders that get them."""

    token: str
    initial: str
    vectors: int = 1
    encoders: tuple[str, ...] = ("clip_l", "clip_g")


class FlowLearner(NamedTuple):
    """Trained parameters at the start, and the functions that make a loss and a model of them.

    params, spec: of what is trained. loss: objective, its options -> loss of `params`. model: params -> the whole
    model, as it draws. trained: names of the trained components, empty where the result is no model. has_encoders:
    whether a batch is of ids, since the conditioning depends on `params`. layout: of `params` where they are parts over
    a mesh, None where they are whole on every process.
    """

    params: Params
    spec: Tree
    loss: Callable[..., objectives.Loss]
    model: Callable[[Params], Model]
    trained: tuple[str, ...] = ()
    has_encoders: bool = False
    layout: Layout | None = None


def components(key: Key, model: Model, names: Sequence[str], scratch: bool, mesh: Mesh = ONE_PROCESS) -> FlowLearner:
    """Learner of whole components, the transformer and any encoders; scratch: fresh parameters. mesh: over which the
    model is divided (`division.divide`)."""
    spec = {name: SPECS[name](getattr(model.config, name)) for name in names}
    frozen = {name: tensors for name, tensors in model.params.items() if name not in names}

    # Without the parameters at the start, which a run would hold beside its own.
    rest = model._replace(params=frozen)

    def loss(objective: Objective, **options) -> objectives.Loss:
        return objective(rest.config, **options)

    def whole(learned: Params) -> Model:
        return rest._replace(params=in_order({**frozen, **learned}))

    params = initial_params(key, model, names, scratch, mesh)
    layout = division.layouts(model.config, names)
    return FlowLearner(params, spec, loss, whole, tuple(names), len(names) > 1, layout)


def adapter(key: Key, model: Model, rank: int, names: Sequence[str], mesh: Mesh = ONE_PROCESS) -> FlowLearner:
    """Learner of a fresh LoRA of the attentions of these components. mesh: as in `components`."""
    # The frozen base stays out of the state: it needs no average and no copy in checkpoints.
    spec = {name: SPECS[name](getattr(model.config, name)) for name in names}
    spec = lora.spec(spec, rank, [f"{name}.blocks.*attention*" for name in names])
    spec, layout = division.adapter_spec(spec, model.config, mesh)
    shapes = division.shapes(model.config, model.params)

    def loss(objective: Objective, **options) -> objectives.Loss:
        own = objective(model.config, **options)
        return lambda learned, batch, keys: own(
            lora.apply(model.params, learned, lazy=True, shapes=shapes), batch, keys
        )

    params = specs.init(key, spec, device=_device(model))
    # Nothing is added to a weight that is stored with a scale, or elsewhere.
    lazy = any(
        quantize.is_quantized(model.params[name]) or computation.of(model.config, name).materialize for name in names
    )
    merged = lambda learned: model._replace(  # noqa: E731
        params=lora.apply(model.params, learned, lazy=lazy, shapes=shapes)
    )
    return FlowLearner(params, spec, loss, merged, has_encoders=len(names) > 1, layout=layout)


def control_config(config: Config, kind: str, depth: int | None = None) -> controlnet.Config:
    """Config of a ControlNet of joint blocks like the transformer's first `depth`, by default half of them.

    Raises ValueError for a depth that is not from 1 to one block less than the transformer has: its last one differs.
    """
    sizes = require(config, "transformer")
    depth = max(1, sizes.depth // 2) if depth is None else depth
    if not 1 <= depth < sizes.depth:
        raise ValueError(
            f"a ControlNet of {depth} blocks (--control-depth) cannot be copied from a transformer of {sizes.depth}: "
            f"give 1 to {sizes.depth - 1}, as its last block has no context to go on with"
        )
    names = ("heads", "head_dim", "patch_size", "in_channels", "context_width", "pooled_width", "position_size",
             "sample_size", "qk_norm")  # fmt: skip
    return controlnet.Config(
        depth=depth,
        dual_attention_layers=tuple(index for index in sizes.dual_attention_layers if index < depth),
        kind=kind,
        **{name: getattr(sizes, name) for name in names},
    )


def control(key: Key, model: Model, net: controlnet.Config, mesh: Mesh = ONE_PROCESS) -> FlowLearner:
    """Learner of a ControlNet copied from the transformer, its new layers zero (`controlnet.copy_transformer`). mesh:
    as in `components`, of which "tensor" is not for ControlNets."""
    described, device = controlnet.spec(net), _device(model)
    is_divided = division.layouts(model.config, ["transformer"]) is not None
    layout = sharding.layout(described, mesh) if is_divided else None
    fresh = (
        specs.init(key, described, device=device)
        if layout is None
        else (sharding.init(key, described, layout, mesh, device=device))
    )
    params = controlnet.copy_transformer(
        fresh, net, tree.cast(model.params["transformer"], torch.float32), require(model.config, "transformer")
    )
    computed = None if layout is None else sharding.materialize(layout, mesh)

    def loss(objective: Objective, **options) -> objectives.Loss:
        own = objectives.controlnet_loss(model.config, net, objective=objective, materialize=computed, **options)
        transformer = {"transformer": model.params["transformer"]}
        return lambda learned, batch, keys: own({**transformer, **learned}, batch, keys)

    layouts = None if layout is None else {"controlnet": layout}
    return FlowLearner({"controlnet": params}, {"controlnet": described}, loss, lambda learned: model, layout=layouts)


def word(model: Model, inversion: Inversion, mesh: Mesh = ONE_PROCESS) -> FlowLearner:
    """Learner of the vectors of a new word, started from the embeddings of another. mesh: as in `components`.

    Raises ValueError where the word is a token already, its encoders are absent, or nothing is known to start from.
    """
    start = textual_inversion.initial_vectors(
        model.params, model.tokenizers, inversion.initial, inversion.encoders, inversion.vectors
    )
    first = textual_inversion.first_ids(model.tokenizers, inversion.encoders)

    def with_word(learned: Params) -> Model:
        added = textual_inversion.add(
            model.params, model.config, model.tokenizers, Word(inversion.token, learned["word"])
        )
        return model._replace(**added._asdict())

    extended = with_word({"word": start})

    def loss(objective: Objective, **options) -> objectives.Loss:
        # Without the autoencoder, which no loss reads.
        read = {name: part for name, part in model.params.items() if name not in ("vae", "taesd")}
        own = objectives.inversion_loss(extended.config, read, first, objective=objective, **options)
        return lambda learned, batch, keys: own(learned["word"], batch, keys)

    spec = {name: Param(tuple(leaf.shape), specs.zeros, ("vocab", "width")) for name, leaf in start.items()}
    layout = None
    if mesh.size("tensor") > 1:
        layout = {"word": specs.map_params(lambda path, param: Placement(param.shape), spec)}
    return FlowLearner({"word": start}, {"word": spec}, loss, with_word, has_encoders=True, layout=layout)


def adapter_and_word(
    key: Key, model: Model, rank: int, names: Sequence[str], inversion: Inversion, mesh: Mesh = ONE_PROCESS
) -> FlowLearner:
    """Learner of a fresh LoRA and of the vectors of a new word at once, as `adapter` and `word` have them ("pivotal
    tuning"): the word names what the LoRA learns to draw."""
    of_lora, of_word = adapter(key, model, rank, names, mesh), word(model, inversion, mesh)
    shapes = division.shapes(model.config, model.params)
    first = textual_inversion.first_ids(model.tokenizers, inversion.encoders)
    extended = with_tokens(model, inversion)

    def parts(learned: Params) -> tuple[Params, Params]:
        return {name: part for name, part in learned.items() if name != "word"}, learned["word"]

    def loss(objective: Objective, **options) -> objectives.Loss:
        # Without the autoencoder, which no loss reads.
        read = {name: part for name, part in model.params.items() if name not in ("vae", "taesd")}
        own = objective(extended.config, **options)

        def of_both(learned: Params, batch: Tree, keys: Key) -> tuple[Tensor, objectives.Metrics]:
            adapters, vectors = parts(learned)
            adapted = lora.apply(read, adapters, lazy=True, shapes=shapes)
            return own(textual_inversion.with_vectors(adapted, vectors, first), batch, keys)

        return of_both

    def whole(learned: Params) -> Model:
        adapters, vectors = parts(learned)
        adapted = of_lora.model(adapters)
        added = textual_inversion.add(*adapted, Word(inversion.token, vectors))
        return adapted._replace(**added._asdict())

    params, spec = {**of_lora.params, **of_word.params}, {**of_lora.spec, **of_word.spec}
    layout = None if of_lora.layout is None else {**of_lora.layout, **(of_word.layout or {})}
    return FlowLearner(params, spec, loss, whole, has_encoders=True, layout=layout)


def with_tokens(model: Model, inversion: Inversion) -> Model:
    """The model whose tokenizers and config have the word, and whose parameters do not: what captions are read by.

    Raises ValueError where the word is a token already, or an encoder of its is absent.
    """
    absent = [name for name in inversion.encoders if name not in model.params]
    if absent:
        raise ValueError(f"the model has no {' and no '.join(absent)} to learn {inversion.token!r} in")
    tables = textual_inversion.empty_tables(model.config, inversion.encoders)
    vectors = {
        name: torch.zeros(inversion.vectors, getattr(model.config, name).width, dtype=torch.float32, device="meta")
        for name in inversion.encoders
    }
    added = textual_inversion.add(tables, model.config, model.tokenizers, Word(inversion.token, vectors))
    return model._replace(config=added.config, tokenizers=added.tokenizers)


def initial_params(
    key: Key, model: Model, names: Sequence[str], scratch: bool, mesh: Mesh = ONE_PROCESS
) -> dict[str, Params]:
    """The model's parameters of these components, or fresh ones."""
    if not scratch:
        return {name: model.params[name] for name in names}
    device = _device(model)
    keys = prng.split(key, len(names))
    return {
        name: division.init(name_key, name, model.config, mesh, device=device)
        for name_key, name in zip(keys, names, strict=True)
    }


def in_order(params: dict[str, Params]) -> dict[str, Params]:
    """Components in the order of `SPECS`."""
    return {name: params[name] for name in SPECS if name in params}


def _device(model: Model):
    return tree.leaves(model.params)[0].device
