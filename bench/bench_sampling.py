"""Images from prompts: whole sampling, and its cost per step."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import openvino_peer, timing
from functional_sd3 import pipeline, weights
from functional_sd3.core import prng
from functional_sd3.transformer import mmdit
from functional_sd3.weights import prepack
from tests import models

PROMPTS = ["a large red circle on a white background"]
STEPS = 28


def all_products(model, theirs, noise):
    """The products of every step of diffusers' module, which are those of one step as often."""
    conditions = pipeline.encode(*models.parts(model), PROMPTS)
    context, pooled = (torch.cat(both) for both in zip(*conditions, strict=True))
    t = torch.full((2,), 500.0)
    with torch.no_grad():
        step = timing.products(lambda: theirs.transformer(noise.repeat(2, 1, 1, 1), context, pooled, t))
    return lambda: [step() for _ in range(STEPS)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model of width 512 with small encoders, 256x256 pixels: ours, and diffusers' pipeline of the same folder."""
    from diffusers import StableDiffusion3Pipeline

    config = models.config(heads=8, head_dim=64, depth=6, position_size=32, sample_size=32)
    # Its attention over the image alone is SD3.5-medium's, in the first half of the blocks.
    config = replace(config, transformer=replace(config.transformer, dual_attention_layers=(0, 1, 2)))
    folder = tmp_path_factory.mktemp("model") / "random"
    weights.save(folder, models.random_model(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusion3Pipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return weights.load(folder), theirs


def by_diffusers(theirs, noise):
    return theirs(
        PROMPTS,
        latents=noise,
        height=256,
        width=256,
        max_sequence_length=24,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="pt",
    ).images


def by_openvino(model, theirs, noise):
    """diffusers' pipeline of OpenVINO's networks, for a row's `beside`."""
    context, pooled = (torch.cat(both) for both in zip(*pipeline.encode(*models.parts(model), PROMPTS), strict=True))
    run = partial(by_diffusers, theirs, noise)
    return openvino_peer.pipelines(theirs, noise.repeat(2, 1, 1, 1), context, pooled, run=run)


def test_pipeline(versus, pair):
    model, theirs = pair
    noise = prng.normal(prng.key(7), (1, 16, 32, 32))
    versus(
        "28 steps with guidance, width 512, 6 blocks, 256x256, from prompt to pixels",
        lambda: pipeline.generate(*models.parts(model), PROMPTS, prng.key(0), noise=noise, steps=STEPS, cfg=5.0),
        partial(by_diffusers, theirs, noise),
        peer="diffusers' pipeline",
        tolerance=1e-3,
        rounds=7,
        memory=True,
        least=all_products(model, theirs, noise),
        beside=by_openvino(model, theirs, noise),
    )


def test_prepacked_pipeline(versus, pair):
    """The transformer's weights pre-packed beforehand, as OpenVINO's are when it compiles."""
    model, theirs = pair
    noise = prng.normal(prng.key(7), (1, 16, 32, 32))
    params, *rest = models.parts(model)
    packed = {**params, "transformer": prepack.prepack(params["transformer"])}
    options = {"noise": noise, "steps": STEPS, "cfg": 5.0}
    versus(
        "28 steps with guidance, width 512, 6 blocks, 256x256, from prompt to pixels, weights pre-packed",
        lambda: pipeline.generate(packed, *rest, PROMPTS, prng.key(0), **options),
        lambda: pipeline.generate(params, *rest, PROMPTS, prng.key(0), **options),
        peer="plain weights here",
        tolerance=0.0,
        rounds=7,
        beside=by_openvino(model, theirs, noise)
        | {"diffusers' pipeline": timing.Beside(partial(by_diffusers, theirs, noise), 1e-3)},
    )


def test_eager_loop(versus, pair):
    model, theirs = pair
    noise = prng.normal(prng.key(7), (1, 16, 32, 32))
    conditions = pipeline.encode(*models.parts(model), PROMPTS)
    times = pipeline.sigmas(model.config, noise, STEPS)
    context, pooled = (torch.cat(both) for both in zip(*conditions, strict=True))

    def velocity(x, t):
        return theirs.transformer(x, context, pooled, t, return_dict=False)[0]

    def loop(velocity=velocity):
        x = noise
        for t, later in zip(times, times[1:], strict=False):
            both = velocity(x.repeat(2, 1, 1, 1), 1000 * t.repeat(2))
            positive, negative = both.chunk(2)
            x = x + (later - t) * (negative + 5.0 * (positive - negative))
        return x

    versus(
        "28 steps with guidance, the latents alone",
        lambda: pipeline.sample(model.params, model.config, conditions, noise, steps=STEPS, cfg=5.0),
        loop,
        peer="eager loop as Stability's, diffusers' module",
        tolerance=1e-3,
        rounds=7,
        memory=True,
        least=all_products(model, theirs, noise),
        beside=openvino_peer.loops(
            loop, velocity, (noise.repeat(2, 1, 1, 1), 1000 * times[:1].repeat(2)), theirs.transformer
        ),
    )


def test_memory_in_steps(versus):
    """A run holds its latents and for each of its steps a row of modulations."""
    config = models.config(heads=4, head_dim=64, depth=4, position_size=32, sample_size=32)
    params = {"transformer": mmdit.init(prng.key(0), config.transformer)}
    model = models.random_model(config)
    conditions = pipeline.encode(*models.parts(model), PROMPTS)
    noise = prng.normal(prng.key(7), (1, 16, 32, 32))
    peaks = {}
    with torch.no_grad():
        for steps in (8, 16, 64):
            peak = timing.allocated_peak(
                lambda steps=steps: pipeline.sample(params, config, conditions, noise, steps=steps)
            )
            peaks[steps] = f"{steps} steps {peak / 2**20:.2f} MiB"
    versus.record("peak memory of sampling against steps, width 256", memory=", ".join(peaks.values()))
