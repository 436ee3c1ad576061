"""Distillation into few steps as a task of `loop.run`: first state, training step, batches, model, samples."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import layers, prng, tree
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import schedule
from functional_sd3.image import vae
from functional_sd3.layouts.components import Config, require
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh, own_rows
from functional_sd3.text import conditioning
from functional_sd3.text.completeness import check_encoders
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import division, learner, loop, objectives, optim, step, update_rule
from functional_sd3.training.distill_methods import METHODS, Settings, with_defaults
from functional_sd3.training.fake_score import ScoreState, make_score_step
from functional_sd3.training.objectives import points, policy, rcm, scm, shortcut
from functional_sd3.training.objectives.segments import Teacher
from functional_sd3.training.tasks import ENCODERS
from functional_sd3.transformer import mmdit
from functional_sd3.weights.model import Model

SAMPLES = 16
"""Images of a sample."""


class DistillTask(NamedTuple):
    """Arguments of `loop.run`, as in `tasks.TrainingTask`; of a method with a fake score a `ScoreState`."""

    state: step.TrainState | ScoreState
    train_step: Callable[[Any, Tree], tuple[Any, objectives.Metrics]]
    batch: Callable[[int], Tree]
    model: Callable[[Any], Model]
    sample: Callable[[Any], Tensor]
    trained: tuple[str, ...]
    whole: Callable[[Any], Any] = lambda state: state
    shard: Callable[[Any], Any] = lambda state: state
    placements: Tree | None = None
    samples_together: bool = False


def student_settings(config: Config, settings: Settings) -> Settings:
    """The settings for the model as teacher, with the defaults of their method.

    Raises ValueError, beginning with the setting, for a teacher that cannot be distilled so: a student of another kind,
    a student of segments whose number `to` does not divide, and a scale of guidance for a model that has guidance
    folded in.
    """
    if settings.method not in METHODS:
        raise ValueError(f"method {settings.method!r} must be one of {', '.join(METHODS)}")
    settings = with_defaults(settings)
    schedule.check_steps(settings.to)
    method, levels = METHODS[settings.method], config.schedule or schedule.Config()
    if levels.guidance_distilled and settings.cfg != 1:
        raise ValueError(f"cfg {settings.cfg}: guidance is folded into this model already; cfg must be 1")
    if levels.distillation not in (None, "reflow", method.kind):
        raise ValueError(f"this model is a student by {levels.distillation}: distil the model that it learned from")
    return method.settings(levels, settings)


def student_config(config: Config, settings: Settings) -> Config:
    """The config of the student: its network, number of steps and grid, and whether guidance is folded in."""
    method, old = METHODS[settings.method], config.schedule or schedule.Config()
    levels = schedule.Config(
        shift=settings.shift,
        train_timesteps=old.train_timesteps,
        distilled_steps=settings.to,
        distillation=method.kind,
        guidance_distilled=old.guidance_distilled or settings.cfg != 1,
        # `ode.renoised`, which diffusers' scheduler knows by this field: to the end, and noise again.
        stochastic_sampling=method.kind == "consistency",
    )
    return replace(config, schedule=levels, transformer=method.network(require(config, "transformer"), settings))


def distill_task(
    key: Key,
    model: Model,
    captions: Sequence[str],
    data: Tree,
    settings: Settings,
    *,
    generate: Callable[..., Tensor],
    mesh: Mesh = ONE_PROCESS,
) -> DistillTask:
    """Distillation of a model into a student that starts as its copy, with the parameters that its network has beyond
    them, or is a LoRA over it.

    model: as in `flow_task`, the teacher. captions, data: of the images, `datasets.encode_all`; of a method that
    has pairs the latents are those of `reflow.pairs`, and "noise" is beside them. settings: as in `student_settings`.
    generate: draws the samples, `pipeline.generate`. mesh: the processes that share every batch, of which this one
    makes its own rows; `model` is divided over it (`division.divide`), and so are student, fake score and averages.
    Raises ValueError as `student_settings` does.
    """
    settings = student_settings(model.config, settings)
    config, tokenizers = model.config, model.tokenizers
    check_encoders([name for name in ENCODERS if name in model.params], tokenizers)
    init_key, run_key, order_key, sample_key = prng.split(key, 4).unbind(-2)
    student = student_config(config, settings)
    learns = learner.learner(init_key, model, rank=settings.lora, config=student, mesh=mesh)
    learns = learner.with_weights(learns, settings.rule.weights)
    if settings.log_variance:
        learns = learner.with_extra(prng.fold_in(init_key, 2), learns, scm.LOG_VARIANCE, scm.log_variance_spec())
    device = tree.leaves(model.params["transformer"])[0].device
    length = data["ids"].t5.shape[1]

    def encode(ids: conditioning.Ids) -> dict[str, Tensor]:
        with torch.no_grad():
            encoded = conditioning.encode(model.params, config, conditioning.Ids(*(part.to(device) for part in ids)))
        # The encoders may be stored in another dtype than the transformer is computed in.
        return tree.cast(encoded._asdict(), torch.float32)

    empty = Conditioning(**encode(conditioning.tokenize(config, tokenizers, [""], t5_length=length)))
    teacher = guided_teacher(model, empty, settings.cfg, settings.teacher_dtype, settings.attend)
    method = METHODS[settings.method]
    loss = method.loss(student, teacher, settings)
    order = loop.order(order_key, settings.batch, len(data["latents"]))

    def batch(number: int) -> Tree:
        rows = own_rows(order(number), mesh)
        latents = data["latents"][rows].to(device)
        scales = {
            name: torch.full((len(latents),), value, dtype=torch.float32, device=device)
            for name, value in method.scales(settings, number).items()
        }
        noise = {"noise": data["noise"][rows].to(device)} if method.has_pairs else {}
        return {"latents": latents, **noise, **encode(tree.map(lambda ids: ids[rows], data["ids"])), **scales}

    def update(loss: objectives.Loss, factor: float = 1.0, ema: float | None = settings.ema) -> tuple[Any, Any]:
        """The optimiser and the update of parameters by a loss of them, at `factor` times the learning rate."""
        rate = optim.warmup_constant(factor * settings.rate, settings.warmup)
        optimizer = update_rule.optimizer(settings.rule, rate, clip=settings.clip, decay=settings.decay, b2=0.99)
        return optimizer, step.make_train_step(
            loss, optimizer, trainable=learns.trainable, ema_decay=ema, accumulate=settings.accumulate, donate=True,
            rate=rate, mesh=mesh, layout=learns.layout, own_rows=True, rounding=update_rule.rounding(settings.rule),
        )  # fmt: skip

    optimizer, train_step = update(lambda params, batch, keys: loss(learns.whole(params), batch, keys))
    if method.takes_average:
        train_step = _with_average(learns, loss, update)
    state = step.init(run_key, learns.params, optimizer, trainable=learns.trainable, mesh=mesh, layout=learns.layout)
    if method.fake_score is not None:
        state, train_step = _with_fake_score(
            learns, loss, method.fake_score(student, settings), update, state, settings, mesh
        )

    def sample(state: Any) -> Tensor:
        prompts = [captions[index * len(captions) // SAMPLES] for index in range(min(SAMPLES, len(captions)))]
        side = data["latents"].shape[-1] * vae.factor(require(config, "vae"))
        with torch.no_grad():
            return generate(
                learns.whole(state.ema), student, tokenizers, prompts, sample_key, steps=settings.to, cfg=1.0,
                height=side, width=side, t5_length=length,
            )  # fmt: skip

    task = DistillTask(
        state,
        train_step,
        batch,
        lambda state: model._replace(params=learns.merged(state.ema), config=student),
        sample,
        learns.trained,
        samples_together=division.is_joint(mesh),
    )
    return task._replace(**division.of_state(state, learns.layout, mesh)._asdict())


def _with_average(
    learns: learner.Learner, loss: objectives.Loss, update: Callable[..., tuple[Any, Any]]
) -> Callable[[step.TrainState, Tree], tuple[step.TrainState, objectives.Metrics]]:
    """The step of an objective that reads the average of the parameters beside them, as it is before the step."""

    def train_step(state: step.TrainState, batch: Tree) -> tuple[step.TrainState, objectives.Metrics]:
        average = {shortcut.AVERAGE: learns.whole(state.ema)}
        return update(lambda params, batch, keys: loss({**learns.whole(params), **average}, batch, keys))[1](
            state, batch
        )

    return train_step


def _with_fake_score(
    learns: learner.Learner,
    loss: objectives.Loss,
    fake_loss: objectives.Loss,
    update: Callable[..., tuple[Any, Any]],
    state: step.TrainState,
    settings: Settings,
    mesh: Mesh,
) -> tuple[Any, Any]:
    """State and step of a student whose loss needs the score of its own images, which starts as the teacher's.

    The score has parameters like the student's, so that beside a LoRA it is one too. It is used as it is: no average
    of it is kept.
    """

    def student(fake: Params) -> Any:
        score = {rcm.FAKE: learns.whole(fake)["transformer"]}
        return update(lambda params, batch, keys: loss({**learns.whole(params), **score}, batch, keys))[1]

    def fake(params: Params) -> Any:
        whole = learns.whole(params)

        def loss_of_score(score: Params, batch: Tree, keys: Key) -> tuple[Tensor, objectives.Metrics]:
            return fake_loss({**whole, rcm.FAKE: learns.whole(score)["transformer"]}, batch, keys)

        return update(loss_of_score, settings.fake_rate or 1.0, None)[1]

    optimizer, _ = update(loss, settings.fake_rate or 1.0)
    key = prng.fold_in(state.key, 1)
    score = step.init(
        key, learns.params, optimizer, trainable=learns.trainable, average=False, mesh=mesh, layout=learns.layout
    )
    return ScoreState(state, score), make_score_step(student, fake, settings.fake_updates or 1)


def guided_teacher(
    model: Model,
    empty: Conditioning,
    cfg: float,
    dtype: torch.dtype | None = None,
    attend: mmdit.AttendBlocks | None = None,
) -> Teacher:
    """The velocity of a model's prompts guided by `cfg` away from `empty` (1, ...), without gradients, computed in
    `dtype` (None: the parameters'); attend: as in `mmdit.apply`."""
    params: Params = {"transformer": model.params["transformer"]}
    if dtype is not None:
        params = {"transformer": layers.cast(params["transformer"], dtype)}
    guided = policy.guided_velocity(points.model_velocity(model.config, dtype=dtype, attend=attend), empty, cfg)
    return lambda batch: guided(params, batch)
