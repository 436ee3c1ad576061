"""The objective of DiffusionNFT against its formulas, and the points that it learns at."""

import pytest
import torch

from functional_sd3.core import prng, transform
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import objectives, reward_methods
from functional_sd3.training.objectives import points
from functional_sd3.transformer import mmdit

KEYS = prng.split(prng.key(3), 4)


@pytest.fixture
def batch(tiny):
    keys = prng.split(prng.key(8), 6)
    shape = tuple(tiny.batch["latents"].shape)
    noise, old, reference = (prng.normal(key, shape) for key in keys[:3])
    return {
        "latents": tiny.batch["latents"],
        "noise": noise,
        "t": torch.tensor([0.1, 0.4, 0.7, 1.0]),
        "context": prng.normal(keys[3], (4, 3, 32)),
        "pooled": prng.normal(keys[4], (4, 32)),
        "old": old,
        "reference": reference,
        "advantage": torch.tensor([-7.0, -1.0, 0.5, 9.0]),
    }


def velocity(tiny, params, batch):
    t = batch["t"][:, None, None, None]
    x = (1 - t) * batch["latents"] + t * batch["noise"]
    return x, t, mmdit.apply(params, tiny.config.transformer, x, batch["t"], batch["context"], batch["pooled"])


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_the_loss_is_that_of_the_paper(tiny, batch, beta):
    params = {"transformer": tiny.params["transformer"]}
    value, metrics = objectives.nft_loss(tiny.config, beta=beta, kl=0.01)(params, batch, KEYS)
    x, t, v = velocity(tiny, params["transformer"], batch)
    expected = 0.0
    for i, r in enumerate([0.0, 0.4, 0.55, 1.0]):
        errors = []
        for other in (
            beta * v[i] + (1 - beta) * batch["old"][i],
            (1 + beta) * batch["old"][i] - beta * v[i],
        ):
            difference = x[i] - t[i] * other - batch["latents"][i]
            errors.append(difference.square().mean() / difference.abs().mean())
        drift = (v[i] - batch["reference"][i]).square().mean()
        expected = expected + 5 * (r * errors[0] + (1 - r) * errors[1]) / beta + 0.01 * drift
    torch.testing.assert_close(value, expected / 4)
    torch.testing.assert_close(metrics["kl"], (v - batch["reference"]).square().mean())
    torch.testing.assert_close(metrics["old_distance"], (v - batch["old"]).square().mean())


def test_a_guided_policy_is_the_guided_velocity_with_both_of_its_parts_differentiated(tiny, batch):
    params = {"transformer": tiny.params["transformer"]}
    negative = Conditioning(torch.ones(1, 3, 32), torch.ones(1, 32))
    blank = {**batch, "context": torch.ones(4, 3, 32), "pooled": torch.ones(4, 32)}

    def expected(params):
        x, t, v = velocity(tiny, params["transformer"], batch)
        unguided = velocity(tiny, params["transformer"], blank)[2]
        v = unguided + 3.0 * (v - unguided)
        good = torch.tensor([0.0, 0.4, 0.55, 1.0])
        errors = []
        for other in (v, 2 * batch["old"] - v):
            difference = (x - t * other - batch["latents"]).flatten(1)
            errors.append(difference.square().mean(1) / difference.abs().mean(1).detach())
        drift = (v - batch["reference"]).square().flatten(1).mean(1)
        return (5 * (good * errors[0] + (1 - good) * errors[1]) + 0.01 * drift).mean()

    loss = objectives.nft_loss(tiny.config, kl=0.01, negative=negative, cfg=3.0)
    gradient, _ = torch.func.grad(loss, has_aux=True)(params, batch, KEYS)
    torch.testing.assert_close(loss(params, batch, KEYS)[0], expected(params))
    torch.testing.assert_close(gradient, torch.func.grad(expected)(params), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("guided", [True, False])
def test_the_method_compares_velocities_that_are_guided_as_the_trained_one(tiny, batch, guided):
    params = {"transformer": tiny.params["transformer"]}
    negative = Conditioning(torch.ones(1, 3, 32), torch.ones(1, 32))
    sampler = reward_methods.Sampler(None, None, torch.tensor([0.9, 0.5, 0.0]), negative, 3.0)
    method = reward_methods.nft_method(tiny.config, reward_methods.Options(guided=guided, kl=1.0), sampler)
    rows = {name: batch[name] for name in ("latents", "context", "pooled", "advantage")}
    made = method.batch(prng.key(1), rows, reward_methods.Policies(params, params, params))
    _, metrics = method.loss(params, made, prng.split(prng.key(3), 8))
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-8)
    plain = points.add_velocities(points.model_velocity(tiny.config), made, {"old": params})["old"]
    assert torch.allclose(plain, made["old"], atol=1e-5) != guided


def test_a_sample_that_is_neither_good_nor_bad_gives_no_gradient_on_policy(tiny, batch):
    params = {"transformer": tiny.params["transformer"]}
    batch = points.add_velocities(points.model_velocity(tiny.config), batch, {"old": params}, rows=3)
    torch.testing.assert_close(batch["old"], velocity(tiny, params["transformer"], batch)[2])

    def gradient(advantage):
        loss = objectives.nft_loss(tiny.config, kl=0.0)
        gradients, _ = transform.value_and_grad(loss, has_aux=True)(params, {**batch, "advantage": advantage}, KEYS)
        return torch.cat([leaf.flatten() for leaf in torch.utils._pytree.tree_leaves(gradients)])

    neutral, good, bad = (gradient(torch.full((4,), value)) for value in (0.0, 2.0, -2.0))
    assert neutral.norm() < 1e-4 * good.norm()
    # To first order a bad sample pushes exactly the other way.
    torch.testing.assert_close(bad, -good, rtol=1e-3, atol=1e-5 * float(good.norm()))


def test_points_are_times_of_the_sampler_without_repetition(batch):
    times = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    rows = {"latents": batch["latents"], "pooled": batch["pooled"], "advantage": batch["advantage"]}
    drawn = reward_methods.draw_points(prng.key(0), rows, times, 3)
    assert drawn["t"].shape == (12,) and set(drawn["t"].tolist()) <= {1.0, 0.75, 0.5, 0.25}
    assert all(len(set(each.tolist())) == 3 for each in drawn["t"].reshape(4, 3))
    assert torch.equal(drawn["pooled"], batch["pooled"].repeat_interleave(3, 0))
    assert len(set(drawn["noise"].flatten().tolist())) > 0.99 * drawn["noise"].numel()
    with pytest.raises(ValueError, match="times 5 must be from 1 to 4"):
        reward_methods.draw_points(prng.key(0), rows, times, 5)


def test_a_batch_that_lacks_something_is_named(tiny, batch):
    del batch["old"]
    with pytest.raises(ValueError, match="the batch of nft_loss lacks old"):
        objectives.nft_loss(tiny.config)({"transformer": tiny.params["transformer"]}, batch, KEYS)
