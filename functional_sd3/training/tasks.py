"""Training tasks: first state, training step, batches and samples of what a run trains.

`flow_task` trains the transformer, with or without the text encoders, or a LoRA, on latents; `vae_task` trains the
autoencoder on images. `loop.run` runs either.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from functional_sd3.core import computation, prng, tree
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import path
from functional_sd3.flow.loss_weights import Weight
from functional_sd3.image import pixels, vae
from functional_sd3.layouts.components import SPECS, Config, require
from functional_sd3.parallel import sharding
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh, own_rows
from functional_sd3.text import conditioning
from functional_sd3.text.completeness import check_encoders
from functional_sd3.training import (
    flow_learners,
    loop,
    objectives,
    optim,
    step,
    training_set,
    update_rule,
    validation,
)
from functional_sd3.training.flow_learners import Inversion
from functional_sd3.training.training_images import TrainingImages
from functional_sd3.training.training_set import TrainingSet
from functional_sd3.training.update_rule import UpdateRule
from functional_sd3.transformer import controlnet
from functional_sd3.transformer.control import Control
from functional_sd3.weights.model import Model, Tokenizers

ENCODERS = ("clip_l", "clip_g", "t5")


class Generate(Protocol):
    """Images (len(prompts), 3, height, width) in [0, 1] of prompts, as `pipeline.generate` makes them."""

    def __call__(
        self,
        params: Params,
        config: Config,
        tokenizers: Tokenizers,
        prompts: Sequence[str],
        key: Key,
        *,
        height: int,
        width: int,
        t5_length: int,
    ) -> Tensor: ...


class TrainingTask(NamedTuple):
    """A training run: the arguments of `loop.run`, and the model and samples of its states.

    batch: step number -> batch. model: state -> the whole model with the averaged parameters. sample: state -> images
    (batch, 3, height, width) in [0, 1]. trained: names of the trained components, empty where the result is no model.
    validate: state -> the losses of images that are held out, `validation.NAMES`. whole, shard: from the state of this
    process to the whole one, which all processes call, and back; `model` and `sample` are of whole states.
    """

    state: step.TrainState
    train_step: Callable[[step.TrainState, Tree], tuple[step.TrainState, objectives.Metrics]]
    batch: Callable[[int], Tree]
    model: Callable[[step.TrainState], Model]
    sample: Callable[[step.TrainState], Tensor]
    trained: tuple[str, ...]
    validate: Callable[[step.TrainState], objectives.Metrics] | None = None
    whole: Callable[[step.TrainState], step.TrainState] = lambda state: state
    shard: Callable[[step.TrainState], step.TrainState] = lambda state: state


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a run.

    rate: peak learning rate. schedule: "cosine" decays from `rate` to a tenth of it at `steps`; "constant" does not
    depend on `steps`. ema: decay of the parameters' moving average. decay: AdamW's weight decay. clip: largest global
    norm of a gradient. dropout: probability of the empty prompt. density, shift (None: the model's), weight: of the
    training times and their losses, as `objectives.flow_loss` says. prior_weight: of images that preserve the prior.
    scratch: start from fresh parameters. lora: rank of a LoRA that is trained instead of the parameters, 0 for none;
    control: config of a ControlNet that is; inversion: a word whose vectors are. edges, latent_noise: of the
    autoencoder's objective, as `objectives.vae_loss` says of `edges` and `noise`. dtype: of the computation, None for
    float32. rule: optimiser and dtype of what learns.
    """

    steps: int
    batch: int
    rate: float
    warmup: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    ema: float = 0.999
    decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    dropout: float = 0.1
    density: Callable[[Key, tuple[int, ...]], Tensor] = path.logit_normal
    shift: float | None = None
    weight: Weight | None = None
    prior_weight: float = 1.0
    scratch: bool = False
    text_encoders: bool = False
    decoder_only: bool = False
    edges: float = 0.0
    latent_noise: float = 1.0
    lora: int = 0
    control: controlnet.Config | None = None
    inversion: Inversion | None = None
    dtype: torch.dtype | None = None
    compile: bool = False
    rule: UpdateRule = UpdateRule()


def flow_task(
    key: Key,
    model: Model,
    captions: Sequence[str],
    data: TrainingSet,
    settings: Settings,
    *,
    generate: Generate,
    prior: TrainingSet | None = None,
    held_out: TrainingSet | None = None,
    mesh: Mesh = ONE_PROCESS,
) -> TrainingTask:
    """Rectified-flow training of the transformer, and with `settings.text_encoders` of the encoders too; or of a LoRA,
    a ControlNet or a word's vectors, with the rest frozen.

    captions, data: of the images. prior: of images that preserve the prior; every batch has as many of them besides.
    held_out: of images that are validated on. Trained components of `model.params` are float32, the others of any
    dtype, in which they are used; the base of a LoRA, ControlNet or word is in `settings.dtype` (None: float32).
    Encoders that are not trained encode each batch without gradients; where `data` holds no ids none is needed.
    generate: draws the samples, `pipeline.generate`. mesh: the processes that share every batch, of which this one
    makes its own rows; with an axis "fsdp" whole components that learn are sharded over it, and along "sequence" the
    transformer's loss divides the tokens of every image.
    """
    if "ids" in data.text.empty:
        check_encoders([name for name in ENCODERS if name in model.params], model.tokenizers)
    init_key, run_key, order_key, sample_key = prng.split(key, 4)
    learner = _learner(init_key, model, settings)
    # Closures take functions of the learner, not the learner, which would keep the parameters at the start.
    whole, has_encoders = learner.model, learner.has_encoders
    start = whole(learner.params)
    layout = None
    # Samples are drawn by one process alone, so that the mesh is in the config of the loss only.
    divided = model if mesh.size("sequence") == 1 else model._replace(config=_with_mesh(model.config, mesh))
    if divided is not model:
        learner = learner._replace(loss=_learner(init_key, divided, settings).loss)
    if mesh.size("fsdp") > 1 and learner.trained:
        layout = sharding.layout(learner.spec, mesh)
        sharded = _with_gathering(divided, layout, mesh)
        loss_of = flow_learners.components(init_key, sharded, learner.trained, False).loss
        learner = learner._replace(params=sharding.shard(learner.params, layout, mesh), loss=loss_of)
    config, tokenizers = start.config, start.tokenizers
    device = tree.leaves(model.params)[0].device
    frozen = {name: tensors for name, tensors in model.params.items() if name not in learner.trained}

    def text_inputs(text: Tree) -> Tree:
        text = tree.to(text, device)
        if has_encoders:
            return text
        with torch.no_grad():
            encoded = conditioning.encode(frozen, config, text["ids"])._asdict() if "ids" in text else text
            # The encoders may be stored in another dtype than the transformer is computed in.
            return tree.cast(encoded, settings.dtype or torch.float32)

    def inputs(source: TrainingSet, samples: Tensor) -> Tree:
        entries = training_set.batch_of(source, samples)
        text = {name: entries.pop(name) for name in source.text.empty}
        return tree.to(entries, device) | text_inputs(text)

    objective: Callable[..., objectives.Loss] = objectives.flow_loss
    if prior is not None:
        objective = functools.partial(objectives.prior_loss, prior_weight=settings.prior_weight)
    model_shift = config.schedule.shift if config.schedule else 1.0
    loss = learner.loss(
        objective,
        density=settings.density,
        shift=model_shift if settings.shift is None else settings.shift,
        weight=settings.weight,
        dropout=settings.dropout,
        empty=text_inputs(data.text.empty),
        dtype=settings.dtype,
    )
    order = training_set.sample_order(data, order_key, settings.batch)
    batch = lambda number: inputs(data, own_rows(order(number), mesh))  # noqa: E731
    if prior is not None:
        batch = _with_prior(batch, prior, inputs, prng.fold_in(order_key, 1), settings.batch, mesh)

    def sample(state: step.TrainState) -> Tensor:
        rows = [index * len(captions) // 4 for index in range(4)]
        height, width = (side * vae.factor(require(config, "vae")) for side in data.latents.size)
        options: dict[str, Any] = {}
        if settings.control is not None:
            views = data.latents.views * torch.tensor(rows, dtype=torch.int64, device="cpu")
            latents = data.extra(views)["control"].to(device)
            options["control"] = [Control(state.ema["controlnet"], settings.control, latents)]
        with torch.no_grad():
            return generate(
                whole(state.ema).params, config, tokenizers, [captions[row] for row in rows], sample_key,
                height=height, width=width, t5_length=data.text.t5_length, **options,
            )  # fmt: skip

    task = _task(
        run_key, learner.params, loss, settings, step.trainable(learner.spec), batch,
        lambda state: whole(state.ema), sample, learner.trained, mesh, layout,
    )  # fmt: skip
    if held_out is None:
        return task
    plain = learner.loss(objectives.flow_loss, dtype=settings.dtype)
    validate = validation.validator(
        plain, functools.partial(inputs, held_out), held_out.latents.buckets, settings.batch, prng.fold_in(run_key, 1),
        views=held_out.latents.views,
    )  # fmt: skip
    return task._replace(validate=lambda state: validate(state.ema))


def _learner(key: Key, model: Model, settings: Settings) -> flow_learners.FlowLearner:
    if settings.control is not None:
        return flow_learners.control(key, model, settings.control)
    if settings.inversion is not None:
        return flow_learners.word(model, settings.inversion)
    names = [name for name in ENCODERS if name in model.params and settings.text_encoders] + ["transformer"]
    if settings.lora:
        return flow_learners.adapter(key, model, settings.lora, names)
    return flow_learners.components(key, model, names, settings.scratch)


def _with_mesh(config: Config, mesh: Mesh) -> Config:
    """The config by which the processes of the mesh compute the transformer together."""
    computed = replace(computation.of(config, "transformer"), mesh=mesh)
    return replace(config, computations={**config.computations, "transformer": computed})


def _with_gathering(model: Model, layout: sharding.Layout, mesh: Mesh) -> Model:
    """The model with a config by which the blocks of sharded components are gathered, each before it is computed."""
    computations = dict(model.config.computations)
    for name, placements in layout.items():
        computed = computation.of(model.config, name)
        if computed.materialize is not None:
            raise ValueError(f"the blocks of {name} are materialised otherwise already; they cannot be sharded too")
        computations[name] = replace(computed, materialize=sharding.materialize(placements, mesh))
    return model._replace(config=replace(model.config, computations=computations))


def _with_prior(
    batch: Callable[[int], Tree],
    prior: TrainingSet,
    inputs: Callable[[TrainingSet, Tensor], Tree],
    key: Key,
    size: int,
    mesh: Mesh,
) -> Callable[[int], Tree]:
    """Batches with as many images of `prior`, in turn with their own: equal parts of a batch have equal shares."""
    order = training_set.sample_order(prior, key, size)

    def interleaved(number: int) -> Tree:
        subject, preserved = batch(number), inputs(prior, own_rows(order(number), mesh))
        if "mask" in subject:
            preserved["mask"] = torch.ones_like(subject["mask"])
        both = tree.map(lambda one, other: torch.stack([one, other], 1).flatten(0, 1), subject, preserved)
        is_prior = torch.arange(len(both["latents"]), dtype=torch.int64, device=both["latents"].device) % 2
        return {**both, "prior": is_prior}

    return interleaved


def vae_task(
    key: Key, model: Model, images: TrainingImages, settings: Settings, *, mesh: Mesh = ONE_PROCESS
) -> TrainingTask:
    """Training of the autoencoder on images; from scratch, scaling and shift are measured by `TrainingTask.model`.

    A transformer needs the latents of the encoder it was trained with: `settings.decoder_only` freezes the encoder.
    """
    config, sizes = model.config, require(model.config, "vae")
    init_key, run_key, order_key = prng.split(key, 3)
    params = flow_learners.initial_params(init_key, model, ["vae"], settings.scratch)["vae"]
    device = tree.leaves(params)[0].device
    order = loop.order(order_key, settings.batch, len(images.captions))

    def load(rows: Sequence[int] | Tensor) -> Tensor:
        return pixels.to_signed(pixels.from_bytes(images.load(rows))).to(device)

    def averaged_model(state: step.TrainState) -> Model:
        vae_config = _with_measured_scaling(state.ema) if settings.scratch else sizes
        return model._replace(
            config=replace(config, vae=vae_config), params=flow_learners.in_order({**model.params, "vae": state.ema})
        )

    def _with_measured_scaling(params: Params) -> vae.Config:
        with torch.no_grad():
            rows = range(min(len(images.captions), 256))
            means = torch.cat([vae.encode(params, sizes, load([row])).mean for row in rows])
        scaling, shift = float(1.0 / means.std().clamp_min(1e-6)), float(means.mean())
        return replace(sizes, scaling=round(scaling, 4), shift=round(shift, 4))

    def sample(state: step.TrainState) -> Tensor:
        originals = load(range(min(len(images.captions), 4)))
        with torch.no_grad():
            decoded = vae.decode(state.ema, sizes, vae.encode(state.ema, sizes, originals).mean)
        return pixels.from_signed(torch.cat([originals, decoded]))

    trainable = step.trainable(SPECS["vae"](sizes), "decoder.*" if settings.decoder_only else "*")
    loss = objectives.vae_loss(sizes, edges=settings.edges, noise=settings.latent_noise, dtype=settings.dtype)
    batch = lambda number: {"images": load(own_rows(order(number), mesh))}  # noqa: E731
    return _task(run_key, params, loss, settings, trainable, batch, averaged_model, sample, ("vae",), mesh)


def learning_rate(settings: Settings) -> optim.Schedule:
    """The learning rate of a run as a function of the steps done."""
    if settings.schedule == "constant":
        return optim.warmup_constant(settings.rate, settings.warmup)
    warmup = min(settings.warmup, settings.steps - 1)
    return optim.warmup_cosine(settings.rate, warmup, settings.steps, 0.1 * settings.rate)


def _task(
    key: Key,
    params: Params,
    loss: objectives.Loss,
    settings: Settings,
    trainable: Callable[[str, Any], bool],
    batch: Callable[[int], Tree],
    model: Callable[[step.TrainState], Model],
    sample: Callable[[step.TrainState], Tensor],
    trained: tuple[str, ...],
    mesh: Mesh = ONE_PROCESS,
    layout: sharding.Layout | None = None,
) -> TrainingTask:
    rate = learning_rate(settings)
    # A word's vectors are not pulled to zero.
    decay = 0.0 if settings.inversion is not None else settings.decay
    optimizer = update_rule.optimizer(settings.rule, rate, clip=settings.clip, decay=decay, b2=0.99)
    train_step = update_rule.train_step(
        settings.rule,
        loss,
        optimizer,
        rate,
        trainable=trainable,
        ema_decay=settings.ema,
        accumulate=settings.accumulate,
        compile=settings.compile,
        mesh=mesh,
        layout=layout,
        own_rows=True,
    )
    params = tree.cast(params, settings.rule.weights)
    task = TrainingTask(
        step.init(key, params, optimizer, trainable=trainable), train_step, batch, model, sample, trained
    )
    if layout is None:
        return task
    placements = sharding.state_layout(task.state, layout, mesh)
    return task._replace(
        whole=lambda state: sharding.whole(state, placements, mesh),
        shard=lambda state: sharding.shard(state, placements, mesh),
    )
