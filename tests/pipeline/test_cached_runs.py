"""Caches in whole runs: with guidance, masks, ControlNets, batches, edits; what each saves, and that it is no more."""

import functools

import pytest
import torch

from functional_sd3 import pipeline
from functional_sd3.core import prng
from functional_sd3.flow import caches, guidance, ode
from functional_sd3.pipeline import Request, SamplingOptions, StartImages
from functional_sd3.transformer import controlnet, joint_block, mmdit
from functional_sd3.transformer.control import Control
from tests import models
from tests.models import parts

PROMPTS, STEPS = ["a red circle", "a blue star"], 8
OFF = ["extrapolate:every=1", "adaptive:tolerance=0", "first-block:threshold=0", "teacache:threshold=0"]
"""Caches that leave out nothing."""
ON = [
    "extrapolate:fitted=yes", "hold:every=3", "adaptive:tolerance=2,order=0", "first-block:threshold=0.7",
    "teacache:threshold=0.9",
]  # fmt: skip
"""Those that leave out something with the random model."""
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def conditions(model):
    return pipeline.encode(*parts(model), PROMPTS)


@pytest.fixture(scope="module")
def noise(model):
    return pipeline.initial_noise(prng.key(2), model.config, 2)


@pytest.fixture
def counts(monkeypatch):
    """Evaluations of the transformer, and of its blocks."""
    counted, apply, block = {"evaluations": 0, "blocks": 0}, mmdit.apply, joint_block.apply

    def count(name, function):
        def counting(*arguments, **options):
            counted[name] += 1
            return function(*arguments, **options)

        return counting

    monkeypatch.setattr(mmdit, "apply", count("evaluations", apply))
    monkeypatch.setattr(joint_block, "apply", count("blocks", block))
    return counted


def sample(model, conditions, noise, cache=None, **options):
    options = {"steps": STEPS, "cfg": 3.0, **options}
    with torch.no_grad():
        return pipeline.sample(model.params, model.config, conditions, noise, cache=cache, **options)


@pytest.fixture(scope="module")
def exact(model, conditions, noise):
    """The run of a kind without a cache."""
    return functools.cache(lambda kind: sample(model, conditions, noise, **KINDS[kind]))


def control(model):
    net = controlnet.Config(
        depth=2, heads=2, head_dim=16, pooled_width=model.config.transformer.pooled_width,
        context_width=model.config.transformer.context_width, sample_size=8, position_size=12, qk_norm=True,
    )  # fmt: skip
    return Control(models.random_leaves(controlnet.spec(net)), net, prng.normal(prng.key(8), (1, 16, 8, 8)), end=0.5)


def mask():
    return lambda velocity: lambda x, t: torch.where(torch.arange(8) < 3, -x, velocity(x, t))


KINDS = {
    "cfg": {},
    "no guidance": {"cfg": 1.0},
    "momentum": {"guidance": guidance.apg(3.0, momentum=-0.5)},
    "window": {"guidance": guidance.interval(guidance.cfg(3.0), 0.25, 0.75)},
    "zero": {"guidance": guidance.zero_init(guidance.zero_star(3.0), 1)},
    "blocks": {"guidance": guidance.skip_layer(guidance.cfg(3.0), [0], 2.0, 0.0, 1.0)},
    "momentum in a window": {
        "guidance": guidance.interval(guidance.apg(3.0, momentum=-0.5), 0.25, 0.75), "transform": mask()},
    "heun": {"method": "heun"},
    "multistep": {"method": "adams_bashforth_3"},
    "noise": {"method": "euler_ancestral", "key": prng.key(5)},
    "mask": {"transform": mask()},
    "remat": {"block_transform": lambda apply: lambda *inputs, **options: apply(*inputs, **options)},
}  # fmt: skip


EVALUATIONS = {"zero": STEPS - 1, "blocks": 2 * STEPS - 1, "heun": 2 * STEPS, "multistep": STEPS + 2}
"""Of the transformer in a run without a cache, where they are not one a step."""


@pytest.mark.parametrize("cache", OFF)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_leaves_out_nothing_changes_no_bit(model, conditions, noise, exact, kind, cache):
    assert torch.equal(sample(model, conditions, noise, cache, **KINDS[kind]), exact(kind))


@pytest.mark.parametrize("cache", OFF)
def test_controlnets_are_as_without(model, conditions, noise, cache):
    active = {"control": [control(model)]}
    assert torch.equal(sample(model, conditions, noise, cache, **active), sample(model, conditions, noise, **active))


@pytest.mark.parametrize("cache", ON)
@pytest.mark.parametrize("kind", KINDS)
def test_every_cache_leaves_something_out_and_stays_near(model, conditions, noise, exact, counts, kind, cache):
    whole = exact(kind)
    counts.update(evaluations=0, blocks=0)
    near = sample(model, conditions, noise, cache, **KINDS[kind])
    evaluations, depth = EVALUATIONS.get(kind, STEPS), model.config.transformer.depth
    assert counts["blocks"] < depth * evaluations - (kind == "blocks") * (STEPS - 1)
    assert (counts["evaluations"] == evaluations) == caches.is_of_blocks(caches.parse(cache))
    assert near.isfinite().all() and 0 < (near - whole).norm() < 0.9 * whole.norm()


def test_extrapolation_computes_the_planned_steps_alone(model, conditions, noise, counts):
    for method, each in (("euler", 1), ("heun", 2), ("rk4", 4)):
        counts.update(evaluations=0, blocks=0)
        sample(model, conditions, noise, "extrapolate:every=2", method=method)
        assert counts["evaluations"] == 5 * each, method


def test_a_window_of_guidance_begins_with_a_step_that_is_computed(model, conditions, noise, counts):
    sample(model, conditions, noise, "hold:every=8", guidance=guidance.interval(guidance.cfg(3.0), 0.25, 0.75))
    # The first step, those where guidance starts and stops, and the last; after each the distance grows from 2.
    computed = caches.computed_steps(caches.parse("hold:every=8"), STEPS, (0, 2, 6))
    assert counts["evaluations"] == sum(computed) and all(computed[step] for step in (0, 2, 6, 7))


@pytest.mark.parametrize("cache", ON)
def test_a_sample_does_not_depend_on_its_batch(model, conditions, noise, cache):
    together = sample(model, conditions, noise, cache)
    for index in range(2):
        rows = pipeline.slice_batch(conditions, slice(index, index + 1))
        alone = sample(model, rows, noise[index : index + 1], cache)
        close(alone, together[index : index + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "cache", ["adaptive:tolerance=2,order=0", "first-block:threshold=0.7", "teacache:threshold=0.9"]
)
def test_decisions_that_cannot_be_read_give_the_same(model, conditions, noise, cache):
    def loss(noise):
        return pipeline.sample(model.params, model.config, conditions, noise, steps=6, cfg=3.0, cache=cache)

    with torch.no_grad():
        mapped = torch.func.vmap(loss)(torch.stack([noise, noise.flip(0)]))
        close(mapped, torch.stack([loss(noise), loss(noise.flip(0))]), rtol=1e-3, atol=1e-3)


def test_images_masks_and_callbacks_are_as_without_a_cache(model):
    images = torch.nn.functional.interpolate(prng.uniform(prng.key(9), (1, 3, 6, 6)), (64, 64)).clamp(0, 1)
    mask = (torch.arange(64) < 32).float().expand(1, 1, 64, 64)
    seen = []

    def draw(cache):
        sampling = SamplingOptions(STEPS, 3.0, cache=cache, on_step=lambda info: seen.append((info.index, info.steps)))
        request = Request("a", prng.key(3)[None], sampling=sampling, start=StartImages(images, 0.75, mask))
        with torch.no_grad():
            return pipeline.draw(model.params, model.config, pipeline.prepare(*parts(model), request))

    exact = draw(None)
    assert torch.equal(draw("extrapolate:every=1"), exact)
    near = draw("extrapolate")
    # What the mask keeps goes straight to its own latents in every step, computed or not.
    assert not torch.equal(near, exact)
    assert seen == 3 * [(step, 6) for step in range(6)]


def test_inversion_takes_a_cache_and_what_has_no_meaning_is_refused(model):
    images = prng.uniform(prng.key(9), (1, 3, 64, 64))
    start = StartImages(images)
    options = {"key": prng.key(3)[None], "sampling": SamplingOptions(4, 3.0, cache="hold"), "start": start}
    with torch.no_grad():
        request = Request("a", edit=pipeline.InversionEdit(["b"]), **options)
        assert pipeline.draw(model.params, model.config, pipeline.prepare(*parts(model), request)).isfinite().all()
    with pytest.raises(ValueError, match="cache: FlowEdit draws new noise"):
        Request("a", edit=pipeline.FlowEdit(["b"]), **options)
    with pytest.raises(ValueError, match="cache: an exact inversion"):
        Request("a", edit=pipeline.InversionEdit(["b"], inversion=ode.fixed_point.inverse), **options)


def test_blocks_are_not_cached_where_one_evaluation_does_not_see_them_all(model, conditions, noise):
    with pytest.raises(ValueError, match="cache first-block is of one network's blocks"):
        sample(model, conditions, noise, "first-block", field=pipeline.tiles(8, 2))
    tiled = sample(model, conditions, noise, "hold", field=pipeline.tiles(8, 2))
    assert not torch.equal(tiled, sample(model, conditions, noise, field=pipeline.tiles(8, 2)))
    with pytest.raises(ValueError, match="dopri5 takes its steps by the errors"):
        sample(model, conditions, noise, "hold", method="dopri5")


def test_a_request_reads_the_words_of_a_cache():
    assert SamplingOptions(cache="extrapolate:every=3").cache == caches.Extrapolate(3)
    with pytest.raises(ValueError, match="'extra' must be one of"):
        SamplingOptions(cache="extra")
