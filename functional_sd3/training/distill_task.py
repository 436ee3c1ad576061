"""Distillation into few steps as a task of `loop.run`: first state, training step, batches, model, samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import layers, prng, tree
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import schedule
from functional_sd3.image import vae
from functional_sd3.layouts.components import Config, require
from functional_sd3.text import conditioning
from functional_sd3.text.completeness import check_encoders
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import learner, loop, objectives, optim, step
from functional_sd3.training.objectives import points, policy
from functional_sd3.training.objectives.segments import Teacher
from functional_sd3.training.tasks import ENCODERS
from functional_sd3.weights.model import Model

SAMPLES = 16
"""Images of a sample."""
METHODS = ("segments",)


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a run.

    to: steps that the student draws in. cfg: guidance scale of the teacher, which is folded in; 1 for none. shift: of
    the student's grid, `schedule.even(to, shift)`. inner: steps of the teacher in each of the student's. rate, warmup,
    ema, decay, clip, accumulate, dtype: as of `tasks.Settings`. lora: rank of a LoRA that is trained instead of the
    transformer. teacher_dtype: of the teacher's computation, None for that of the model's parameters.
    """

    to: int
    method: Literal["segments"] = "segments"
    batch: int = 48
    cfg: float = 5.0
    shift: float = 3.0
    inner: int = 3
    rate: float = 2e-4
    warmup: int = 20
    ema: float = 0.98
    decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    lora: int = 0
    dtype: torch.dtype | None = None
    teacher_dtype: torch.dtype | None = None


class DistillTask(NamedTuple):
    """What `loop.run` runs, as of `tasks.TrainingTask`."""

    state: step.TrainState
    train_step: Callable[[step.TrainState, Tree], tuple[step.TrainState, objectives.Metrics]]
    batch: Callable[[int], Tree]
    model: Callable[[step.TrainState], Model]
    sample: Callable[[step.TrainState], Tensor]
    trained: tuple[str, ...]


def student_settings(config: Config, settings: Settings) -> Settings:
    """The settings for the model as teacher: a student of segments keeps its grid and is followed step by step.

    Raises ValueError for a teacher that cannot be distilled so: a student of segments whose number `to` does not
    divide, one of another kind, and a scale of guidance for a model that has guidance folded in.
    """
    if settings.method not in METHODS:
        raise ValueError(f"method {settings.method!r} must be one of {', '.join(METHODS)}")
    schedule.check_steps(settings.to)
    levels = config.schedule or schedule.Config()
    if levels.guidance_distilled and settings.cfg != 1:
        raise ValueError(f"cfg {settings.cfg}: guidance is folded into this model already; cfg must be 1")
    if levels.distilled_steps is None:
        return settings
    if levels.distillation != "segments":
        raise ValueError(f"this model is a student by {levels.distillation}: distil the model that it learned from")
    count = levels.distilled_steps
    inner, rest = divmod(count, settings.to)
    if rest or inner < 2:
        fewer = [str(number) for number in range(1, count) if count % number == 0]
        can = f"that can become one of {' or '.join(fewer)}" if fewer else "that cannot be fewer"
        raise ValueError(
            f"to {settings.to}: this model is a student of {count} segments, {can}; for {settings.to} distil the model "
            "that it learned from"
        )
    return replace(settings, inner=inner, shift=levels.shift)


def student_config(config: Config, settings: Settings) -> Config:
    """The config of the student: its number of steps and grid, and whether guidance is folded in."""
    old = config.schedule or schedule.Config()
    levels = schedule.Config(
        shift=settings.shift,
        train_timesteps=old.train_timesteps,
        distilled_steps=settings.to,
        distillation=settings.method,
        guidance_distilled=old.guidance_distilled or settings.cfg != 1,
    )
    return replace(config, schedule=levels)


def distill_task(
    key: Key, model: Model, captions: Sequence[str], data: Tree, settings: Settings, *, generate: Callable[..., Tensor]
) -> DistillTask:
    """Distillation of a model into a student that starts as its copy, or is a LoRA over it.

    model: as of `tasks.flow_task`, the teacher. captions, data: of the images, `datasets.encode_all`; settings: as of
    `student_settings`. generate: draws the samples, `pipeline.generate`. Raises ValueError as `student_settings` does.
    """
    settings = student_settings(model.config, settings)
    config, tokenizers = model.config, model.tokenizers
    check_encoders([name for name in ENCODERS if name in model.params], tokenizers)
    init_key, run_key, order_key, sample_key = prng.split(key, 4).unbind(-2)
    learns = learner.learner(init_key, model, rank=settings.lora)
    device = tree.leaves(model.params["transformer"])[0].device
    length = data["ids"].t5.shape[1]

    def encode(ids: conditioning.Ids) -> dict[str, Tensor]:
        with torch.no_grad():
            encoded = conditioning.encode(model.params, config, conditioning.Ids(*(part.to(device) for part in ids)))
        # The encoders may be stored in another dtype than the transformer is computed in.
        return tree.cast(encoded._asdict(), torch.float32)

    empty = Conditioning(**encode(conditioning.tokenize(config, tokenizers, [""], t5_length=length)))
    teacher = guided_teacher(model, empty, settings.cfg, settings.teacher_dtype)
    loss = _loss(config, teacher, settings)
    order = loop.order(order_key, settings.batch, len(data["latents"]))

    def batch(number: int) -> Tree:
        rows = order(number)
        return {"latents": data["latents"][rows].to(device)} | encode(tree.map(lambda ids: ids[rows], data["ids"]))

    rate = optim.warmup_constant(settings.rate, settings.warmup)
    is_decayed = lambda path, leaf: leaf.ndim >= 2  # noqa: E731
    optimizer = optim.chain(
        optim.clip_by_global_norm(settings.clip), optim.adamw(rate, b2=0.99, decay=settings.decay, mask=is_decayed)
    )
    train_step = step.make_train_step(
        lambda params, batch, keys: loss(learns.whole(params), batch, keys), optimizer, trainable=learns.trainable,
        ema_decay=settings.ema, accumulate=settings.accumulate, donate=True, rate=rate,
    )  # fmt: skip
    drawn = student_config(config, settings)

    def sample(state: step.TrainState) -> Tensor:
        prompts = [captions[index * len(captions) // SAMPLES] for index in range(min(SAMPLES, len(captions)))]
        side = data["latents"].shape[-1] * vae.factor(require(config, "vae"))
        with torch.no_grad():
            return generate(
                learns.whole(state.ema), drawn, tokenizers, prompts, sample_key, steps=settings.to, cfg=1.0,
                height=side, width=side, t5_length=length,
            )  # fmt: skip

    return DistillTask(
        step.init(run_key, learns.params, optimizer, trainable=learns.trainable),
        train_step,
        batch,
        lambda state: model._replace(params=learns.merged(state.ema), config=drawn),
        sample,
        learns.trained,
    )


def guided_teacher(model: Model, empty: Conditioning, cfg: float, dtype: torch.dtype | None = None) -> Teacher:
    """The velocity of a model's prompts guided by `cfg` away from `empty` (1, ...), without gradients, computed in
    `dtype` (None: the parameters')."""
    params: Params = {"transformer": model.params["transformer"]}
    if dtype is not None:
        params = {"transformer": layers.cast(params["transformer"], dtype)}
    guided = policy.guided_velocity(points.model_velocity(model.config, dtype=dtype), empty, cfg)
    return lambda batch: guided(params, batch)


def _loss(config: Any, teacher: Teacher, settings: Settings) -> objectives.Loss:
    times = schedule.even(settings.to * settings.inner, settings.shift)
    return objectives.segments_loss(config, teacher, times, inner=settings.inner, dtype=settings.dtype)
