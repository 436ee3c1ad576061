"""Guidance against diffusers 0.42.1: its guiders step by step, and the pipelines that guide by layers and attention.

What of it does not work with SD3, and is therefore compared by its formula alone or not at all, is shown here too.
"""

import warnings

import pytest
import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng
from functional_sd3.flow import guidance
from tests import models
from tests.models import parts

diffusers = pytest.importorskip("diffusers")

STEPS = 8
PROMPTS = ["a large red circle on a white background", "a small blue star left of a green ring on black"]


def predictions(shape=(2, 4, 6, 5)):
    """(positive, negative, worse) of each step, alike as those of a network."""
    for step in range(STEPS):
        keys = prng.split(prng.fold_in(prng.key(5), step), 4)
        common = prng.normal(keys[0], shape)
        yield [common + 0.5 * prng.normal(key, shape) for key in keys[1:]]


def theirs(guider, count, shape=(2, 4, 6, 5)):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, given in enumerate(predictions(shape)):
            guider.set_state(step=step, num_inference_steps=STEPS, timestep=torch.tensor(0.5))
            guider.prepare_inputs({"x": (given[0], given[1])})
            yield guider.forward(*given[:count]).pred


def ours(guiding, names, shape=(2, 4, 6, 5)):
    x, t = torch.zeros(shape), torch.tensor(0.5)
    memory = guiding.init(x, t)
    for step, given in enumerate(predictions(shape)):
        now = guidance.at(guiding, step, STEPS)
        v, memory = now.combine(dict(zip(names, given, strict=False)), x, t, memory)
        yield v


def guider(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers.guiders, name)(**options)


def errors(guiding, guider, names=("positive", "negative"), shape=(2, 4, 6, 5)):
    pairs = zip(ours(guiding, names, shape), theirs(guider, len(names), shape), strict=True)
    return [float((v - expected).abs().max() / expected.abs().max().clamp(min=1)) for v, expected in pairs]


def rescaled(guiding):
    return guidance.rescaled(guiding, 0.7)


GUIDERS = {
    "classifier-free": ("ClassifierFreeGuidance", {"guidance_scale": 6.0}, guidance.cfg(6.0)),
    "rescaled": (
        "ClassifierFreeGuidance",
        {"guidance_scale": 6.0, "guidance_rescale": 0.7},
        rescaled(guidance.cfg(6.0)),
    ),
    "in a part of the run": (
        "ClassifierFreeGuidance",
        {"guidance_scale": 6.0, "start": 0.3, "stop": 0.8},
        guidance.interval(guidance.cfg(6.0), 0.3, 0.8),
    ),
    # Theirs takes the scale that is added to 1.
    "original form": (
        "ClassifierFreeGuidance",
        {"guidance_scale": 5.0, "use_original_formulation": True},
        guidance.cfg(6.0),
    ),
    "zero star": (
        "ClassifierFreeZeroStarGuidance",
        {"guidance_scale": 5.0, "zero_init_steps": 2},
        guidance.zero_init(guidance.zero_star(5.0), 2),
    ),
    "tangential": ("TangentialClassifierFreeGuidance", {"guidance_scale": 5.0}, guidance.tangential(5.0)),
    "tangential, rescaled": (
        "TangentialClassifierFreeGuidance",
        {"guidance_scale": 5.0, "guidance_rescale": 0.7, "stop": 0.5},
        rescaled(guidance.interval(guidance.tangential(5.0), 0.0, 0.5)),
    ),
    "projected, their defaults": (
        "AdaptiveProjectedGuidance",
        {"guidance_scale": 7.5},
        guidance.apg(7.5, momentum=0, eta=1.0, longest=15.0),
    ),
    "projected": (
        "AdaptiveProjectedGuidance",
        {
            "guidance_scale": 7.5,
            "adaptive_projected_guidance_momentum": -0.6,
            "adaptive_projected_guidance_rescale": 3.0,
            "eta": 0.2,
            "guidance_rescale": 0.7,
        },
        rescaled(guidance.apg(7.5, momentum=-0.6, eta=0.2, longest=3.0)),
    ),
    "projected, from the prompt's": (
        "AdaptiveProjectedGuidance",
        {
            "guidance_scale": 6.5,
            "adaptive_projected_guidance_momentum": 0.4,
            "adaptive_projected_guidance_rescale": 0.0,
            "eta": 0.0,
            "use_original_formulation": True,
        },
        guidance.apg(7.5, momentum=0.4, eta=0.0, longest=None, from_positive=True),
    ),
    # In steps 2 to 5: their momentum gathers there alone, as ours.
    "projected, in a part of the run": (
        "AdaptiveProjectedGuidance",
        {"guidance_scale": 7.5, "adaptive_projected_guidance_momentum": -0.6, "eta": 0.0, "start": 0.25, "stop": 0.75},
        guidance.interval(guidance.apg(7.5, momentum=-0.6, eta=0.0, longest=15.0), 0.25, 0.75),
    ),
    "classifier-free, then projected": (
        "AdaptiveProjectedMixGuidance",
        {"guidance_scale": 3.5, "adaptive_projected_guidance_start_step": 2, "adaptive_projected_guidance_rescale": 4},
        guidance.mixed_apg(3.5, longest=4.0, first=3),
    ),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_each_step_equals_that_of_diffusers_guider(name):
    theirs, options, guiding = GUIDERS[name]
    assert max(errors(guiding, guider(theirs, **options))) < 2e-5


def test_rescaled_zero_init_is_not_a_number_in_diffusers_and_no_velocity_here():
    broken = guider("ClassifierFreeZeroStarGuidance", guidance_scale=5.0, guidance_rescale=0.7)
    assert next(theirs(broken, 2)).isnan().all()
    assert not next(ours(rescaled(guidance.zero_init(guidance.zero_star(5.0))), ("positive", "negative"))).any()


def test_magnitude_aware_guidance_equals_diffusers_which_does_not_run_on_images():
    theirs = guider("MagnitudeAwareGuidance", guidance_scale=10.0, alpha=3.0)
    assert max(errors(guidance.magnitude_aware(10.0, 3.0), theirs, shape=(2, 4, 30))) < 2e-5
    with pytest.raises((RuntimeError, ValueError)):  # torch.norm takes no three dimensions
        errors(guidance.magnitude_aware(10.0, 3.0), theirs)


def test_skip_layers_add_what_diffusers_guider_adds_in_the_steps_that_both_take():
    options = {"guidance_scale": 5.0, "skip_layer_guidance_scale": 2.5, "skip_layer_guidance_layers": [1]}
    names = ("positive", "negative", "skip_layers (1,)")
    # 0.5 of 8 steps is 4; of 0.6 their guider takes whole steps, int(4.8), where their pipeline and Stability take 4.8.
    for stop, differing in ((0.5, []), (0.6, [4])):
        window = {"skip_layer_guidance_start": 0.125, "skip_layer_guidance_stop": stop}
        actual = errors(
            guidance.skip_layer(guidance.cfg(5.0), (1,), 2.5, 0.125, stop),
            guider("SkipLayerGuidance", **options, **window),
            names,
        )
        assert [step for step, error in enumerate(actual) if error > 2e-5] == differing
    # Without classifier-free guidance theirs extrapolates from the worse velocity: a scale more by 1 than ours.
    alone = guider("SkipLayerGuidance", **{**options, "guidance_scale": 1.0}, skip_layer_guidance_stop=0.5)
    given = [{"pred_cond": p, "pred_uncond": n, "pred_cond_skip": w} for p, n, w in predictions()][2]
    alone.set_state(step=2, num_inference_steps=STEPS, timestep=torch.tensor(0.5))
    expected = guidance.skip_layer(guidance.CONDITIONAL, (1,), 1.5, 0.01, 0.5)
    v = list(ours(expected, names))[2]
    torch.testing.assert_close(v, alone.forward(**given).pred, atol=1e-5, rtol=1e-5)


def made(tmp_path_factory, name, **transformer):
    """Our model, and diffusers' pipeline of that class loaded from what we saved of it."""
    folder = tmp_path_factory.mktemp(name)
    weights.save(folder / "model", models.random_model(models.config(**transformer)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(diffusers, name).from_pretrained(folder / "model")
    theirs.set_progress_bar_config(disable=True)
    return weights.load(folder / "model"), theirs


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return made(tmp_path_factory, "StableDiffusion3Pipeline", depth=4)


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory):
    """A model as SD3.0: diffusers' processors leave out the norms of queries and keys, and know no second attention."""
    return made(tmp_path_factory, "StableDiffusion3PAGPipeline", qk_norm=False, dual_attention_layers=())


def difference(pair, guiding, **options):
    model, theirs = pair
    noise = prng.normal(prng.key(7), (2, 16, 8, 6))
    steps = options["num_inference_steps"]
    with torch.no_grad():
        images = pipeline.generate(*parts(model), PROMPTS, prng.key(0), noise=noise, guidance=guiding, steps=steps)
    given = {"latents": noise, "height": 64, "width": 48, "max_sequence_length": 24, "output_type": "pt"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(PROMPTS, **given, **options).images
    assert images.std() > 0.05
    return float((images - expected).abs().max())


@pytest.mark.parametrize("layers, start, stop", [([1], 0.01, 0.5), ([0, 2, 3], 0.1, 0.6)])
def test_images_of_skip_layer_guidance_equal_diffusers_pipeline(plain, layers, start, stop):
    options = {
        "num_inference_steps": 7,
        "guidance_scale": 4.0,
        "skip_guidance_layers": layers,
        "skip_layer_guidance_scale": 1.5,
        "skip_layer_guidance_start": start,
        "skip_layer_guidance_stop": stop,
    }
    guiding = guidance.skip_layer(guidance.cfg(4.0), layers, 1.5, start, stop)
    assert difference(plain, guiding, **options) < 1e-4
    assert difference(plain, guidance.cfg(4.0), **options) > 1e-3


@pytest.mark.parametrize("layers", [[1], [0, 2]])
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_images_of_perturbed_attention_guidance_equal_diffusers_pipeline(perturbed, layers, scale):
    model, theirs = perturbed
    theirs.set_pag_applied_layers([f"blocks.{layer}" for layer in layers], _processors())
    options = {"num_inference_steps": 4, "guidance_scale": scale, "pag_scale": 1.5}
    assert difference((model, theirs), guidance.perturbed(guidance.cfg(scale), layers, 1.5), **options) < 1e-4
    assert difference((model, theirs), guidance.cfg(scale), **options) > 1e-3


def test_perturbed_attention_that_fades_as_diffusers_adaptive_scale_does(perturbed):
    model, theirs = perturbed
    theirs.set_pag_applied_layers(["blocks.1"], _processors())
    options = {"num_inference_steps": 6, "guidance_scale": 4.0, "pag_scale": 1.5, "pag_adaptive_scale": 0.003}
    fading = guidance.perturbed(guidance.cfg(4.0), (1,), lambda t: (1.5 - 3.0 * (1 - t)).clamp(min=0))
    assert difference((model, theirs), fading, **options) < 1e-4


def _processors():
    from diffusers.models.attention_processor import PAGCFGJointAttnProcessor2_0, PAGJointAttnProcessor2_0

    return PAGCFGJointAttnProcessor2_0(), PAGJointAttnProcessor2_0()


def _their_transformer():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    ).eval()


def _their_velocity(transformer):
    generator = torch.Generator().manual_seed(0)
    latents, context, pooled = (
        torch.randn(shape, generator=generator) for shape in ((1, 16, 8, 8), (1, 5, 16), (1, 16))
    )
    with torch.no_grad():
        return transformer(latents, context, pooled, torch.tensor([500.0]), return_dict=False)[0]


def _third_evaluation(guider, transformer):
    """What their guider makes of a network for the third of the three evaluations of a step."""
    guider.set_state(step=2, num_inference_steps=STEPS, timestep=torch.tensor(0.5))
    for _ in range(2):
        guider.prepare_models(transformer)
        guider.cleanup_models(transformer)
    guider.prepare_models(transformer)
    return _their_velocity(transformer)


def test_diffusers_guiders_that_do_not_run_on_sd3():
    from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig

    layers = {"skip_layer_guidance_stop": 0.5}
    # A layer by its number is never a list, which its hook wants.
    with pytest.raises(TypeError, match="has no len"):
        _third_evaluation(guider("SkipLayerGuidance", skip_layer_guidance_layers=[1], **layers), _their_transformer())
    # A skipped block gives its streams in the wrong order, which an even number of them hides.
    odd, even = (
        guider("SkipLayerGuidance", skip_layer_config=LayerSkipConfig(indices=indices), **layers)
        for indices in ([1], [1, 2])
    )
    with pytest.raises(RuntimeError):
        _third_evaluation(odd, _their_transformer())
    assert _third_evaluation(even, _their_transformer()).isfinite().all()
    # The attention of SD3 is not known to the hook of perturbed attention.
    pag = guider("PerturbedAttentionGuidance", perturbed_guidance_layers=[1], perturbed_guidance_stop=0.5)
    with pytest.raises(ValueError, match="JointAttnProcessor2_0"):
        _third_evaluation(pag, _their_transformer())
    auto = guider("AutoGuidance", auto_guidance_layers=[1], dropout=0.1)
    with pytest.raises(TypeError, match="has no len"):
        _third_evaluation(auto, _their_transformer())
    # Smoothed energy guidance never counts its evaluations, so that its hook is never set: it changes nothing.
    transformer = _their_transformer()
    seg = guider("SmoothedEnergyGuidance", seg_guidance_config=SmoothedEnergyGuidanceConfig(indices=[1]))
    assert torch.equal(_third_evaluation(seg, transformer), _their_velocity(transformer))


def test_diffusers_default_of_perturbed_layers_matches_ten_more_blocks_than_block_1(perturbed):
    import re

    names = [f"transformer_blocks.{index}.attn" for index in range(24)]
    matched = [name for name in names if re.search("blocks.1", name)]
    assert len(matched) == 11 and perturbed[1].__class__.__init__.__defaults__[0] == "blocks.1"
