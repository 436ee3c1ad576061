"""Images of a model that is a mean velocity: its own method, both times in every step, guidance, masks and tiles."""

import dataclasses

import pytest
import torch

from functional_sd3 import pipeline
from functional_sd3.core import prng
from functional_sd3.flow import guidance, ode, schedule
from functional_sd3.flow.ode import fixed_point
from functional_sd3.transformer import mmdit
from tests import models
from tests.models import parts


@pytest.fixture(scope="module")
def plain():
    return models.random_model()


@pytest.fixture(scope="module")
def model(plain):
    """`plain` as a student of MeanFlow for 2 steps, whose velocity depends on t - r."""
    sizes = dataclasses.replace(plain.config.transformer, interval_size=8)
    levels = schedule.Config(distilled_steps=2, distillation="meanflow", guidance_distilled=True)
    transformer = mmdit.with_interval(plain.params["transformer"], sizes)
    width = sizes.width
    embedder = {
        "in": {"weight": prng.normal(prng.key(1), (width, 8)), "bias": torch.zeros(width)},
        "out": {"weight": prng.normal(prng.key(2), (width, width)) / 4, "bias": torch.zeros(width)},
    }
    config = dataclasses.replace(plain.config, transformer=sizes, schedule=levels)
    return plain._replace(params={**plain.params, "transformer": {**transformer, "interval": embedder}}, config=config)


@pytest.fixture(scope="module")
def conditions(model):
    return pipeline.encode(*parts(model), ["a red circle", "a blue star"])


def mean_velocity(model, conditions, cfg=1.0):
    """u(x, t, r) of the transformer itself, guided by cfg."""

    def u(x, t, r):
        fields = [
            mmdit.apply(model.params["transformer"], model.config.transformer, x, t, *half, interval=t - r)
            for half in conditions
        ]
        return fields[1] + cfg * (fields[0] - fields[1])

    return u


def close(first, second):
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_step_has_both_its_times(model, conditions, steps, cfg):
    noise = pipeline.initial_noise(prng.key(2), model.config, 2)
    latents = pipeline.sample(model.params, model.config, conditions, noise, steps=steps, cfg=cfg)
    x, times = noise, schedule.even(steps)
    for t, r in zip(times, times[1:], strict=False):
        x = x - (t - r) * mean_velocity(model, conditions, cfg)(x, t, r)
    close(latents, x)
    euler = pipeline.sample(model.params, model.config, conditions, noise, steps=steps, cfg=cfg, method="euler")
    assert (euler - latents).abs().max() > 1e-2


def test_samples_have_grids_of_their_own(model, conditions):
    noise = pipeline.initial_noise(prng.key(2), model.config, 2)
    times = torch.tensor([[1.0, 1.0], [0.5, 0.8], [0.0, 0.3]])
    latents = pipeline.sample(model.params, model.config, conditions, noise, times=times, cfg=2.0)
    close(latents, ode.integrate(ode.MEANFLOW, mean_velocity(model, conditions, 2.0), noise, times))


def test_a_velocity_of_one_end_is_made_for_any_time(model, conditions):
    x = pipeline.initial_noise(prng.key(2), model.config, 2)
    u, t = mean_velocity(model, conditions, 2.0), torch.tensor([0.9, 0.6])
    of = lambda ends: pipeline.velocity(model.params, model.config, conditions, 2.0, ends=ends)  # noqa: E731
    for ends in (torch.tensor(0.2), torch.tensor([0.2, 0.5])):
        close(of(ends)(x, t), u(x, t, ends.expand(2)))
        close(of(ends)(x, t[0]), u(x, t[:1].expand(2), ends.expand(2)))
    close(of(None)(x, t), u(x, t, t))


def test_guidance_in_windows_and_with_a_state_guides_mean_velocities(model, conditions):
    noise, times = pipeline.initial_noise(prng.key(2), model.config, 2), schedule.even(2)
    windowed = guidance.windowed(guidance.cfg(4.0), guidance.cfg(1.0), guidance.fraction(0.5, 1.0))
    latents = pipeline.sample(model.params, model.config, conditions, noise, steps=2, guidance=windowed)
    x = noise
    for t, r, cfg in zip(times[:-1], times[1:], (1.0, 4.0), strict=True):
        x = x - (t - r) * mean_velocity(model, conditions, cfg)(x, t, r)
    close(latents, x)
    apg = guidance.apg(2.0, momentum=-0.3)
    latents = pipeline.sample(model.params, model.config, conditions, noise, steps=2, guidance=apg)
    x, carry = noise, apg.init(noise, times[0])
    for t, r in zip(times[:-1], times[1:], strict=True):
        scales = {"positive": 1.0, "negative": 0.0}
        fields = {
            name: mean_velocity(model, conditions, scales[branch.conditioning])(x, t, r)
            for name, branch in apg.needs.items()
        }
        v, carry = apg.combine(fields, x, t, carry)
        x = x - (t - r) * v
    close(latents, x)


def test_a_run_is_shown_and_starts_from_an_image(model):
    prompts, key = ["a red circle"], prng.key(3)
    options = {"steps": 3, "cfg": 1.0}
    image = pipeline.generate(*parts(model), prompts, key, **options)
    states = pipeline.trajectory(*parts(model), prompts, key, **options)
    close(states[-1], image)
    seen = pipeline.trajectory(*parts(model), prompts, key, show=pipeline.denoised, **options)
    close(seen[-1], image)
    again = pipeline.image_to_image(*parts(model), prompts, image, key, strength=0.5, **options)
    assert (again - image).abs().max() > 1e-3
    kept = pipeline.inpaint(*parts(model), prompts, image, torch.zeros(1, 1, 64, 64), key, **options)
    close(kept, pipeline.image_to_image(*parts(model), prompts, image, key, strength=0.0, **options))


def test_tiles_and_regions_have_both_times(model):
    key, options = prng.key(3), {"steps": 2, "cfg": 1.0}
    whole = pipeline.generate(*parts(model), ["a ring"], key, **options)
    close(pipeline.tiled(*parts(model), ["a ring"], key, height=64, width=64, **options), whole)
    region = pipeline.Region("a ring", torch.ones(1, 1, 64, 64), 1.0)
    close(pipeline.regional(*parts(model), ["a star"], [region], key, **options), whole)


def test_noise_is_found_again_by_the_inverse_steps(model, conditions):
    noise = pipeline.initial_noise(prng.key(2), model.config, 2)
    run = {"steps": 8, "cfg": 1.0}
    data = pipeline.sample(model.params, model.config, conditions, noise, **run)
    method = fixed_point.inverse(ode.MEANFLOW, tolerance=None)
    times = schedule.even(8).flip(0)
    back = pipeline.sample(model.params, model.config, conditions, data, method=method, times=times, cfg=1.0)
    torch.testing.assert_close(back, noise, rtol=1e-3, atol=1e-3)
    plain = pipeline.sample(model.params, model.config, conditions, data, times=times, cfg=1.0)
    assert torch.isfinite(plain).all() and (plain - data).abs().max() > 1e-2


def test_a_model_of_velocities_of_one_time_has_no_such_steps(plain):
    with pytest.raises(ValueError, match="method meanflow takes steps of a mean velocity.*has no interval_size"):
        pipeline.generate(*parts(plain), ["a ring"], prng.key(0), steps=2, method="meanflow")
    levels = schedule.Config(distilled_steps=2, distillation="meanflow")
    config = dataclasses.replace(plain.config, schedule=levels)
    with pytest.raises(ValueError, match="has no interval_size"):
        pipeline.generate(plain.params, config, plain.tokenizers, ["a ring"], prng.key(0), steps=2)
