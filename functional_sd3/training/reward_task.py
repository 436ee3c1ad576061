"""Training by rewards as a task of `loop.run`: first state, rollouts, round step, samples."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import layers, prng, tree
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.parallel import sharding
from functional_sd3.parallel.processes import ALONE, Processes
from functional_sd3.text import conditioning
from functional_sd3.text.completeness import check_encoders
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import (
    copies,
    division,
    learner,
    optim,
    reward_rounds,
    reward_settings,
    rollouts,
    step,
    update_rule,
)
from functional_sd3.training.copies import PairState, Round
from functional_sd3.training.pairs import Pairs
from functional_sd3.training.reward_methods import Sampler
from functional_sd3.training.reward_settings import Settings
from functional_sd3.training.rewards import Reward
from functional_sd3.training.tasks import ENCODERS
from functional_sd3.weights.model import Model

SAMPLES = 16
"""Images of a sample."""


class RewardTask(NamedTuple):
    """Arguments of `loop.run`: `loop.run(state, train_step, batch, rollout=rollout, ...)`; the rest as in
    `tasks.TrainingTask`."""

    state: PairState
    train_step: Callable[[PairState, Round], tuple[PairState, dict[str, Any]]]
    batch: Callable[[int], int]
    rollout: Callable[[PairState, int], Round]
    model: Callable[[PairState], Model]
    sample: Callable[[PairState], Tensor]
    trained: tuple[str, ...]
    whole: Callable[[PairState], PairState] = lambda state: state
    shard: Callable[[PairState], PairState] = lambda state: state
    placements: Tree | None = None
    samples_together: bool = False


def reward_task(
    key: Key,
    model: Model,
    settings: Settings,
    *,
    reward: Reward,
    source: rollouts.PromptSource,
    sampler: Sampler,
    decode: rollouts.Decode,
    pairs: Pairs | None = None,
    t5_length: int = 256,
    processes: Processes = ALONE,
) -> RewardTask:
    """Training of the transformer, or of a LoRA over it, by the rewards of its own images.

    model: as in `flow_task`: the trained transformer float32, the rest of any dtype. reward, source, decode: see
    `rewards` and `rollouts`. pairs: what "dpo" learns from instead of images that it draws and rewards. processes: that
    divide the prompts of a round and the rows of an update, and over whose mesh `model` is divided (`division.divide`):
    policies and reference. Raises
    ValueError for a method that there is not, and groups that do not make up the batch.
    """
    reward_settings.check(settings)
    config = model.config
    check_encoders([name for name in ENCODERS if name in model.params], model.tokenizers)
    init_key, run_key, round_key, sample_key = prng.split(key, 4).unbind(-2)
    mesh = processes.mesh
    learns = learner.learner(init_key, model, rank=settings.lora, mesh=mesh)
    learns = learner.with_weights(learns, settings.rule.weights)
    device = tree.leaves(model.params["transformer"])[0].device

    def encode(prompts: Sequence[str]) -> Conditioning:
        ids = conditioning.tokenize(config, model.tokenizers, list(prompts), t5_length=t5_length)
        encoded = conditioning.encode(model.params, config, conditioning.Ids(*(part.to(device) for part in ids)))
        # The encoders may be stored in another dtype than the transformer is computed in.
        return Conditioning(*tree.cast(list(encoded), torch.float32))

    def drawing_params(params: Params) -> Params:
        whole = learns.whole(params)
        if settings.draw_dtype is None:
            return whole
        return {**whole, "transformer": layers.cast(whole["transformer"], settings.draw_dtype)}

    setting = reward_rounds.Setting(
        config, settings, learns, round_key, reward, pairs, source, sampler, decode, encode, drawing_params, processes
    )
    rounds = _rounds(setting)
    rate = optim.warmup_constant(settings.rate, settings.warmup)
    optimizer = update_rule.optimizer(settings.rule, rate, clip=settings.clip, decay=settings.decay)

    def loss(params: Params, batch: Any, keys: Key) -> Any:
        return rounds.loss(learns.whole(params), batch, keys)

    # On several processes rounds with fewer groups, whose rows do not divide, are a whole batch on each.
    rows = settings.rows or (None if processes.is_alone else settings.batch)
    update = step.make_train_step(
        loss, optimizer, trainable=learns.trainable, ema_decay=settings.ema, rows=rows, donate=True, rate=rate,
        mesh=mesh, layout=learns.layout, rounding=update_rule.rounding(settings.rule),
    )  # fmt: skip

    def sample(state: PairState) -> Tensor:
        prompts, _ = source(sample_key, SAMPLES)
        keys = prng.fold_in(sample_key, torch.arange(SAMPLES, dtype=torch.int64, device="cpu")).to(device)
        with torch.no_grad():
            policy = drawing_params(state.ema)
            return decode(policy, sampler.draw(policy, encode(prompts), sampler.noise(keys), keys)["latents"])

    state = copies.init(
        step.init(run_key, learns.params, optimizer, trainable=learns.trainable, mesh=mesh, layout=learns.layout)
    )
    task = RewardTask(
        state,
        copies.make_round_step(
            update,
            rounds.decay,
            updates=settings.updates,
            names=(*rounds.metrics, "rate"),
            positions=sharding.positions(learns.layout, mesh) if settings.rule.weights == torch.bfloat16 else None,
        ),
        lambda number: number,
        rounds.rollout,
        lambda state: model._replace(params=learns.merged(state.ema)),
        sample,
        learns.trained,
        samples_together=division.is_joint(mesh),
    )
    return task._replace(**division.of_state(state, learns.layout, mesh)._asdict())


def _rounds(setting: reward_rounds.Setting) -> reward_rounds.Rounds:
    if setting.pairs is not None:
        return reward_rounds.offline(setting)
    return (reward_rounds.draft if setting.settings.method == "draft" else reward_rounds.online)(setting)
