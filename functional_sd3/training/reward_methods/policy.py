"""The ratio objective on a stochastic sampler's transitions: Flow-GRPO, Fast, CPS, Mix, Dance and Guard."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.flow.ode import transitions
from functional_sd3.flow.ode.transitions import Rule
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import copies
from functional_sd3.training.objectives import points, policy
from functional_sd3.training.objectives.points import VelocityOf
from functional_sd3.training.reward_methods.types import Options, Policies, RewardMethod, Sampler, given
from functional_sd3.training.rollouts import Draw


class Steps(NamedTuple):
    """Indices of the sampler's steps of a round that draw noise, and of those that are trained on."""

    noisy: Collection[int]
    trained: Sequence[int]


Choice = Callable[[int, int, Key], Steps]
"""`(steps of the sampler, number of the round, its key) -> Steps`; the last step is never trained on."""


def every_step(steps: int, number: int, key: Key) -> Steps:
    """All of them (Flow-GRPO)."""
    return Steps(range(steps), range(steps - 1))


def random_share(share: float) -> Choice:
    """Noise in all steps, and that share of them, drawn anew every round, is trained on (DanceGRPO)."""

    def choose(steps: int, number: int, key: Key) -> Steps:
        count = max(1, int(share * (steps - 1)))
        return Steps(range(steps), sorted(prng.permutation(key, steps - 1)[:count].tolist()))

    return choose


def random_window(size: int) -> Choice:
    """Noise and training in `size` consecutive steps, drawn within the first half; Euler elsewhere (Flow-GRPO-Fast)."""

    def choose(steps: int, number: int, key: Key) -> Steps:
        own = min(size, steps - 1)
        starts = max(steps // 2 - own, 0) + 1
        start = int(prng.randint(key, (), 0, starts))
        return Steps(range(start, start + own), range(start, start + own))

    return choose


def sliding_window(size: int, every: int = 25) -> Choice:
    """`random_window` whose start moves a step every `every` rounds, from the last to the first again (MixGRPO)."""

    def choose(steps: int, number: int, key: Key) -> Steps:
        own = min(size, steps - 1)
        start = number // every % (steps - own)
        return Steps(range(start, start + own), range(start, start + own))

    return choose


class Form(NamedTuple):
    """A form of the objective: its transition by noise level, that level, steps, and options of `ratio_loss`."""

    rule: Callable[[float], Rule]
    noise: float
    steps: Choice
    window: Callable[[int], Choice] = random_window
    eps: float = 1e-4
    kl: float = 0.0
    guard: bool = False
    is_residual: bool = False
    same_noise: bool = False


FORMS = {
    "flow": Form(transitions.flow_sde, 0.7, every_step, kl=0.04),
    "fast": Form(transitions.flow_sde, 0.7, random_window(2)),
    "cps": Form(transitions.cps, 0.8, every_step, eps=1e-5, is_residual=True),
    "mix": Form(transitions.flow_sde, 0.7, sliding_window(4), sliding_window, same_noise=True),
    "dance": Form(transitions.dance, 0.3, random_share(0.6), same_noise=True),
    "guard": Form(transitions.flow_sde, 0.7, every_step, kl=0.04, guard=True),
}
"""Forms by name, with the numbers of their papers and code."""


def grpo_method(config: Any, options: Options, sampler: Sampler) -> RewardMethod:
    """The ratio objective in the form `options.form`; the trained policy draws, with guidance where the sampler has it.

    `options.window` steps instead of the form's, 0 for all. Raises ValueError for a form that there is not, for a
    sampler of one step, which leaves none to train on, and where a trained step draws nothing.
    """
    if options.form not in FORMS:
        raise ValueError(f"form {options.form!r} must be one of {', '.join(FORMS)}")
    steps = len(sampler.times) - 1
    if steps < 2:
        raise ValueError(f"{steps} sampling step leaves none to train on: the last one is left out; give at least 2")
    form = FORMS[options.form]
    noise = given(options.noise, form.noise)
    if not noise > 0:
        raise ValueError(f"noise {noise} must be positive: steps that draw nothing have no density")
    rule = form.rule(noise)
    velocity_of = points.model_velocity(config, dtype=options.dtype, attend=options.attend)
    guided = policy.guided_velocity(velocity_of, sampler.negative, sampler.cfg)
    loss = policy.ratio_loss(
        config, rule, eps=given(options.eps, form.eps), kl=given(options.kl, form.kl), guard=form.guard,
        is_residual=form.is_residual, negative=sampler.negative, cfg=sampler.cfg, dtype=options.dtype,
        attend=options.attend,
    )  # fmt: skip
    choose = form.steps
    if options.window is not None:
        choose = form.window(options.window) if options.window else every_step
    # The policy that draws may be of another dtype, that of its parameters.
    drawn_by = policy.guided_velocity(
        points.model_velocity(config, attend=options.attend), sampler.negative, sampler.cfg
    )

    def drawing(number: int, key: Key) -> Draw:
        return stochastic_draw(drawn_by, rule, sampler.times, choose(steps, number, key))

    def batch(key: Key, rows: Tree, policies: Policies) -> Tree:
        transitions_of_rows = flatten_transitions(rows, sampler.times)
        others = {"old_mean": policies.current, "reference_mean": policies.start}
        return policy.add_means(guided, rule, transitions_of_rows, others, rows=options.rows)

    decay = copies.linear(0.0, 0.0)
    return RewardMethod(loss, policy.METRICS, "current", decay, drawing, batch, form.same_noise)


def stochastic_draw(velocity_of: VelocityOf, rule: Rule, times: Tensor, steps: Steps) -> Draw:
    """Images by `rule` in the noisy steps and Euler's in the others, with the transitions of the trained ones.

    Rows: latents; step (batch, trained), the index of each; x and x_next (batch, trained, channels, height, width).
    """

    def draw(params: Params, conditioning: Conditioning, noise: Tensor, keys: Key) -> Tree:
        velocity = velocity_of(params, conditioning._asdict())
        x, grid = noise, times.to(noise)
        before, after = {}, {}
        for index, (t, s) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
            chosen = rule if index in steps.noisy else transitions.euler()
            # Numbers of the steps, each from its own key; that of the start is the sample's own.
            step_noise = prng.normal(prng.fold_in(keys, 1 + index), tuple(x.shape[1:]))
            x_next = transitions.draw(chosen(x, velocity(x, t), t, s), step_noise.to(x))
            if index in steps.trained:
                before[index], after[index] = x, x_next
            x = x_next
        index_of_rows = torch.tensor(list(steps.trained), dtype=torch.int64, device=x.device).expand(len(x), -1)
        stack = lambda states: torch.stack([states[index] for index in steps.trained], 1)  # noqa: E731
        return {"latents": x, "step": index_of_rows, "x": stack(before), "x_next": stack(after)}

    return draw


def flatten_transitions(rows: Tree, times: Tensor) -> Tree:
    """A row for each transition of the images: x, x_next, t, s, and the image's advantage and conditioning."""
    count, grid = rows["step"].shape[1], times.to(rows["x"])
    repeated = {name: rows[name] for name in ("advantage", "context", "pooled")}
    index = rows["step"].flatten()
    return {
        **tree.map(lambda leaf: leaf.repeat_interleave(count, 0), repeated),
        "x": rows["x"].flatten(0, 1),
        "x_next": rows["x_next"].flatten(0, 1),
        "t": grid[index],
        "s": grid[index + 1],
    }
