"""The MMDiT: sizes, initial values, options and errors."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench.timing import allocated_peak
from functional_sd3.core import attention, prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.transformer import embeddings, joint_block, mmdit
from tests import models

CONFIG = mmdit.Config(
    depth=4,
    heads=2,
    head_dim=8,
    in_channels=3,
    out_channels=3,
    context_width=12,
    pooled_width=10,
    position_size=10,
    sample_size=16,
    qk_norm=True,
    dual_attention_layers=(0, 1),
)
TOKENS = 4 * 3


def random_params(config: mmdit.Config) -> dict:
    return models.random_leaves(mmdit.spec(config))


def random_inputs(batch: int = 2, height: int = 8, width: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, CONFIG.in_channels, height, width), (batch,), (batch, 5, CONFIG.context_width)
    latents, t, context = (torch.randn(shape, generator=generator) for shape in shapes)
    return latents, t.sigmoid(), context, torch.randn(batch, CONFIG.pooled_width, generator=generator)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def inputs():
    return random_inputs()


def close(first, second, tolerance=1e-5):
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "config, parameters, positions",
    [
        (mmdit.SD3_MEDIUM, 2_028_328_000, 56_623_104),
        (mmdit.SD35_MEDIUM, 2_243_171_520, 226_492_416),
        (mmdit.SD35_LARGE, 8_056_627_520, 89_653_248),
    ],
)
def test_presets_have_the_released_numbers_of_parameters(config, parameters, positions):
    spec = mmdit.spec(config)
    assert math.prod(spec["position"].shape) == positions
    assert specs.count(spec) - positions == parameters


def test_the_position_table_is_the_only_leaf_that_is_not_learned():
    assert [path for path, param in specs.paths(mmdit.spec(CONFIG)).items() if not param.trainable] == ["position"]


def test_fresh_blocks_are_the_identity_and_the_fresh_velocity_is_zero(inputs):
    latents, t, context, pooled = inputs
    fresh = mmdit.init(prng.key(0), CONFIG)
    assert not mmdit.apply(fresh, CONFIG, latents, t, context, pooled).any()
    modulation = mmdit.modulations(fresh, CONFIG, t, pooled)["blocks"][0]
    image, text = torch.randn(2, TOKENS, CONFIG.width), torch.randn(2, 5, CONFIG.width)
    streams = {"image": image, "context": text}
    same = joint_block.apply(fresh["blocks"][0], CONFIG.heads, streams, modulation)
    assert torch.equal(same["image"], image) and torch.equal(same["context"], text)


def test_equal_keys_give_equal_parameters_and_others_do_not():
    first, again, other = (mmdit.init(prng.key(seed), CONFIG) for seed in (3, 3, 4))
    assert not tree.diff(first, again)
    assert "blocks.2.image.attention.qkv.weight" in [difference.path for difference in tree.diff(first, other)]


def test_init_on_the_meta_device_costs_no_memory():
    large = mmdit.init(prng.key(0), mmdit.SD35_LARGE, device="meta", dtype=torch.bfloat16)
    assert all(leaf.is_meta and leaf.dtype == torch.bfloat16 for leaf in tree.leaves(large))


@pytest.mark.parametrize("t_shape", [(3, 2), (3, 1)])
def test_modulations_of_a_whole_run_equal_those_of_each_step(params, inputs, t_shape):
    latents, _, context, pooled = inputs
    t = torch.linspace(0.1, 1.0, math.prod(t_shape)).reshape(t_shape)
    run = mmdit.modulations(params, CONFIG, t, pooled)
    for step in range(3):
        computed = mmdit.apply(params, CONFIG, latents, t[step].expand(2), context, pooled)
        given = mmdit.apply(params, CONFIG, latents, None, context, None, modulations=mmdit.at(run, step))
        assert close(given, computed)


def test_one_number_as_t_is_that_t_for_the_whole_batch(params, inputs):
    latents, _, context, pooled = inputs
    one = mmdit.apply(params, CONFIG, latents, torch.tensor(0.3), context, pooled)
    assert close(one, mmdit.apply(params, CONFIG, latents, torch.tensor([0.3, 0.3]), context, pooled))
    assert not close(one, mmdit.apply(params, CONFIG, latents, torch.tensor([0.3, 0.31]), context, pooled))


def test_skipping_layers_equals_a_network_without_them(params, inputs):
    fewer = {**params, "blocks": [params["blocks"][0], *params["blocks"][2:]]}
    config = mmdit.Config(**{**vars(CONFIG), "depth": 3})
    skipped = mmdit.apply(params, CONFIG, *inputs, skip_layers=(1,))
    assert torch.equal(skipped, mmdit.apply(fewer, config, *inputs))
    assert not close(skipped, mmdit.apply(params, CONFIG, *inputs))


def test_residuals_are_spread_over_the_blocks_and_the_last_block_gets_none(params, inputs):
    residuals = torch.randn(CONFIG.depth, 2, TOKENS, CONFIG.width)
    each = mmdit.apply(params, CONFIG, *inputs, residuals=list(residuals))
    without_last = [*residuals[:-1], torch.zeros_like(residuals[-1])]
    assert torch.equal(each, mmdit.apply(params, CONFIG, *inputs, residuals=without_last))
    two = mmdit.apply(params, CONFIG, *inputs, residuals=list(residuals[:2]))
    doubled = [residuals[0], residuals[0], residuals[1], residuals[1]]
    assert torch.equal(two, mmdit.apply(params, CONFIG, *inputs, residuals=doubled))
    assert not close(two, mmdit.apply(params, CONFIG, *inputs))


def test_only_the_last_blocks_context_has_no_queries(params, inputs):
    inactive = []

    def recorded(streams, **options):
        inactive.append([stream.query is None for stream in streams])
        return attention.joint_attention(streams, **options)

    recording = mmdit.apply(params, CONFIG, *inputs, attend=recorded)
    assert close(recording, mmdit.apply(params, CONFIG, *inputs))
    dual, joint, last = [[False, False], [False]], [[False, False]], [[False, True]]
    assert inactive == dual * 2 + joint + last


def test_a_forward_holds_no_more_than_it_goes_on_with():
    # In images of the width of a block: the inputs of the first attention are freed before the second.
    config = mmdit.Config(**{**vars(CONFIG), "heads": 4, "head_dim": 16, "position_size": 32, "sample_size": 32})
    params = mmdit.init(prng.key(0), config)
    latents, t, context, pooled = random_inputs(height=64, width=64)
    run = partial(mmdit.apply, params, config, latents, t, context, pooled)
    run()
    image = latents.shape[0] * 32 * 32 * config.width * 4
    assert allocated_peak(run) < 14.5 * image


def test_the_second_attention_is_over_the_image_alone(params):
    block = params["blocks"][0]
    dual = {**block, "image": {name: leaf for name, leaf in block["image"].items() if name != "attention2"}}
    assert "attention2" in block["image"] and "attention2" not in params["blocks"][2]["image"]
    image, context = torch.randn(1, 6, CONFIG.width), torch.randn(1, 3, CONFIG.width)
    modulation = {"image": torch.randn(1, 9 * CONFIG.width), "context": torch.randn(1, 6 * CONFIG.width)}
    without = torch.cat([torch.ones(1, 8 * CONFIG.width), torch.zeros(1, CONFIG.width)], dim=-1)
    streams = {"image": image, "context": context}
    both = joint_block.apply(block, CONFIG.heads, streams, modulation)["image"]
    gated = {**modulation, "image": modulation["image"] * without}
    gated_off = joint_block.apply(block, CONFIG.heads, streams, gated)["image"]
    single = {**modulation, "image": modulation["image"][:, : 6 * CONFIG.width]}
    once = joint_block.apply(dual, CONFIG.heads, streams, single)["image"]
    assert close(gated_off, once) and not close(both, once)


def test_patches_are_embedded_as_a_convolution_would(params, inputs):
    latents = inputs[0]
    patch, positions = params["patch"], embeddings.crop_positions(params["position"], 4, 3)
    convolved = F.conv2d(latents, patch["weight"], patch["bias"], stride=CONFIG.patch_size)
    assert close(mmdit.embed_image(params, CONFIG, latents), convolved.flatten(2).mT + positions)


def test_positions_are_the_middle_of_the_table():
    table = torch.arange(36.0).reshape(1, 36, 1)
    assert embeddings.crop_positions(table, 2, 3).flatten().tolist() == [13, 14, 15, 19, 20, 21]
    assert embeddings.crop_positions(table, 3, 2).flatten().tolist() == [8, 9, 14, 15, 20, 21]


def test_positions_of_a_table_as_large_as_its_base_are_a_step_of_one_apart():
    table = embeddings.position_table(8, 5, 5).reshape(5, 5, 8)
    assert close(table[1, 3, 0], torch.tensor(math.sin(3)))
    assert close(table[1, 3, 4], torch.tensor(math.sin(1)))
    half = embeddings.position_table(8, 10, 5).reshape(10, 10, 8)
    assert close(half[::2, ::2], table)


def test_time_enters_in_thousands_and_in_float32():
    sinusoid = embeddings.time_sinusoid(torch.tensor([0.0, 0.5], dtype=torch.bfloat16), 8)
    assert sinusoid.dtype == torch.float32
    assert sinusoid[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert close(sinusoid[1, 0], torch.tensor(math.cos(500)))
    assert close(sinusoid[1, 5], torch.tensor(math.sin(50)))


def test_bfloat16_is_float32_to_two_percent_and_the_velocity_has_the_latents_dtype(params, inputs):
    latents, t, context, pooled = inputs
    narrow = tree.cast(params, torch.bfloat16)
    full = mmdit.apply(params, CONFIG, *inputs)
    half = mmdit.apply(narrow, CONFIG, latents, t, context, pooled)
    assert half.dtype == torch.float32
    assert (half - full).norm() <= 2e-2 * full.norm()
    assert mmdit.apply(narrow, CONFIG, latents.bfloat16(), t, context, pooled).dtype == torch.bfloat16


def test_rematerialised_blocks_give_the_same_gradients(params, inputs):
    def loss(params, block_transform):
        return mmdit.apply(params, CONFIG, *inputs, block_transform=block_transform).square().mean()

    plain, _ = transform.value_and_grad(loss)(params, None)
    again, _ = transform.value_and_grad(loss)(params, transform.remat)
    assert not tree.diff(plain, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents": torch.zeros(2, 3, 9, 6)}, "height 9 is not a multiple of the patch size 2; nearest are 8 and 10"),
        ({"latents": torch.zeros(2, 3, 8, 1)}, "width 1 is not a multiple of the patch size 2; the least is 2"),
        ({"latents": torch.zeros(2, 3, 22, 6)}, "a grid of 11 x 3 patches does not fit the position table of 10 x 10"),
        ({"latents": torch.zeros(2, 4, 8, 6)}, r"latents of shape \[2, 4, 8, 6\] must be \(batch, 3, height, width\)"),
        ({"context": torch.zeros(2, 5, 11)}, r"context \[2, 5, 11\] must be .* = \(2, any, 12\)"),
        ({"context": torch.zeros(1, 5, 12)}, r"context \[1, 5, 12\] must be"),
        ({"pooled": torch.zeros(2, 11)}, r"pooled \[2, 11\] must be"),
        ({"pooled": torch.zeros(3, 10), "t": torch.zeros(())}, "a batch of 3 do not fit latents with a batch of 2"),
        ({"t": torch.zeros(3)}, r"t \[3\] must be \(\) or \(2,\), a time for each of the latents"),
        ({"t": torch.zeros(3, 2)}, r"t \[3, 2\] must be \(\) or \(2,\)"),
        ({"t": None}, "apply needs t and pooled, or the modulations"),
        ({"skip_layers": (1, 7)}, r"skip_layers \[7\] are not among the blocks 0 to 3"),
    ],
)
def test_inputs_that_do_not_fit_are_named(params, inputs, change, message):
    arguments = dict(zip(("latents", "t", "context", "pooled"), inputs, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        mmdit.apply(params, CONFIG, **arguments)


def test_a_position_table_needs_a_width_of_sines_and_cosines_of_both_axes():
    with pytest.raises(ValueError, match="width 6 of a position table must be a multiple of 4"):
        embeddings.position_table(6, 4, 4)
