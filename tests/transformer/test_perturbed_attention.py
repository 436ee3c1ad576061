"""The worse attention that perturbed-attention and smoothed energy guidance compare with."""

import math
from functools import partial

import pytest
import torch

from functional_sd3.core import attention, prng, transform
from functional_sd3.core import spec as specs
from functional_sd3.transformer import mmdit

CONFIG = mmdit.Config(
    depth=3,
    heads=2,
    head_dim=16,
    context_width=24,
    pooled_width=20,
    position_size=12,
    sample_size=16,
    qk_norm=True,
    dual_attention_layers=(0, 1),
)


@pytest.fixture(scope="module")
def params():
    generator = torch.Generator().manual_seed(0)
    leaf = lambda path, param: 0.2 * torch.randn(param.shape, generator=generator)  # noqa: E731
    return specs.map_params(leaf, mmdit.spec(CONFIG))


def inputs(batch=2, height=4, width=6):
    keys = prng.split(prng.key(1), 3)
    latents = prng.normal(keys[0], (batch, 16, height, width))
    context, pooled = prng.normal(keys[1], (batch, 5, 24)), prng.normal(keys[2], (batch, 20))
    return latents, torch.tensor(0.7), context, pooled


def streams(*lengths, asking=None, batch=2):
    asking = len(lengths) if asking is None else asking
    actual = []
    for index, length in enumerate(lengths):
        query, key, value = prng.normal(prng.fold_in(prng.key(2), index), (3, batch, 3, length, 8))
        actual.append(attention.Stream(query if index < asking else None, key, value))
    return actual


@pytest.mark.parametrize("lengths, asking", [((6, 4), 2), ((6, 4), 1), ((6, 3, 2), 3), ((6,), 1)])
def test_identity_attention_is_joint_attention_under_a_mask_that_leaves_the_diagonal_of_the_first_stream(
    lengths, asking
):
    given = streams(*lengths, asking=asking)
    total, rows = sum(lengths), sum(lengths[:asking])
    seen = torch.ones(rows, total, dtype=torch.bool)
    seen[: lengths[0], : lengths[0]] = torch.eye(lengths[0], dtype=torch.bool)
    expected = attention.joint_attention(given, mask=seen)
    for ours, theirs in zip(attention.identity_attention(given), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_blurred_attention_without_blur_is_joint_attention_and_with_infinite_blur_has_one_query():
    given = streams(6, 4)
    sharp = attention.blurred_attention(given, size=(2, 3), sigma=1e-3)
    for ours, theirs in zip(sharp, attention.joint_attention(given), strict=True):
        torch.testing.assert_close(ours, theirs)
    image, context = attention.blurred_attention(given, size=(2, 3))
    mean = given[0].query.mean(2, keepdim=True).expand_as(given[0].query)
    expected = attention.joint_attention([given[0]._replace(query=mean), given[1]])
    torch.testing.assert_close(image, expected[0])
    torch.testing.assert_close(context, attention.joint_attention(given)[1])


def test_the_blur_is_a_gaussian_over_rows_and_columns_of_the_grid():
    given, sigma = streams(12), 1.5
    weights = torch.zeros(12, 12)
    for one in range(12):
        for other in range(12):
            squares = (one // 4 - other // 4) ** 2 + (one % 4 - other % 4) ** 2
            weights[one, other] = math.exp(-squares / (2 * sigma**2))
    weights = weights / weights.sum(1, keepdim=True)
    expected = attention.joint_attention([given[0]._replace(query=weights @ given[0].query)])
    torch.testing.assert_close(attention.blurred_attention(given, size=(3, 4), sigma=sigma), expected)


@pytest.mark.parametrize("perturbation", [attention.identity_attention, attention.blurred_attention])
def test_a_perturbed_block_differs_and_the_others_do_not(params, perturbation):
    plain = mmdit.apply(params, CONFIG, *inputs())
    assert torch.equal(mmdit.apply(params, CONFIG, *inputs(), perturbed_layers=(), perturbation=perturbation), plain)
    for layer in range(CONFIG.depth):
        perturbed = mmdit.apply(params, CONFIG, *inputs(), perturbed_layers=[layer], perturbation=perturbation)
        assert (perturbed - plain).abs().max() > 1e-3
    skipped = mmdit.apply(params, CONFIG, *inputs(), skip_layers=(1,), perturbed_layers=(1,), perturbation=perturbation)
    assert torch.equal(skipped, mmdit.apply(params, CONFIG, *inputs(), skip_layers=(1,)))


def test_blocks_that_are_not_there_cannot_be_perturbed(params):
    with pytest.raises(ValueError, match=r"perturbed_layers \[3\] are not among the blocks 0 to 2"):
        mmdit.apply(params, CONFIG, *inputs(), perturbed_layers=(0, 3))


@pytest.mark.parametrize("implementation", ["sdpa", "math"])
def test_image_tokens_of_a_perturbed_model_of_one_block_do_not_see_one_another(params, implementation):
    config = mmdit.Config(**{**vars(CONFIG), "depth": 1, "dual_attention_layers": (0,)})
    one = {**params, "blocks": [params["blocks"][0]]}
    # The last block's context only answers: give it what the last of three has.
    one["blocks"] = [{**params["blocks"][0], "context": params["blocks"][2]["context"]}]
    latents, *rest = inputs(batch=1)
    touched = latents.clone()
    touched[..., :2, :2] += 1
    apply = partial(mmdit.apply, one, config, perturbed_layers=(0,), implementation=implementation)
    changed = (apply(touched, *rest) - apply(latents, *rest)).abs().amax((0, 1)) > 1e-6
    assert changed[:2, :2].all() and not changed[2:].any() and not changed[:, 2:].any()
    free = partial(mmdit.apply, one, config, implementation=implementation)
    assert ((free(touched, *rest) - free(latents, *rest)).abs().amax((0, 1)) > 1e-6).all()


def test_perturbed_blocks_compile_to_one_graph_and_can_be_rematerialised_and_mapped(params):
    def velocity(latents, t, context, pooled, **options):
        return mmdit.apply(params, CONFIG, latents, t, context, pooled, perturbed_layers=(0, 2), **options)

    expected = velocity(*inputs())
    # A perturbed block with a second attention, and a perturbed last one without: both kinds there are to trace.
    config = mmdit.Config(**{**vars(CONFIG), "depth": 2, "dual_attention_layers": (0,)})
    short = {**params, "blocks": [params["blocks"][0], params["blocks"][2]]}
    perturbed = partial(mmdit.apply, short, config, perturbed_layers=(0, 1))
    compiled = torch.compile(perturbed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs()), perturbed(*inputs()))
    torch.testing.assert_close(velocity(*inputs(), block_transform=transform.remat), expected)
    latents, t, context, pooled = inputs()
    each = torch.func.vmap(lambda x, c, p: velocity(x[None], t, c[None], p[None])[0])
    torch.testing.assert_close(each(latents, context, pooled), expected)
    loss = lambda x: velocity(x, t, context, pooled).square().mean()  # noqa: E731
    gradient = torch.func.grad(loss)(latents)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
