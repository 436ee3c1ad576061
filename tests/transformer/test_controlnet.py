"""ControlNets: initial values, sums of several, active steps and errors."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

from functional_sd3.core import prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.transformer import control, controlnet, mmdit
from tests import models

TRANSFORMER = mmdit.Config(
    depth=5, heads=2, head_dim=8, in_channels=3, out_channels=3, context_width=12, pooled_width=10,
    position_size=10, sample_size=16, qk_norm=True, dual_attention_layers=(0, 1),
)  # fmt: skip
JOINT = controlnet.Config(
    depth=2, heads=2, head_dim=8, in_channels=3, context_width=12, pooled_width=10,
    position_size=10, sample_size=16, qk_norm=True, dual_attention_layers=(0, 1),
)  # fmt: skip
IMAGE_ONLY = dataclasses.replace(
    JOINT, depth=3, context_width=None, has_patch_embedding=False, position_size=None, zero_pooled=False
)
BOTH = pytest.mark.parametrize("config", [JOINT, IMAGE_ONLY], ids=["joint", "image alone"])


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = models.random_leaves(mmdit.spec(TRANSFORMER))
NETS = {config: models.random_leaves(controlnet.spec(config), seed=1) for config in (JOINT, IMAGE_ONLY)}


def inputs(batch: int = 4) -> tuple[torch.Tensor, ...]:
    return random(2, batch, 3, 8, 6), random(3, batch).sigmoid(), random(4, batch, 5, 12), random(5, batch, 10)


def residuals(config, params, latents, t, context, pooled, image, scale=1.0, **options):
    seen = latents if config.has_patch_embedding else mmdit.embed_image(WEIGHTS, TRANSFORMER, latents)
    return controlnet.apply(params, config, seen, t, context, pooled, image, scale, **options)


def controlled(*controls, batch: int = 4, **options) -> torch.Tensor:
    summed = control.residuals(controls, WEIGHTS, TRANSFORMER, *inputs(batch))
    arguments = {"residuals": summed.residuals, "residual_after_last": summed.after_last}
    return mmdit.apply(WEIGHTS, TRANSFORMER, *inputs(batch), **arguments, **options)


def made(config, seed: int = 6, batch: int = 1, **options) -> control.Control:
    return control.Control(NETS[config], config, random(seed, batch, 3, 8, 6), **options)


def close(first, second, tolerance=1e-5):
    return not tree.diff(first, second, rtol=tolerance, atol=tolerance)


@BOTH
def test_a_fresh_controlnet_has_zero_residuals(config):
    fresh = controlnet.init(prng.key(0), config)
    assert not any(part.any() for part in residuals(config, fresh, *inputs(), random(6, 4, 3, 8, 6)))


@BOTH
def test_scale_zero_is_no_controlnet_to_the_bit(config):
    plain = mmdit.apply(WEIGHTS, TRANSFORMER, *inputs())
    assert torch.equal(controlled(made(config, scale=0.0)), plain)
    assert torch.equal(controlled(made(config, scale=torch.zeros(4))), plain)
    assert not close(controlled(made(config)), plain, 1e-2)


@given(first=st.floats(0, 3), second=st.floats(0, 3))
def test_several_are_the_sum_of_each_whatever_their_depths(first, second):
    one, two = made(JOINT, 6, scale=first), made(IMAGE_ONLY, 7, scale=second)
    alone = [control.residuals([net], WEIGHTS, TRANSFORMER, *inputs()) for net in (one, two)]
    spread = [
        [summed.residuals[mmdit.residual_index(block, 5, len(summed.residuals))] for block in range(4)]
        for summed in alone
    ]
    together = control.residuals([one, two], WEIGHTS, TRANSFORMER, *inputs())
    assert close(together.residuals[:4], [a + b for a, b in zip(*spread, strict=True)])


@BOTH
def test_residuals_do_not_depend_on_the_batch(config):
    image, scale = random(6, 4, 3, 8, 6), torch.tensor([0.5, 1.0, 1.5, 2.0])
    together = residuals(config, NETS[config], *inputs(), image, scale)
    for index in range(4):
        sample = [part[index : index + 1] for part in (*inputs(), image, scale)]
        assert close(residuals(config, NETS[config], *sample), [part[index : index + 1] for part in together])


@BOTH
def test_one_control_image_serves_a_whole_batch(config):
    image = random(6, 1, 3, 8, 6)
    one = residuals(config, NETS[config], *inputs(), image)
    assert close(one, residuals(config, NETS[config], *inputs(), image.expand(4, -1, -1, -1)))


def test_after_the_last_block_adds_the_last_residual_before_the_final_layer():
    summed = control.residuals([made(JOINT)], WEIGHTS, TRANSFORMER, *inputs())
    added = mmdit.apply(WEIGHTS, TRANSFORMER, *inputs(), residuals=summed.residuals, residual_after_last=True)
    assert torch.equal(controlled(made(JOINT, after_last=True)), added)
    assert not close(added, controlled(made(JOINT)), 1e-2)


def test_controls_that_disagree_on_the_last_block_keep_their_ways():
    summed = control.residuals([made(JOINT), made(IMAGE_ONLY, after_last=True)], WEIGHTS, TRANSFORMER, *inputs())
    last = control.residuals([made(IMAGE_ONLY)], WEIGHTS, TRANSFORMER, *inputs()).residuals[-1]
    assert summed.after_last and torch.equal(summed.residuals[-1], last)


def test_without_the_pooled_text_where_it_was_trained_without():
    latents, t, context, pooled = inputs()
    summed = control.residuals([made(JOINT)], WEIGHTS, TRANSFORMER, latents, t, context, pooled)
    assert close(
        summed.residuals, residuals(JOINT, NETS[JOINT], latents, t, context, 0 * pooled, random(6, 1, 3, 8, 6))
    )


@given(start=st.floats(0, 0.95), length=st.floats(0.05, 1), steps=st.integers(1, 30))
def test_a_control_is_active_in_the_steps_of_diffusers_rule(start, length, steps):
    end = min(start + length, 1.0)
    active = []
    for first, stop, controls in control.segments([made(JOINT, start=start, end=end)], steps):
        active += [bool(controls)] * (stop - first)
    assert active == [not (i / steps < start or (i + 1) / steps > end) for i in range(steps)]


@BOTH
def test_modulations_computed_ahead_are_those_of_each_step(config):
    latents, t, context, pooled = inputs()
    image = random(6, 4, 3, 8, 6)
    run = controlnet.modulations(NETS[config], config, torch.stack([t.flip(0), t]), pooled)
    ahead = residuals(config, NETS[config], latents, None, context, None, image, modulations=mmdit.at(run, 1))
    assert close(ahead, residuals(config, NETS[config], latents, t, context, pooled, image))


@BOTH
def test_vmap_grad_and_remat_work(config):
    image = random(6, 4, 3, 8, 6)

    def one(*sample):
        parts = (part[None] for part in sample)
        return [out[0] for out in residuals(config, NETS[config], *parts)]

    assert close(vmap(one)(*inputs(), image), residuals(config, NETS[config], *inputs(), image))

    def loss(params, **options):
        return sum(part.square().mean() for part in residuals(config, params, *inputs(), image, **options))

    gradients = grad(loss)(NETS[config])
    learned = {path for path, param in specs.paths(controlnet.spec(config)).items() if param.trainable}
    # What the last block makes of the context, nobody reads.
    unread = ("blocks.1.context.mlp", "blocks.1.context.attention.out", "blocks.1.context.attention.query_norm")
    zero_gradients = {path for path, leaf in tree.flatten_paths(gradients).items() if not leaf.any()} & learned
    assert all(path.startswith(unread) for path in zero_gradients)
    again, _ = transform.value_and_grad(lambda params: loss(params, block_transform=transform.remat))(NETS[config])
    assert close(gradients, again)


@BOTH
def test_it_compiles_to_one_graph(config):
    backend = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    arguments = (*inputs(), random(6, 4, 3, 8, 6))
    # All blocks of either kind are alike: one has all there is to trace.
    dual = config.dual_attention_layers and (0,)
    config = dataclasses.replace(config, depth=1, dual_attention_layers=dual)
    params = models.random_leaves(controlnet.spec(config), seed=1)

    def loss(params, scale, *arguments):
        return sum(part.square().mean() for part in residuals(config, params, *arguments, scale))

    compiled = torch.compile(torch.func.grad_and_value(loss), backend=backend, fullgraph=True)
    for scale in (torch.tensor(0.5), torch.tensor(1.5)):
        assert close(compiled(params, scale, *arguments), torch.func.grad_and_value(loss)(params, scale, *arguments))
    assert backend.frame_count == 1


@BOTH
@pytest.mark.parametrize("narrow", ["transformer", "controlnet", "both"])
def test_controlnet_and_transformer_may_be_of_different_dtypes(config, narrow):
    exact = controlled(made(config))
    net = made(config)
    net = net if narrow == "transformer" else net._replace(params=tree.cast(net.params, torch.bfloat16))
    weights = WEIGHTS if narrow == "controlnet" else tree.cast(WEIGHTS, torch.bfloat16)
    summed = control.residuals([net], weights, TRANSFORMER, *inputs())
    velocity = mmdit.apply(weights, TRANSFORMER, *inputs(), residuals=summed.residuals)
    assert velocity.dtype == torch.float32 and (velocity - exact).norm() <= 5e-2 * exact.norm()


def test_training_starts_from_the_transformer():
    like = dataclasses.replace(JOINT, depth=3)
    copied = controlnet.from_transformer(prng.key(0), like, WEIGHTS, TRANSFORMER)
    assert not specs.check(controlnet.spec(like), tree.flatten_paths(copied))
    assert copied["blocks"] == WEIGHTS["blocks"][:3] and not copied["control_patch"]["weight"].any()
    assert not any(part.any() for part in residuals(like, copied, *inputs(), random(6, 4, 3, 8, 6)))
    with pytest.raises(ValueError, match="depth 5 must be less than the transformer's 5"):
        controlnet.from_transformer(prng.key(0), dataclasses.replace(JOINT, depth=5), WEIGHTS, TRANSFORMER)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 3}, "made for another model: its width is 24, the model's 16"),
        ({"depth": 6}, "made for another model: it has 6 blocks, the model only 5"),
        ({"context_width": 11}, "made for another model: its context is 11 wide, the model's 12"),
        ({"pooled_width": 9}, "its pooled_width is 9, the model's 10"),
        ({"in_channels": 4}, "its in_channels is 4, the model's 3"),
    ],
)
def test_a_controlnet_for_another_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        control.check(made(JOINT)._replace(config=dataclasses.replace(JOINT, **change)), TRANSFORMER)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": -0.1}, r"scale -0.1 of a ControlNet must be in \[0, 10\]"),
        ({"scale": float("nan")}, "scale nan"),
        ({"start": 0.5, "end": 0.5}, "start 0.5 and end 0.5"),
        ({"start": -0.1}, "start -0.1"),
        ({"end": 1.1}, "end 1.1"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        control.check(made(JOINT)._replace(**change), TRANSFORMER)


@pytest.mark.parametrize(
    "config, shape, message",
    [
        (JOINT, (1, 3, 8, 8), "control image's latents are 8 x 8, but the noised latents are 8 x 6"),
        (JOINT, (1, 3, 9, 6), "image_latents: height 9 is not a multiple of the patch size 2"),
        (JOINT, (1, 4, 8, 6), r"image_latents of shape \[1, 4, 8, 6\] must be \(batch, 3, height, width\)"),
        (JOINT, (3, 3, 8, 6), "3 control images for a batch of 4"),
        (IMAGE_ONLY, (1, 3, 8, 8), r"latents \[4, 12, 16\] must be \(batch, tokens, width\) = \(any, 16, 16\)"),
    ],
)
def test_control_images_of_other_sizes_are_refused(config, shape, message):
    with pytest.raises(ValueError, match=message):
        residuals(config, NETS[config], *inputs(), torch.zeros(shape))


def test_missing_inputs_are_named():
    latents, t, context, pooled = inputs()
    image = torch.zeros(1, 3, 8, 6)
    with pytest.raises(ValueError, match="no patches of its own.*mmdit.embed_image"):
        controlnet.apply(NETS[IMAGE_ONLY], IMAGE_ONLY, latents, t, None, pooled, image)
    with pytest.raises(ValueError, match="needs a context"):
        controlnet.apply(NETS[JOINT], JOINT, latents, t, None, pooled, image)
    with pytest.raises(ValueError, match="kind 'cany' of ControlNet must be one of blur, canny"):
        dataclasses.replace(JOINT, kind="cany")
    with pytest.raises(ValueError, match="a control image has latents of 8 x 8, but the noised latents have 8 x 6"):
        controlled(made(IMAGE_ONLY)._replace(image_latents=torch.zeros(1, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"residuals \[4, 12, 8\] must be"):
        mmdit.apply(WEIGHTS, TRANSFORMER, latents, t, context, pooled, residuals=[torch.zeros(4, 12, 8)])
