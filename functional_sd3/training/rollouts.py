"""Rollouts: groups of images of one prompt each, drawn by a policy, rewarded, and gathered until a batch is full."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.parallel import collectives
from functional_sd3.parallel.mesh import BATCH_AXES, own_rows
from functional_sd3.parallel.processes import ALONE, Processes
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import rewards
from functional_sd3.training.objectives import Metrics
from functional_sd3.training.rewards import Reward, Scores

PromptSource = Callable[[Key, int], tuple[list[str], list[Any]]]
"""`(key, count) -> (prompts, facts)`, a pure function of the key; facts: as in `rewards.Reward`."""
Encode = Callable[[Sequence[str]], Conditioning]
"""prompts -> conditioning (prompts, ...)."""
Draw = Callable[[Params, Conditioning, Tensor, Key], Tree]
"""`(params of a whole model, conditioning (batch, ...), noise (batch, ...), keys (batch, 2)) -> rows`, a dict of
tensors (batch, ...): "latents", the samples x_0 (normalised), and other tensors of the run that the objective needs."""
Decode = Callable[[Params, Tensor], Tensor]
"""`(params of a whole model, latents) -> images (batch, 3, height, width) in [0, 1]`."""


METRICS = ("reward", "reward_std", "spread", "all_right", "all_wrong", "draws", "diversity")
"""Names of the metrics of a rollout, beside those of its scores."""


class Groups(NamedTuple):
    """Images of `groups` prompts, `size` images each, the images of one prompt after the other.

    rows: tensors (groups * size, ...), "latents", "context" and "pooled" among them. rewards (groups, size): weighted
    sums; scores: each (groups, size). highest: the reward of an image whose scores are all 1.
    """

    rows: Tree
    rewards: Tensor
    scores: Scores
    highest: float


class Rollout(NamedTuple):
    """Rows (images, ...) of the groups that have spread, with "advantage" and "reward"; metrics of all that was drawn.

    rows is None where no group has spread.
    """

    rows: Tree | None
    metrics: Metrics


def draw_groups(
    params: Params,
    key: Key,
    prompts: int,
    size: int,
    *,
    source: PromptSource,
    encode: Encode,
    noise: Callable[[Key], Tensor],
    draw: Draw,
    decode: Decode,
    reward: Reward,
    weights: dict[str, float],
    default_weight: float = 0.0,
    same_noise: bool = False,
    at_once: int | None = None,
    processes: Processes = ALONE,
) -> Groups:
    """`size` images of each of `prompts` prompts, and their rewards.

    params: the policy's, of a whole model. weights, default_weight: of `rewards.total`. at_once: images drawn and
    decoded together, by default all. noise: keys (batch, 2) -> the starting noise; same_noise: the images of a prompt
    start from that of the first. An image depends on its own key and the policy alone. processes: that divide the
    prompts, each of which gets the groups of all. Raises RewardError for a reward that raises or gives no number for an
    image, and ValueError where the prompts do not divide.
    """
    prompt_key, noise_key = prng.split(key).unbind(-2)
    every = prng.fold_in(noise_key, torch.arange(prompts * size, dtype=torch.int64, device="cpu"))
    texts, facts = (own_rows(part, processes.mesh) for part in source(prompt_key, prompts))
    own_keys, count = own_rows(every, processes.mesh), len(texts) * size

    def own_groups() -> Groups:
        most = count if at_once is None else at_once
        with torch.no_grad():
            encoded = encode(texts)
            keys = own_keys.to(encoded.context.device)
            starts = keys[::size].repeat_interleave(size, 0) if same_noise else keys
            conditioning = Conditioning(*(part.repeat_interleave(size, 0) for part in encoded))
            parts, images = [], []
            for start in range(0, count, most):
                part_rows = slice(start, start + most)
                own = Conditioning(*(part[part_rows] for part in conditioning))
                parts.append(draw(params, own, noise(starts[part_rows]), keys[part_rows]))
                images.append(decode(params, parts[-1]["latents"]))
            rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            prompts_of_images = [text for text in texts for _ in range(size)]
            facts_of_images = [fact for fact in facts for _ in range(size)]
            scores = rewards.checked(reward)(torch.cat(images), prompts_of_images, facts_of_images)
            scores = {name: score.to(rows["latents"].device) for name, score in scores.items()}
            total = rewards.total(scores, weights, default_weight)
            ones = {name: torch.ones_like(score[:1]) for name, score in scores.items()}
            highest = float(rewards.total(ones, weights, default_weight))
        rows |= {"context": conditioning.context, "pooled": conditioning.pooled}
        grouped = {name: score.reshape(-1, size) for name, score in scores.items()}
        return Groups(rows, total.reshape(-1, size), grouped, highest)

    own = processes.together(own_groups)
    group = processes.mesh.group(*BATCH_AXES)
    rows, totals, scores = tree.map(
        lambda leaf: collectives.all_gather(leaf, group), (own.rows, own.rewards, own.scores)
    )
    return Groups(rows, totals, scores, own.highest)


def gather(draw: Callable[[int], Groups], wanted: int, draws: int, **options: Any) -> Rollout:
    """The first `wanted` groups with spread of `draw(0)`, `draw(1)`, ..., at most `draws` calls of it.

    Groups whose rewards are all equal give no advantage and are dropped. options: of `rewards.group_advantages`, whose
    standard deviation is that of all that was drawn.

    Raises RewardError where the calls give scores of other names, or of the name of a metric. Metrics: reward and its
    std; every score; spread, the share of groups that have some; all_right and all_wrong, the
    shares of groups without, whose rewards are at least, or below, half of that of an image whose scores are all 1;
    draws, calls of `draw`; diversity, the root of the mean variance of latents within a group.
    """
    groups: list[Groups] = []
    count = 0
    while count < wanted and len(groups) < draws:
        groups.append(draw(len(groups)))
        _check_names(groups[0].scores, groups[-1].scores)
        count += int(rewards.has_spread(groups[-1].rewards).sum())
    together = torch.cat([each.rewards for each in groups])
    has_spread = rewards.has_spread(together)
    right = ~has_spread & (together.amin(1) >= groups[0].highest / 2)
    size = together.shape[1]
    variance = torch.cat([each.rows["latents"].float().unflatten(0, (-1, size)).var(1).flatten(1) for each in groups])
    metrics = {
        "reward": together.mean(),
        "reward_std": together.std(),
        **{name: torch.cat([each.scores[name] for each in groups]).mean() for name in groups[0].scores},
        "spread": has_spread.float().mean(),
        "all_right": right.float().mean(),
        "all_wrong": (~has_spread & ~right).float().mean(),
        "draws": torch.tensor(float(len(groups)), device=together.device, dtype=torch.float32),
        "diversity": variance.mean().sqrt(),
    }
    chosen = has_spread.nonzero().flatten()[:wanted]
    if not len(chosen):
        return Rollout(None, metrics)
    advantages = rewards.group_advantages(together, **options)
    images = (chosen[:, None] * size + torch.arange(size, device=chosen.device, dtype=torch.int64)).flatten()
    rows = {name: torch.cat([each.rows[name] for each in groups])[images] for name in groups[0].rows}
    chosen_rows = {"advantage": advantages[chosen].flatten(), "reward": together[chosen].flatten()}
    return Rollout({**rows, **chosen_rows}, metrics)


def _check_names(first: Scores, scores: Scores) -> None:
    if taken := [name for name in scores if name in METRICS]:
        raise rewards.RewardError(
            f"a reward gives the score {', '.join(taken)}, which the log has of its own: rename it"
        )
    if first.keys() != scores.keys():
        before, now = (", ".join(each) for each in (first, scores))
        raise rewards.RewardError(f"the rewards gave the scores {before}, and then {now}: give the same each time")
