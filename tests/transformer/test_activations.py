"""What a block returns can be recorded, edited and replayed, by its index, wherever a block transform goes."""

from functools import partial

import pytest
import torch
from torch.func import grad, jvp, vmap

from functional_sd3 import pipeline
from functional_sd3.core import computation, prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.flow import caches
from functional_sd3.layouts.components import Config
from functional_sd3.text import t5
from functional_sd3.text.clip import text as clip
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import objectives
from functional_sd3.transformer import activations, joint_block, mmdit
from functional_sd3.transformer.activations import edit_outputs, record, replay
from tests import models

CONFIG = models.transformer_config(depth=3, position_size=8, sample_size=8)


def random(seed, *shape):
    return prng.normal(prng.key(seed), shape)


def random_leaf(path, param):
    return 0.2 * random(int.from_bytes(path.encode()[-7:], "big"), *param.shape)


PARAMS = specs.map_params(random_leaf, mmdit.spec(CONFIG))
INPUTS = random(1, 2, 2, 8, 8), torch.tensor([0.3, 0.8]), random(2, 2, 3, 6), random(3, 2, 5)
velocity = partial(mmdit.apply, PARAMS, CONFIG, *INPUTS)
CONDITIONS = pipeline.Conditions(Conditioning(*INPUTS[2:]), Conditioning(*(-part for part in INPUTS[2:])))
sample = partial(
    pipeline.sample, {"transformer": PARAMS}, Config(transformer=CONFIG), CONDITIONS, INPUTS[0], method="euler"
)


def test_what_is_recorded_is_what_the_network_computes_with_and_leaves_the_velocity_as_it_is():
    actual, kept = record(lambda each: velocity(block_transform=each), [0, 2])
    torch.testing.assert_close(actual, velocity(), rtol=0, atol=0)
    assert {block: len(outputs) for block, outputs in kept.items()} == {0: 1, 2: 1}
    condition = mmdit.modulations(PARAMS, CONFIG, INPUTS[1], INPUTS[3])
    shift, scale = joint_block.split_modulation(condition["final"], CONFIG.width)
    patches = (joint_block.norm(kept[2][0]) * (1 + scale) + shift) @ PARAMS["final"]["out"]["weight"].T
    expected = mmdit.unpatchify(patches + PARAMS["final"]["out"]["bias"], CONFIG, 4, 4)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_blocks_keep_their_index_where_others_are_left_out():
    _, kept = record(lambda each: velocity(block_transform=each, skip_layers=(0, 1)), [0, 1, 2])
    assert [len(kept[block]) for block in range(3)] == [0, 0, 1]


def test_a_run_with_the_last_blocks_output_of_another_is_the_other():
    x, t, context, pooled = INPUTS
    other = mmdit.apply(PARAMS, CONFIG, x.flip(0) + 1, t, context * 2, pooled)
    _, kept = record(lambda each: velocity(block_transform=each), [2])
    patched = replay(
        lambda each: mmdit.apply(PARAMS, CONFIG, x.flip(0) + 1, t, context * 2, pooled, block_transform=each), kept
    )
    torch.testing.assert_close(patched, velocity(), rtol=0, atol=0)
    assert not torch.allclose(patched, other)


def test_a_replayed_run_calls_each_block_as_often_as_the_recorded_one():
    _, kept = record(lambda each: [velocity(block_transform=each) for _ in range(2)], [1])
    with pytest.raises(ValueError, match="2 outputs of block 1 were recorded, and the run called it 1 times"):
        replay(lambda each: velocity(block_transform=each), kept)
    with pytest.raises(ValueError, match="calls it more often"):
        replay(lambda each: [velocity(block_transform=each) for _ in range(3)], kept)


def steered(direction, params=PARAMS, inputs=INPUTS):
    edit = edit_outputs(lambda streams: {"image": streams["image"] + direction})
    return mmdit.apply(params, CONFIG, *inputs, block_transform={1: edit})


def test_a_steered_velocity_has_every_derivative_in_its_direction():
    params, inputs = tree.cast(PARAMS, torch.float64), [x.double() for x in INPUTS]
    direction, along = random(5, CONFIG.width).double(), random(6, CONFIG.width).double()
    run = partial(steered, params=params, inputs=inputs)
    difference = (run(direction + 1e-5 * along) - run(direction - 1e-5 * along)) / 2e-5
    value, tangent = jvp(run, (direction,), (along,))
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)
    weights = random(7, *value.shape).double()
    gradient = grad(lambda direction: (run(direction) * weights).sum())(direction)
    torch.testing.assert_close(gradient @ along, (tangent * weights).sum(), rtol=1e-10, atol=1e-10)


def test_directions_may_be_mapped_over():
    directions = random(8, 3, CONFIG.width)
    expected = torch.stack([steered(direction) for direction in directions])
    torch.testing.assert_close(vmap(steered)(directions), expected, rtol=1e-5, atol=1e-6)


def test_recorded_activations_can_be_returned_from_a_mapped_function():
    def function(x):
        actual, kept = record(lambda each: mmdit.apply(PARAMS, CONFIG, x[None], *each_input, block_transform=each), [1])
        return actual, kept[1][0]

    each_input = [value[:1] for value in INPUTS[1:]]
    _, kept = vmap(function)(INPUTS[0])
    expected = torch.stack([function(x)[1] for x in INPUTS[0]])
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-6)


def test_a_block_is_rematerialised_and_edited_by_composed_transforms():
    edit = edit_outputs(lambda streams: {"image": streams["image"] * 1.1})
    counted = []

    def count(apply):
        return lambda *args, **options: counted.append(1) or apply(*args, **options)

    def loss(params, block_transform):
        return mmdit.apply(params, CONFIG, *INPUTS, block_transform=block_transform).square().sum()

    composed = computation.composed(transform.remat, {1: edit}, CONFIG.depth)
    actual = grad(loss)(PARAMS, computation.composed(count, composed, CONFIG.depth))
    assert len(counted) == CONFIG.depth
    for path, expected in tree.select(grad(loss)(PARAMS, {1: edit}), "*").items():
        torch.testing.assert_close(tree.select(actual, path)[path], expected, rtol=1e-4, atol=1e-5, msg=path)


def test_edits_steer_what_a_pipeline_draws_and_are_of_all_rows_that_guidance_evaluates():
    latents, kept = record(lambda each: sample(cfg=3.0, steps=2, block_transform=each), [1])
    torch.testing.assert_close(latents, sample(cfg=3.0, steps=2), rtol=0, atol=0)
    assert [len(image) for image in kept[1]] == [2 * len(INPUTS[0])] * 2
    edits = {1: edit_outputs(lambda streams: {"image": streams["image"] + random(4, CONFIG.width)})}
    assert not torch.allclose(sample(cfg=3.0, steps=2, block_transform=edits), latents)


def test_edits_and_caches_of_blocks_apply_together():
    edits = {1: edit_outputs(lambda streams: {"image": streams["image"] * 1.5})}
    run = partial(sample, steps=4, cfg=2.0, block_transform=edits)
    torch.testing.assert_close(run(cache=caches.parse("first-block:threshold=0")), run(), rtol=0, atol=0)
    assert not torch.allclose(run(cache=caches.parse("first-block:threshold=1e9,warmup=1,final=1")), run())


def test_objectives_take_edits_from_the_computation_of_a_config():
    batch = {"latents": INPUTS[0], "context": INPUTS[2], "pooled": INPUTS[3]}
    edit = edit_outputs(lambda streams: {"image": streams["image"] + random(4, CONFIG.width)})
    configs = [
        Config(transformer=CONFIG, computations={"transformer": computation.Computation(block_transform=transform)})
        for transform in (None, {0: edit})
    ]
    keys = prng.split(prng.key(0), 2)
    plain, edited = (objectives.flow_loss(each)({"transformer": PARAMS}, batch, keys)[0] for each in configs)
    assert not torch.allclose(plain, edited)


def test_text_encoders_take_transforms_by_index_too():
    ids = torch.arange(6)[None]
    config = t5.Config(vocab=8, width=8, layers=2, heads=2, head_dim=4, mlp_width=16)
    params = t5.init(prng.key(0), config)
    doubled = {1: lambda apply: lambda *args, **options: 2 * apply(*args, **options)}
    # T5's last norm removes a factor.
    torch.testing.assert_close(t5.apply(params, config, ids, block_transform=doubled), t5.apply(params, config, ids))
    small = clip.Config(
        vocab=8, length=6, width=8, layers=2, heads=2, mlp_width=16, activation="gelu", projection_width=8, eos_id=5
    )
    weights = clip.init(prng.key(1), small)
    first = {0: doubled[1]}
    changed = clip.apply(weights, small, ids, block_transform=first).penultimate
    torch.testing.assert_close(changed, 2 * clip.apply(weights, small, ids).penultimate)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda streams: streams["image"], "returned Tensor; it must return some of"),
        (lambda streams: {"picture": streams["image"]}, r"returned \['picture'\]"),
        (lambda streams: {"image": streams["image"][:1]}, r"returned torch.float32 \[1, 16, 16\] on cpu for 'image'"),
        (lambda streams: {"image": streams["image"].double()}, "returned torch.float64"),
        (lambda streams: {"context": None}, "returned NoneType for 'context'"),
    ],
)
def test_an_edit_that_returns_other_streams_is_an_error_that_names_it(edit, message):
    with pytest.raises(ValueError, match=f"the edit .*lambda.* {message}"):
        velocity(block_transform={0: edit_outputs(edit)})


def test_the_index_of_a_block_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"block_transform \[7\] are not among the blocks 0 to 2"):
        velocity(block_transform={7: edit_outputs(dict)})


def test_an_edited_image_broadcasts_over_the_batch():
    one = random(9, 1, 16, CONFIG.width)
    edits = {2: edit_outputs(activations.with_image(one))}
    expected = {2: edit_outputs(activations.with_image(one.repeat(2, 1, 1)))}
    torch.testing.assert_close(velocity(block_transform=edits), velocity(block_transform=expected))
