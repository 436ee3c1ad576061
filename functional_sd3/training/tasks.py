"""Training tasks: first state, training step, batches and samples of what a run trains.

`flow_task.flow_task` trains the transformer, with or without the text encoders, or a LoRA, on latents;
`vae_task.vae_task` the autoencoder on images. `loop.run` runs either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow import path
from functional_sd3.flow.loss_weights import Weight
from functional_sd3.layouts.components import Config
from functional_sd3.parallel import sharding
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh
from functional_sd3.training import division, objectives, optim, step, update_rule
from functional_sd3.training.flow_learners import Inversion
from functional_sd3.training.update_rule import UpdateRule
from functional_sd3.transformer import controlnet
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
    process to the whole one, which all processes call, and back; placements: of its
    leaves, None where each process has all; `model` is of whole states. samples_together: whether
    all processes call `sample`, of their own states; else one alone, of the whole state.
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
    placements: Tree | None = None
    samples_together: bool = False


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a run.

    rate: peak learning rate. schedule: "cosine" decays from `rate` to a tenth of it at `steps`; "constant" does not
    depend on `steps`. ema: decay of the parameters' moving average. decay: AdamW's weight decay. clip: largest global
    norm of a gradient. dropout: probability of the empty prompt. density, shift (None: the model's), weight: of the
    training times and their losses, as in `objectives.flow_loss`. prior_weight: of images that preserve the prior.
    scratch: start from fresh parameters. lora: rank of a LoRA that is trained instead of the parameters, 0 for none;
    control: config of a ControlNet that is; inversion: a word whose vectors are, with a LoRA or alone. word_rate:
    `rate` of the vectors beside a LoRA, None for that of the LoRA. edges, latent_noise: of the autoencoder's objective,
    as `edges` and `noise` of `objectives.vae_loss`. dtype: of the computation, None for
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
    word_rate: float | None = None
    dtype: torch.dtype | None = None
    compile: bool = False
    rule: UpdateRule = UpdateRule()


def learning_rate(settings: Settings) -> optim.Schedule:
    """The learning rate of a run as a function of the steps done."""
    if settings.schedule == "constant":
        return optim.warmup_constant(settings.rate, settings.warmup)
    warmup = min(settings.warmup, settings.steps - 1)
    return optim.warmup_cosine(settings.rate, warmup, settings.steps, 0.1 * settings.rate)


def make_task(
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
    """The task of a loss: the optimiser, the first state and the training step that `settings` describe.

    trainable: chooses the leaves that learn. mesh, layout: the processes that share every batch, and where the leaves
    of `params` are on them.
    """
    rate = learning_rate(settings)
    groups = {}
    if settings.inversion is not None and settings.lora:
        word_rate = settings.rate if settings.word_rate is None else settings.word_rate
        groups["word"] = learning_rate(replace(settings, rate=word_rate))
    optimizer = update_rule.optimizer(
        settings.rule, rate, clip=settings.clip, decay=settings.decay, b2=0.99, groups=groups
    )
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
    state = step.init(key, params, optimizer, trainable=trainable, mesh=mesh, layout=layout)
    task = TrainingTask(state, train_step, batch, model, sample, trained, samples_together=division.is_joint(mesh))
    return task._replace(**division.of_state(state, layout, mesh)._asdict())
