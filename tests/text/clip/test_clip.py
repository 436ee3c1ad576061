"""Properties of CLIP's text encoder apart from parity with transformers."""

from dataclasses import replace

import pytest
import torch

from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.text import clip

CONFIG = clip.Config(vocab=50, length=12, width=16, layers=3, heads=2, mlp_width=24, projection_width=10, eos_id=49)
PARAMS = clip.init(prng.key(0), CONFIG)
IDS = torch.tensor([[40, 3, 7, 49, 0, 0, 0, 0], [40, 1, 49, 2, 49, 5, 6, 7]])


def test_shapes_and_dtype_follow_the_config_and_the_parameters():
    output = clip.apply(PARAMS, CONFIG, IDS)
    assert [tuple(part.shape) for part in output] == [(2, 8, 16), (2, 8, 16), (2, 16), (2, 10)]
    half = clip.apply(clip.init(prng.key(0), CONFIG, dtype=torch.float16), CONFIG, IDS)
    assert {part.dtype for part in half} == {torch.float16}


def test_pooled_is_the_last_state_at_the_first_end_token():
    output = clip.apply(PARAMS, CONFIG, IDS)
    assert torch.equal(output.pooled, torch.stack((output.last[0, 3], output.last[1, 2])))


def test_eos_id_2_pools_at_the_first_highest_id():
    legacy = replace(CONFIG, eos_id=2)
    ids = torch.tensor([[40, 2, 7, 45, 3, 45], [40, 1, 2, 2, 9, 5]])
    output = clip.apply(PARAMS, legacy, ids)
    assert torch.equal(output.pooled, torch.stack((output.last[0, 3], output.last[1, 0])))


def test_projected_is_a_linear_map_of_pooled_without_a_bias():
    output = clip.apply(PARAMS, CONFIG, IDS)
    torch.testing.assert_close(output.projected, output.pooled @ PARAMS["projection"]["weight"].T)


def test_penultimate_is_the_input_of_the_last_block():
    shorter = replace(CONFIG, layers=2)
    first_two = {**PARAMS, "blocks": PARAMS["blocks"][:2]}
    embedded = {**PARAMS, "blocks": PARAMS["blocks"][:1]}
    penultimate = clip.apply(PARAMS, CONFIG, IDS).penultimate
    normed = torch.nn.functional.layer_norm(penultimate, (16,), eps=CONFIG.eps)
    torch.testing.assert_close(normed, clip.apply(first_two, shorter, IDS).last)
    skipped = clip.apply(PARAMS, CONFIG, IDS, skip=2).penultimate
    assert torch.equal(skipped, clip.apply(embedded, replace(CONFIG, layers=1), IDS).penultimate)


def test_skip_changes_nothing_but_penultimate():
    plain, skipped = clip.apply(PARAMS, CONFIG, IDS), clip.apply(PARAMS, CONFIG, IDS, skip=1)
    assert torch.equal(plain.last, skipped.last) and torch.equal(plain.projected, skipped.projected)
    assert not torch.equal(plain.penultimate, skipped.penultimate)


def test_both_attention_implementations_agree():
    fused, exact = (clip.apply(PARAMS, CONFIG, IDS, implementation=name) for name in ("sdpa", "math"))
    torch.testing.assert_close(fused, exact)


def test_init_has_the_leaves_of_its_spec_and_the_scales_of_the_paper():
    wide = clip.Config(vocab=200, width=128, layers=2, heads=4, mlp_width=512, projection_width=96)
    params = clip.init(prng.key(1), wide)
    assert {path: tuple(leaf.shape) for path, leaf in tree.flatten_paths(params).items()} == {
        path: param.shape for path, param in specs.paths(clip.spec(wide)).items()
    }
    block = params["blocks"][0]
    assert block["attention"]["qkv"]["weight"].std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert block["attention"]["out"]["weight"].std().item() == pytest.approx(128**-0.5 / 2, rel=0.02)
    assert block["mlp"]["in"]["weight"].std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert not torch.equal(block["mlp"]["in"]["weight"], params["blocks"][1]["mlp"]["in"]["weight"])


@pytest.mark.parametrize("shape", [(8,), (2, 13), (2, 0), (1, 2, 3)])
def test_ids_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"ids have shape .* 1 to 12 tokens"):
        clip.apply(PARAMS, CONFIG, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("skip", [-1, 3])
def test_a_skip_that_leaves_no_layer_is_refused(skip):
    with pytest.raises(ValueError, match=f"skip {skip} must be between 0 and 2"):
        clip.apply(PARAMS, CONFIG, IDS, skip=skip)


def test_configs_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="width 10 is not a multiple of the 3 heads"):
        clip.Config(width=10, heads=3)
    with pytest.raises(ValueError, match=r"activation 'relu' must be one of \['gelu', 'quick_gelu'\]"):
        clip.Config(activation="relu")


IMAGE = clip.ImageConfig(12, 4, 16, 2, 2, 24, projection_width=10)


def test_the_image_encoder_reads_its_own_size_only():
    params = clip.image_init(prng.key(0), IMAGE)
    output = clip.image_apply(params, IMAGE, torch.zeros(2, 3, 12, 12))
    assert [tuple(part.shape) for part in output] == [(2, 10, 16), (2, 10, 16), (2, 16), (2, 10)]
    for shape in ((2, 3, 12, 16), (2, 1, 12, 12), (3, 12, 12)):
        with pytest.raises(ValueError, match=r"this encoder reads \(batch, 3, 12, 12\)"):
            clip.image_apply(params, IMAGE, torch.zeros(shape))


def test_images_are_encoded_alone_in_any_batch_and_under_every_transform():
    params = clip.image_init(prng.key(0), IMAGE)
    images = prng.normal(prng.key(1), (3, 3, 12, 12))

    def embed(image):
        return clip.image_apply(params, IMAGE, image[None]).projected[0]

    together = clip.image_apply(params, IMAGE, images).projected
    torch.testing.assert_close(torch.vmap(embed)(images), together, rtol=1e-5, atol=1e-6)
    tangent = prng.normal(prng.key(2), (3, 12, 12))
    _, along = torch.func.jvp(embed, (images[0],), (tangent,))
    jacobian = torch.func.jacrev(embed)(images[0])
    torch.testing.assert_close(along, (jacobian * tangent).sum((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_encoders_that_project_apart_are_no_clip_model():
    from functional_sd3.text.clip import dual as clip_dual

    with pytest.raises(ValueError, match="must share one space"):
        clip_dual.Config(clip.CLIP_L, clip.IMAGE_B32)
