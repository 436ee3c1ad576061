"""Rectified-flow training of the transformer, a LoRA, a ControlNet or a word's vectors on latents, as a task."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.image import vae
from functional_sd3.layouts.components import require
from functional_sd3.parallel import sharding
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh, own_rows
from functional_sd3.text import conditioning
from functional_sd3.text.completeness import check_encoders
from functional_sd3.training import flow_learners, objectives, step, tasks, training_set, validation
from functional_sd3.training.training_set import TrainingSet
from functional_sd3.transformer.control import Control
from functional_sd3.weights.model import Model


def flow_task(
    key: Key,
    model: Model,
    captions: Sequence[str],
    data: TrainingSet,
    settings: tasks.Settings,
    *,
    generate: tasks.Generate,
    prior: TrainingSet | None = None,
    held_out: TrainingSet | None = None,
    mesh: Mesh = ONE_PROCESS,
) -> tasks.TrainingTask:
    """Rectified-flow training of the transformer, and with `settings.text_encoders` of the encoders too; or of a LoRA,
    a ControlNet or a word's vectors, with the rest frozen.

    captions, data: of the images. prior: of images that preserve the prior; every batch has as many of them besides.
    held_out: of images that are validated on. Trained components of `model.params` are float32, the others of any
    dtype, in which they are used; the base of a LoRA, ControlNet or word is in `settings.dtype` (None: float32).
    Encoders that are not trained encode each batch without gradients; where `data` holds no ids none is needed.
    generate: draws the samples, `pipeline.generate`. mesh: the processes that share every batch, of which this one
    makes its own rows; `model` is divided over it (`division.divide`): what learns and what is frozen.
    """
    if "ids" in data.text.empty:
        check_encoders([name for name in tasks.ENCODERS if name in model.params], model.tokenizers)
    init_key, run_key, order_key, sample_key = prng.split(key, 4)
    learner = _learner(init_key, model, settings, mesh)
    # Closures take functions of the learner, not the learner, which would keep the parameters at the start.
    whole, has_encoders = learner.model, learner.has_encoders
    start = whole(learner.params)
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

    layout = learner.layout

    def drawn_control(params: Params) -> Params:
        return params if layout is None else sharding.whole(params, layout, mesh)

    def sample(state: step.TrainState) -> Tensor:
        rows, size, options = _evenly(range(len(captions))), data.latents.size, {}
        if settings.control is not None:
            # Control images are of the sizes of their buckets.
            rows = _evenly(training_set.commonest(data.latents.buckets))
            views = data.latents.views * torch.tensor(rows, dtype=torch.int64, device="cpu")
            latents = data.extra(views)["control"].to(device)
            size = (latents.shape[-2], latents.shape[-1])
            options["control"] = [Control(drawn_control(state.ema)["controlnet"], settings.control, latents)]
        height, width = (side * vae.factor(require(config, "vae")) for side in size)
        with torch.no_grad():
            return generate(
                whole(state.ema).params, config, tokenizers, [captions[row] for row in rows], sample_key,
                height=height, width=width, t5_length=data.text.t5_length, **options,
            )  # fmt: skip

    task = tasks.make_task(
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


def _evenly(images: Sequence[int]) -> list[int]:
    """Four of the images, at even distances."""
    return [images[index * len(images) // 4] for index in range(4)]


def _learner(key: Key, model: Model, settings: tasks.Settings, mesh: Mesh) -> flow_learners.FlowLearner:
    if settings.control is not None:
        return flow_learners.control(key, model, settings.control, mesh)
    if settings.inversion is not None and not settings.lora:
        return flow_learners.word(model, settings.inversion, mesh)
    names = [name for name in tasks.ENCODERS if name in model.params and settings.text_encoders] + ["transformer"]
    if settings.inversion is not None:
        return flow_learners.adapter_and_word(key, model, settings.lora, names, settings.inversion, mesh)
    if settings.lora:
        return flow_learners.adapter(key, model, settings.lora, names, mesh)
    return flow_learners.components(key, model, names, settings.scratch, mesh)


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
