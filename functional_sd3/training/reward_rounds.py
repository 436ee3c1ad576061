"""Rounds of training by rewards: images drawn and rewarded (`online`), or a reward to differentiate (`draft`)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.parallel.processes import ALONE, Processes
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import copies, loop, rewards, rollouts
from functional_sd3.training.copies import PairState, Round
from functional_sd3.training.learner import Learner
from functional_sd3.training.objectives import Loss, draft_loss, points, policy
from functional_sd3.training.objectives import draft as draft_objective
from functional_sd3.training.objectives.preference import add_references
from functional_sd3.training.pairs import Pairs
from functional_sd3.training.reward_methods import METHODS, Policies, Sampler, noised_pairs
from functional_sd3.training.reward_settings import Settings
from functional_sd3.training.rewards import Reward
from functional_sd3.training.schedules import Schedule

OF_THE_LOG = ("step", "seconds", "loss", "grad_norm", "rate", "bin_loss", "bin_share")
"""Columns of the log of every run, beside those of its objective and its rollouts."""


class Setting(NamedTuple):
    """Parts of a round: arguments of `reward_task`, what learns, and functions of the model.

    drawing_params: trained parameters -> the whole model's, in the dtype that draws.
    """

    config: Any
    settings: Settings
    learns: Learner
    key: Key
    reward: Reward
    pairs: Pairs | None
    source: rollouts.PromptSource
    sampler: Sampler
    decode: rollouts.Decode
    encode: Callable[[Sequence[str]], Conditioning]
    drawing_params: Callable[[Params], Params]
    processes: Processes = ALONE


class Rounds(NamedTuple):
    """The objective of a whole model's parameters, names of its metrics, the slow copy's decay, and the rollout of a
    round by its number."""

    loss: Loss
    metrics: tuple[str, ...]
    decay: Schedule
    rollout: Callable[[PairState, int], Round]


def online(setting: Setting) -> Rounds:
    """Rounds of a method of `reward_methods`."""
    settings, learns = setting.settings, setting.learns
    method = METHODS[settings.method](setting.config, settings.options, setting.sampler)

    def rollout(state: PairState, number: int) -> Round:
        draw_key, batch_key, step_key = prng.split(prng.fold_in(setting.key, number), 3).unbind(-2)
        params = setting.drawing_params(state.old if method.draws_from == "old" else state.params)
        draw, prompts = method.drawing(number, step_key), settings.batch // settings.group

        def groups(attempt: int) -> rollouts.Groups:
            return rollouts.draw_groups(
                params, prng.fold_in(draw_key, attempt), prompts, settings.group, source=setting.source,
                encode=setting.encode, noise=setting.sampler.noise, draw=draw, decode=setting.decode,
                reward=setting.reward, weights=settings.weights, default_weight=settings.default_weight,
                same_noise=method.same_noise, at_once=settings.at_once, processes=setting.processes,
            )  # fmt: skip

        gathered = rollouts.gather(groups, prompts, settings.draws, scale=settings.spread)
        if taken := [name for name in gathered.metrics if name in (*OF_THE_LOG, *method.metrics)]:
            names = ", ".join(taken)
            raise rewards.RewardError(f"a reward gives the score {names}, which the log has of its own: rename it")
        if gathered.rows is None:
            return Round(None, gathered.metrics)
        policies = Policies(learns.start, learns.whole(state.old), learns.whole(state.params))
        return Round(method.batch(batch_key, gathered.rows, policies), gathered.metrics)

    return Rounds(method.loss, method.metrics, method.decay, rollout)


def offline(setting: Setting) -> Rounds:
    """Rounds of DPO on given pairs, with the start as the reference; nothing is drawn, and no reward is computed."""
    settings, options, learns, pairs = setting.settings, setting.settings.options, setting.learns, setting.pairs
    assert pairs is not None
    method = METHODS["dpo"](setting.config, options, setting.sampler)
    order = loop.order(prng.fold_in(setting.key, 0), settings.batch // 2, len(pairs.prompts))

    def rollout(state: PairState, number: int) -> Round:
        rows = order(number)
        with torch.no_grad():
            encoded = setting.encode([pairs.prompts[row] for row in rows.tolist()])
        own = {"winner": pairs.winner[rows.to(pairs.winner.device)], "loser": pairs.loser[rows.to(pairs.loser.device)]}
        batch = noised_pairs(
            prng.fold_in(prng.fold_in(setting.key, 1), number), {**own, **encoded._asdict()}, options.times
        )
        start = learns.start
        return Round(
            add_references(setting.config, batch, start, rows=options.rows, dtype=options.dtype, attend=options.attend),
            {},
        )

    return Rounds(method.loss, method.metrics, copies.linear(0.0, 0.0), rollout)


def draft(setting: Setting) -> Rounds:
    """Rounds of DRaFT: noise and prompts, from which the objective draws and rewards images that it differentiates."""
    settings, options, sampler = setting.settings, setting.settings.options, setting.sampler
    count = settings.batch // settings.group

    def prompts_of(number: int) -> tuple[list[str], list[Any]]:
        return setting.source(prng.fold_in(prng.fold_in(setting.key, number), 0), count)

    def total(images: Tensor, batch: Tree) -> Tensor:
        # A batch holds tensors alone: the prompts are drawn again from the number of the round.
        texts, facts = prompts_of(int(batch["round"][0]))
        rows = batch["prompt"].tolist()
        scores = rewards.checked(setting.reward)(images, [texts[row] for row in rows], [facts[row] for row in rows])
        return rewards.total(scores, settings.weights, settings.default_weight).to(images.device)

    velocity_of = points.model_velocity(setting.config, dtype=options.dtype, attend=options.attend)
    loss = draft_loss(
        policy.guided_velocity(velocity_of, sampler.negative, sampler.cfg), setting.decode, total, sampler.times,
        start=setting.learns.start, last=options.last, kl=options.kl or 0.0,
    )  # fmt: skip

    def rollout(state: PairState, number: int) -> Round:
        texts, _ = prompts_of(number)
        noise_key = prng.fold_in(prng.fold_in(setting.key, number), 1)
        keys = prng.fold_in(noise_key, torch.arange(settings.batch, dtype=torch.int64, device="cpu"))
        with torch.no_grad():
            encoded = setting.encode(texts)
            keys = keys.to(encoded.context.device)
            batch = {
                "noise": setting.sampler.noise(keys),
                "context": encoded.context.repeat_interleave(settings.group, 0),
                "pooled": encoded.pooled.repeat_interleave(settings.group, 0),
                "prompt": torch.arange(count, dtype=torch.int64, device=keys.device).repeat_interleave(settings.group),
                "round": torch.full((settings.batch,), number, dtype=torch.int64, device=keys.device),
            }
        return Round(batch, {})

    return Rounds(loss, draft_objective.METRICS, copies.linear(0.0, 0.0), rollout)
