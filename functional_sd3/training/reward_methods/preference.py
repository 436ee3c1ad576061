"""Direct preference optimisation on the best and the worst image of each group, with a reference that is renewed."""

from typing import Any

from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Tree
from functional_sd3.flow import path
from functional_sd3.training import copies
from functional_sd3.training.objectives import preference
from functional_sd3.training.reward_methods.matching import fresh_noise
from functional_sd3.training.reward_methods.types import Options, Policies, RewardMethod, Sampler, given

RENEWED = 40
"""Rounds between two references, as in flow_grpo's online runs."""


def dpo_method(config: Any, options: Options, sampler: Sampler) -> RewardMethod:
    """Online DPO: pairs of the best and the worst image of a group; the slow copy is the reference.

    It becomes the trained policy every 40 rounds. t is logit-normal, as the released models were trained.
    """
    loss = preference.dpo_loss(
        config, beta=given(options.beta, 100.0), kl=given(options.kl, 0.0), dtype=options.dtype, attend=options.attend
    )

    def batch(key: Key, rows: Tree, policies: Policies) -> Tree:
        pairs = noised_pairs(key, preference.best_and_worst(rows, options.group), options.times)
        return preference.add_references(
            config, pairs, policies.old, policies.start, rows=options.rows, dtype=options.dtype, attend=options.attend
        )

    decay = copies.renewed(RENEWED)
    return RewardMethod(loss, preference.METRICS, "current", decay, lambda number, key: sampler.draw, batch)


def noised_pairs(key: Key, pairs: Tree, count: int) -> Tree:
    """`count` rows for each pair: fresh "noise", the same for winner and loser, and a logit-normal "t"."""
    repeated = tree.map(lambda leaf: leaf.repeat_interleave(count, 0), pairs)
    time_key, noise_key = prng.split(key.to(repeated["winner"].device)).unbind(-2)
    t = path.logit_normal(prng.split(time_key, len(repeated["winner"])), ())
    return {**repeated, "t": t.to(repeated["winner"]), "noise": fresh_noise(noise_key, repeated["winner"])}
