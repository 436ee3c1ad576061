"""The ratio objective in its forms, advantage-weighted matching, DPO and DRaFT: against their formulas."""

import math

import pytest
import torch

from functional_sd3.core import prng, transform, tree
from functional_sd3.flow import ode
from functional_sd3.flow.ode import transitions
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import objectives, reward_methods
from functional_sd3.training.objectives import points, policy, preference
from functional_sd3.training.reward_methods import policy as forms
from functional_sd3.training.rewards import RewardError
from functional_sd3.transformer import mmdit

KEYS = prng.split(prng.key(3), 4)
TIMES = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.0])


@pytest.fixture
def params(tiny):
    return {"transformer": tiny.params["transformer"]}


@pytest.fixture
def text():
    keys = prng.split(prng.key(8), 2)
    return {"context": prng.normal(keys[0], (4, 3, 32)), "pooled": prng.normal(keys[1], (4, 32))}


@pytest.fixture
def moved(params):
    """A policy a little away from `params`."""
    return tree.map(lambda leaf: leaf + 0.003 * prng.normal(prng.key(9), tuple(leaf.shape)), params)


def noise(seed):
    return prng.normal(prng.key(seed), (4, 16, 4, 4))


def apply(tiny, params, x, t, text):
    return mmdit.apply(params["transformer"], tiny.config.transformer, x, t, text["context"], text["pooled"])


def mean(values):
    return values.flatten(1).mean(1)


@pytest.fixture
def rollout(tiny, params, text):
    """Transitions of the policy `params`: images of 4 prompts in 4 steps, of which 3 are trained on."""
    draw = forms.stochastic_draw(
        points.model_velocity(tiny.config), transitions.flow_sde(0.7), TIMES, forms.Steps(range(4), range(3))
    )
    with torch.no_grad():
        return {
            **draw(params, Conditioning(**text), noise(0), KEYS),
            **text,
            "advantage": torch.tensor([1.0, -2.0, 0.5, 3.0]),
        }


def transitions_of(tiny, rollout, policies, rule):
    rows = forms.flatten_transitions(rollout, TIMES)
    return policy.add_means(points.model_velocity(tiny.config), rule, rows, policies, rows=5)


def test_a_trajectory_is_that_of_its_transitions(tiny, params, text, rollout):
    rule = transitions.flow_sde(0.7)
    assert rollout["x"].shape == (4, 3, 16, 4, 4) and rollout["step"].tolist() == [[0, 1, 2]] * 4
    assert torch.equal(rollout["x"][:, 0], noise(0)) and torch.equal(rollout["x"][:, 1], rollout["x_next"][:, 0])
    drawn = prng.normal(prng.fold_in(KEYS, 2), (16, 4, 4))
    step = rule(rollout["x"][:, 1], apply(tiny, params, rollout["x"][:, 1], TIMES[1], text), TIMES[1], TIMES[2])
    torch.testing.assert_close(rollout["x_next"][:, 1], step.mean + step.std * drawn)
    # Without noise it is Euler's run.
    draw = forms.stochastic_draw(points.model_velocity(tiny.config), rule, TIMES, forms.Steps((), (0,)))
    with torch.no_grad():
        plain = draw(params, Conditioning(**text), noise(0), KEYS)["latents"]
        expected = ode.integrate(ode.EULER, lambda x, t: apply(tiny, params, x, t, text), noise(0), TIMES)
    torch.testing.assert_close(plain, expected)


@pytest.mark.parametrize("form", ["flow", "guard", "residual"])
def test_the_ratio_is_that_of_the_paper(tiny, params, moved, rollout, form):
    rule = transitions.flow_sde(0.7)
    rows = transitions_of(tiny, rollout, {"old_mean": params, "reference_mean": moved}, rule)
    eps = 1e-3 if form == "flow" else 2e-5
    options = {"guard": form == "guard", "is_residual": form == "residual", "eps": eps, "kl": 0.5}
    loss = objectives.ratio_loss(tiny.config, rule, **options)
    value, metrics = loss(moved, rows, prng.split(prng.key(1), 12))
    new = policy.transition_of(points.model_velocity(tiny.config), rule, moved, rows)
    spread = new.std[:, None, None, None]
    logs = [torch.distributions.Normal(m, spread).log_prob(rows["x_next"]) for m in (new.mean, rows["old_mean"])]
    distance = mean((new.mean - rows["old_mean"]).square())
    log_ratio = {
        "flow": mean(logs[0]) - mean(logs[1]),
        "guard": new.std * (mean(logs[0]) - mean(logs[1]) + distance / (2 * new.std**2)),
        "residual": mean((rows["x_next"] - rows["old_mean"]) ** 2) - mean((rows["x_next"] - new.mean) ** 2),
    }[form]
    ratio, advantage = torch.exp(log_ratio), rows["advantage"]
    losses = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - eps, 1 + eps))
    losses = losses / (rows["t"] - rows["s"]) if form == "guard" else losses
    torch.testing.assert_close(value, losses.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["ratio"], ratio.mean(), rtol=1e-5, atol=1e-5)
    assert float(metrics["kl"]) < 1e-9 and 0 < float(metrics["clipped"]) < 1
    torch.testing.assert_close(advantage, rollout["advantage"].repeat_interleave(3))


def test_on_policy_the_ratio_is_one_and_the_gradient_that_of_the_advantages(tiny, params, moved, rollout):
    rule = transitions.flow_sde(0.7)
    rows = transitions_of(tiny, rollout, {"old_mean": params, "reference_mean": moved}, rule)
    keys = prng.split(prng.key(1), 12)
    loss = objectives.ratio_loss(tiny.config, rule, kl=0.0)
    assert float(loss(params, rows, keys)[1]["ratio_distance"]) < 1e-6

    def advantages(params):
        step = policy.transition_of(points.model_velocity(tiny.config), rule, params, rows)
        return -(rows["advantage"] * transitions.mean_log_density(rows["x_next"], step)).mean()

    (ours, _), expected = transform.value_and_grad(loss, has_aux=True)(params, rows, keys), torch.func.grad(advantages)
    for one, other in zip(tree.leaves(ours), tree.leaves(expected(params)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    # The divergence of the two Gaussians, without the length of the step, as in the authors' code.
    _, metrics = objectives.ratio_loss(tiny.config, rule)(params, rows, keys)
    step = policy.transition_of(points.model_velocity(tiny.config), rule, params, rows)
    sigma = step.std / (rows["t"] - rows["s"]).sqrt()
    expected_kl = (mean((step.mean - rows["reference_mean"]).square()) / (2 * sigma**2)).mean()
    torch.testing.assert_close(metrics["kl"], expected_kl)


def test_a_transition_that_draws_nothing_has_no_density(tiny, params, rollout):
    rows = transitions_of(tiny, rollout, {"old_mean": params, "reference_mean": params}, transitions.cps(0.8))
    rows["s"] = torch.zeros_like(rows["s"])
    with pytest.raises(ValueError, match="a transition that draws nothing has no density"):
        objectives.ratio_loss(tiny.config, transitions.cps(0.8))(params, rows, prng.split(prng.key(1), 12))
    with pytest.raises(ValueError, match="cfg 2.0 needs the conditioning of the negative prompt"):
        objectives.ratio_loss(tiny.config, transitions.cps(0.8), cfg=2.0)


def test_guidance_differentiates_both_velocities(tiny, params, text):
    negative = Conditioning(torch.ones(1, 3, 32), torch.ones(1, 32))
    velocity_of = policy.guided_velocity(points.model_velocity(tiny.config), negative, 3.0)
    x, t = noise(0), torch.tensor(0.5)
    blank = {"context": torch.ones(4, 3, 32), "pooled": torch.ones(4, 32)}
    unguided = apply(tiny, params, x, t, blank)
    expected = unguided + 3.0 * (apply(tiny, params, x, t, text) - unguided)
    torch.testing.assert_close(velocity_of(params, text)(x, t), expected)


def test_steps_with_noise_and_training_are_those_of_the_forms():
    key = prng.key(4)
    assert forms.every_step(8, 3, key) == (range(8), range(7))
    windows = {forms.random_window(2)(8, 0, prng.fold_in(key, i)).trained for i in range(40)}
    assert windows == {range(0, 2), range(1, 3), range(2, 4)}
    assert forms.random_window(9)(4, 0, key) == (range(3), range(3))
    slid = [forms.sliding_window(4)(8, number, key).noisy for number in (0, 24, 25, 99, 100)]
    assert slid == [range(4), range(4), range(1, 5), range(3, 7), range(4)]
    noisy, trained = forms.random_share(0.6)(8, 0, key)
    assert noisy == range(8) and len(set(trained)) == 4 and max(trained) <= 6
    assert len({tuple(forms.random_share(0.6)(8, 0, prng.fold_in(key, i)).trained) for i in range(20)}) > 3


def test_the_ratio_method_names_what_it_cannot_do(tiny):
    sampler = reward_methods.Sampler(None, None, TIMES, Conditioning(torch.ones(1, 3, 32), torch.ones(1, 32)))
    make = reward_methods.grpo_method
    with pytest.raises(ValueError, match="form 'all' must be one of flow, fast"):
        make(tiny.config, reward_methods.Options(form="all"), sampler)
    with pytest.raises(ValueError, match="noise 0.0 must be positive: steps that draw nothing have no density"):
        make(tiny.config, reward_methods.Options(noise=0.0), sampler)
    with pytest.raises(ValueError, match="1 sampling step leaves none to train on"):
        make(tiny.config, reward_methods.Options(), sampler._replace(times=TIMES[-2:]))


@pytest.mark.parametrize("power", [None, 0.25])
def test_matching_is_weighted_by_advantages(tiny, params, moved, text, power):
    batch = {"latents": noise(0), "noise": noise(1), "t": torch.tensor([0.2, 0.5, 0.9, 1.0]), **text}
    batch |= {"advantage": torch.tensor([1.0, -2.0, 5.0, 0.0])}
    velocity_of = points.model_velocity(tiny.config)
    others = {"old": moved, "reference": moved, "behaviour": moved}
    batch = points.add_velocities(velocity_of, batch, others)
    loss = objectives.awm_loss(tiny.config, power=power, eps=0.002, kl=0.3, old=0.2)
    value, metrics = loss(params, batch, KEYS)
    v, v0 = apply(tiny, params, points.noised(batch), batch["t"], text), batch["old"]
    errors = [mean((each - (batch["noise"] - batch["latents"])) ** 2) for each in (v, v0)]
    score = lambda e: -e if power is None else -((e + 1e-10) ** 0.25 - 1e-10**0.25) * batch["t"] / 0.25  # noqa: E731
    ratio, advantage = torch.exp(score(errors[0]) - score(errors[1])), batch["advantage"] / 5
    clipped = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.998, 1.002))
    torch.testing.assert_close(value, (clipped + 0.5 * mean((v - v0) ** 2)).mean(), rtol=1e-5, atol=1e-6)
    assert float(metrics["ratio_distance"]) > 0
    # Without the behaviour it is on policy: the gradient is that of -A l.
    del batch["behaviour"]
    plain = objectives.awm_loss(tiny.config, power=power, kl=0.0, old=0.0)
    assert float(plain(params, batch, KEYS)[1]["ratio_distance"]) == 0.0

    def weighted(params):
        v = velocity_of(params, batch)(points.noised(batch), batch["t"])
        return -(advantage * score(mean((v - (batch["noise"] - batch["latents"])) ** 2))).mean()

    ours, _ = transform.value_and_grad(plain, has_aux=True)(params, batch, KEYS)
    for one, other in zip(tree.leaves(ours), tree.leaves(torch.func.grad(weighted)(params)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_preferences_are_compared_at_the_same_noise(tiny, params, moved, text):
    rows = {"latents": noise(0), "reward": torch.tensor([0.5, 1.0, 0.0, 3.0]), **text}
    pairs = preference.best_and_worst(rows, 2)
    assert torch.equal(pairs["winner"], noise(0)[[1, 3]]) and torch.equal(pairs["loser"], noise(0)[[0, 2]])
    assert torch.equal(pairs["pooled"], text["pooled"][[1, 3]])
    pairs |= {"noise": noise(1)[:2], "t": torch.tensor([0.3, 0.8])}
    batch = preference.add_references(tiny.config, pairs, moved, params)
    value, metrics = objectives.dpo_loss(tiny.config, beta=7.0, anchor=0.1)(params, batch, KEYS[:2])
    own = {name: pairs[name] for name in ("context", "pooled")}

    def error(policy, side):
        x = points.noised(pairs, side)
        return mean((apply(tiny, policy, x, pairs["t"], own) - (pairs["noise"] - pairs[side])) ** 2)

    difference = [error(params, side) - error(moved, side) for side in ("winner", "loser")]
    expected = -torch.log(torch.sigmoid(-7.0 / 2 * (difference[0] - difference[1]))) + 0.1 * error(params, "winner")
    torch.testing.assert_close(value, expected.mean())
    torch.testing.assert_close(metrics["margin"], (difference[1] - difference[0]).mean())
    torch.testing.assert_close(metrics["winner_error"], error(params, "winner").mean())
    assert float(metrics["kl"]) == pytest.approx(0.0, abs=1e-9)
    same = preference.add_references(tiny.config, pairs, params)
    assert float(objectives.dpo_loss(tiny.config)(params, same, KEYS[:2])[0]) == pytest.approx(math.log(2), rel=1e-5)
    with pytest.raises(ValueError, match="beta 0 must be positive"):
        objectives.dpo_loss(tiny.config, beta=0)


@pytest.mark.parametrize("last", [1, 3])
def test_draft_differentiates_the_last_steps_alone(tiny, params, moved, text, last):
    batch = {"noise": noise(0), **text}
    velocity_of = points.model_velocity(tiny.config)
    decode = lambda params, latents: torch.sigmoid(latents[:, :3])  # noqa: E731
    total = lambda images, batch: images[:, 0].mean((1, 2)) - images[:, 1].square().mean((1, 2))  # noqa: E731
    loss = objectives.draft_loss(velocity_of, decode, total, TIMES, start=moved, last=last, kl=0.2)

    def by_hand(params):
        x = batch["noise"]
        for index, (t, s) in enumerate(zip(TIMES[:-1], TIMES[1:], strict=True)):
            if index == 4 - last:
                x = x.detach()
                drift = mean((apply(tiny, params, x, t, text) - apply(tiny, moved, x, t, text)) ** 2)
            x = x + (s - t) * apply(tiny, params, x, t, text)
        rewards = total(decode(params, x), batch)
        return (0.2 * drift - rewards).mean(), rewards.mean()

    ours, (value, metrics) = transform.value_and_grad(loss, has_aux=True)(params, batch, KEYS)
    expected, reward = by_hand(params)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(metrics["reward"], reward)
    gradients, _ = transform.value_and_grad(by_hand, has_aux=True)(params)
    for one, other in zip(tree.leaves(ours), tree.leaves(gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    blind = objectives.draft_loss(velocity_of, decode, lambda images, batch: total(images, batch).detach(), TIMES)
    with pytest.raises(RewardError, match="no gradient with respect to the images"):
        transform.value_and_grad(blind, has_aux=True)(params, batch, KEYS)
    with pytest.raises(ValueError, match="last 5 must be from 1 to 4"):
        objectives.draft_loss(velocity_of, decode, total, TIMES, last=5)
