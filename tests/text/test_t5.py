"""Properties of T5's encoder apart from parity with transformers."""

import pytest
import torch

from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.text import t5

CONFIG = t5.Config(vocab=50, width=24, layers=2, heads=3, head_dim=8, mlp_width=32, buckets=8, max_distance=20)
PARAMS = t5.init(prng.key(0), CONFIG)
IDS = prng.randint(prng.key(1), (2, 11), 0, 50)


def test_shape_and_dtype_follow_the_config_and_the_parameters():
    assert t5.apply(PARAMS, CONFIG, IDS).shape == (2, 11, 24)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert t5.apply(tree.cast(PARAMS, dtype), CONFIG, IDS).dtype == dtype


def test_a_mask_of_ones_is_no_mask():
    torch.testing.assert_close(t5.apply(PARAMS, CONFIG, IDS, mask=torch.ones_like(IDS)), t5.apply(PARAMS, CONFIG, IDS))


def test_masked_padding_equals_the_text_alone():
    mask = torch.tensor([[1] * 6 + [0] * 5, [1] * 11])
    alone = t5.apply(PARAMS, CONFIG, IDS[:1, :6])
    torch.testing.assert_close(t5.apply(PARAMS, CONFIG, IDS, mask=mask)[:1, :6], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "math"])
def test_a_text_of_nothing_but_padding_stays_finite(dtype, implementation):
    mask = torch.zeros_like(IDS, dtype=torch.bool)
    output = t5.apply(tree.cast(PARAMS, dtype), CONFIG, IDS, mask=mask, implementation=implementation)
    assert output.isfinite().all()


def test_both_attention_implementations_agree():
    mask = torch.arange(11)[None] < torch.tensor([[4], [9]])
    for chosen in (None, mask):
        exact = t5.apply(PARAMS, CONFIG, IDS, mask=chosen, implementation="math")
        torch.testing.assert_close(t5.apply(PARAMS, CONFIG, IDS, mask=chosen), exact)


@torch.no_grad()
def test_float16_encoder_is_finite_where_its_sums_exceed_float16():
    """An MLP whose outputs, and sums, are beyond 65504, as T5-XXL's are."""
    params = tree.map(torch.clone, PARAMS)
    for block in params["blocks"]:
        block["mlp"]["in"]["weight"] *= 40
        block["mlp"]["out"]["weight"] *= 400
    params = tree.cast(params, torch.float16)
    wide = t5.apply(tree.cast(params, torch.float32), CONFIG, IDS)
    block, normed = params["blocks"][0]["mlp"], torch.nn.functional.rms_norm(wide.half(), (24,))
    gate, value = (normed @ block["in"]["weight"].T).chunk(2, dim=-1)
    naive = (torch.nn.functional.gelu(gate, approximate="tanh") * value) @ block["out"]["weight"].T
    assert not naive.isfinite().all()
    narrow = t5.apply(params, CONFIG, IDS)
    assert narrow.isfinite().all()
    assert float((narrow - wide).norm() / wide.norm()) < 1e-2


def test_relative_bias_depends_on_the_distance_alone():
    bias = t5.relative_bias(PARAMS["relative_bias"], CONFIG, 40)
    assert bias.shape == (1, 3, 40, 40)
    assert torch.equal(bias[..., 1:, 1:], bias[..., :-1, :-1])
    # The same text later in a longer one sees the same distances.
    assert torch.equal(bias[..., :7, :7], t5.relative_bias(PARAMS["relative_bias"], CONFIG, 7))


def test_near_distances_have_a_bucket_each_and_far_ones_share_the_last():
    distances = torch.arange(-300, 301)
    bucket = t5.relative_bucket(distances, 32, 128)
    near = bucket[distances.abs() < 8]
    assert near.unique().numel() == near.numel()
    assert bucket[distances >= 128].unique().tolist() == [31]
    assert bucket[distances <= -128].unique().tolist() == [15]
    later = bucket[distances >= 0]
    assert (later.diff() >= 0).all() and bucket.min() == 0 and bucket.max() == 31


def test_init_has_the_leaves_of_its_spec_and_t5s_scales():
    wide = t5.Config(vocab=100, width=128, layers=1, heads=4, head_dim=16, mlp_width=256)
    params = t5.init(prng.key(2), wide)
    assert {path: tuple(leaf.shape) for path, leaf in tree.flatten_paths(params).items()} == {
        path: param.shape for path, param in specs.paths(t5.spec(wide)).items()
    }
    query, rest = params["blocks"][0]["attention"]["qkv"]["weight"].split([64, 128])
    assert query.std().item() == pytest.approx((128 * 16) ** -0.5, rel=0.03)
    assert rest.std().item() == pytest.approx(128**-0.5, rel=0.03)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"ids have shape \(11,\)"):
        t5.apply(PARAMS, CONFIG, IDS[0])
    with pytest.raises(ValueError, match=r"mask has shape \(2, 10\), the ids \(2, 11\)"):
        t5.apply(PARAMS, CONFIG, IDS, mask=torch.ones(2, 10))


def test_configs_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="buckets 10 must be a multiple of 4"):
        t5.Config(buckets=10)
    with pytest.raises(ValueError, match="max_distance 8 must be above a quarter of the 32 buckets"):
        t5.Config(max_distance=8)
