"""LoRAs as trees: what applying, merging, summing, extracting and resizing them must keep, whatever their values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from functional_sd3 import lora
from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.layouts.components import Config, spec
from functional_sd3.lora import keys as lora_keys
from functional_sd3.lora import tree as adapters
from functional_sd3.text import clip, t5
from functional_sd3.transformer import mmdit

CONFIG = Config(
    clip_l=clip.Config(vocab=20, length=5, width=8, layers=2, heads=2, mlp_width=12, projection_width=8),
    t5=t5.Config(vocab=20, width=8, layers=1, heads=2, head_dim=4, mlp_width=12),
    transformer=mmdit.Config(
        depth=2, heads=2, head_dim=4, in_channels=2, out_channels=2, context_width=8, pooled_width=6, position_size=6,
        sample_size=8, qk_norm=True, dual_attention_layers=(0,),
    ),
)  # fmt: skip
EVERYTHING = "*"
SEEDS, SCALES = st.integers(0, 2**31), st.floats(-2, 2, width=32)
CHOICES = st.sampled_from([lora.ATTENTION, EVERYTHING, "*.blocks.1.*", ("clip_l.*", "t5.*", "*.patch.weight")])
few = settings(max_examples=15)


def filled(spec, seed):
    """A tree of the spec's shapes with every leaf random; alphas keep their value."""

    generator = torch.Generator().manual_seed(seed)

    def leaf(path, param):
        if path.endswith("alpha"):
            return param.init(prng.key(0), param.shape)
        return 0.3 * torch.randn(param.shape, generator=generator) + (1.0 if "norm" in path else 0.0)

    return specs.map_params(leaf, spec)


PARAMS = filled(spec(CONFIG), 1)


def random_lora(seed, rank=2, targets=EVERYTHING, alpha=3.0):
    return filled(lora.spec(CONFIG, rank, targets, alpha=alpha), seed)


def same(first, second):
    return not tree.diff(first, second)


def close(first, second, tolerance=1e-4):
    return tree.allclose(first, second, rtol=tolerance, atol=tolerance)


def velocity(params, *, implementation="sdpa"):
    draw = lambda index, *shape: prng.normal(prng.key(index), shape)  # noqa: E731
    inputs = draw(1, 3, 2, 8, 4), torch.tensor([0.1, 0.5, 0.9]), draw(2, 3, 5, 8), draw(3, 3, 6)
    return mmdit.apply(params["transformer"], CONFIG.transformer, *inputs, implementation=implementation)


def texts(params):
    ids = torch.tensor([[1, 5, 19], [3, 19, 2]])
    projected = clip.apply(params["clip_l"], CONFIG.clip_l, ids).projected
    return torch.cat([projected, t5.apply(params["t5"], CONFIG.t5, ids).mean(1)])


@few
@given(SEEDS, CHOICES)
def test_a_lora_of_scale_zero_changes_nothing(seed, targets):
    assert same(lora.apply(PARAMS, random_lora(seed, targets=targets), 0.0), PARAMS)


def test_a_fresh_lora_changes_nothing():
    fresh = lora.init(prng.key(3), CONFIG, 4)
    assert same(lora.apply(PARAMS, fresh), PARAMS)
    assert all(node[0]["down"].std() > 0 for node in adapters.entries(fresh).values() if isinstance(node, list))


@few
@given(SEEDS, SCALES, CHOICES)
def test_what_is_added_is_the_product_of_the_factors(seed, scale, targets):
    one = random_lora(seed, targets=targets)
    changed = tree.flatten_paths(lora.apply(PARAMS, one, scale))
    nodes = adapters.entries(one)
    for path, leaf in tree.flatten_paths(PARAMS).items():
        if path not in nodes:
            assert changed[path] is leaf
            continue
        blocks = [1.5 * part["up"] @ part["down"].flatten(1) for part in adapters.members(nodes[path])]
        torch.testing.assert_close(changed[path], leaf + scale * torch.cat(blocks).reshape(leaf.shape))


@few
@given(SEEDS, SCALES, SCALES)
def test_it_is_linear_in_the_scale(seed, first, second):
    one = random_lora(seed)
    difference = lambda scale: tree.map(torch.sub, lora.apply(PARAMS, one, scale), PARAMS)  # noqa: E731
    assert close(tree.map(torch.add, difference(first), difference(second)), difference(first + second))


@few
@given(SEEDS, CHOICES, SCALES)
def test_merged_and_lazy_parameters_compute_the_same(seed, targets, scale):
    one = random_lora(seed, targets=targets)
    merged, lazy = lora.apply(PARAMS, one, scale), lora.apply(PARAMS, one, scale, lazy=True)
    torch.testing.assert_close(velocity(lazy), velocity(merged), rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(texts(lazy), texts(merged), rtol=2e-3, atol=2e-4)


def test_a_lora_does_change_what_is_computed():
    one = random_lora(5)
    assert (velocity(lora.apply(PARAMS, one)) - velocity(PARAMS)).abs().max() > 0.01
    assert (texts(lora.apply(PARAMS, one)) - texts(PARAMS)).abs().max() > 0.01


@few
@given(SEEDS, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), SCALES)
def test_unmerge_gives_back_every_bit(seed, dtype, scale):
    params = tree.cast(PARAMS, dtype)
    merged = lora.merge(params, [random_lora(seed), random_lora(seed + 1, targets=lora.ATTENTION)], scale)
    assert not same(merged.params, params) or abs(scale) < 0.01
    assert same(lora.unmerge(merged), params)
    assert all(one.dtype == dtype for one in tree.leaves(merged.params))


def test_unmerge_keeps_no_memory_of_its_own():
    merged = lora.merge(PARAMS, random_lora(1))
    places = {leaf.data_ptr() for leaf in tree.leaves(PARAMS)}
    assert all(leaf.data_ptr() in places for leaf in merged.originals.values())


@few
@given(SEEDS, SCALES, SCALES)
def test_several_at_once_are_one_after_the_other_are_their_sum(seed, first, second):
    one, other = random_lora(seed), random_lora(seed + 1, rank=3, targets=lora.ATTENTION)
    together = lora.apply(PARAMS, [one, other], [first, second])
    assert close(lora.apply(lora.apply(PARAMS, one, first), other, second), together)
    assert close(lora.apply(PARAMS, lora.combine([one, other], [first, second])), together)
    lazily = lora.apply(lora.apply(PARAMS, one, first, lazy=True), other, second, lazy=True)
    torch.testing.assert_close(velocity(lazily), velocity(together), rtol=2e-3, atol=2e-4)


def test_one_adapter_over_query_key_and_value_sums_with_separate_ones():
    separate = random_lora(1, targets="transformer.blocks.0.image.attention.qkv.weight")
    path, (down, up) = next((path, adapters.factors(node)) for path, node in adapters.entries(separate).items())
    fused = adapters.build({path: {"down": down, "up": up, "alpha": torch.tensor(float(len(down)))}})
    assert close(lora.apply(PARAMS, fused), lora.apply(PARAMS, separate))
    assert close(lora.apply(PARAMS, lora.combine([fused, separate])), lora.apply(PARAMS, separate, 2.0))
    assert close(lora.apply(PARAMS, lora.combine([separate, fused])), lora.apply(PARAMS, separate, 2.0))


def test_the_scale_may_depend_on_the_path():
    one = random_lora(2, targets="transformer.blocks.*")
    applied = lora.apply(PARAMS, one, lambda path: 0.5 if ".blocks.1." in path else 0.0)
    changed = {difference.path for difference in tree.diff(applied, PARAMS)}
    assert changed == {path for path in adapters.entries(one) if ".blocks.1." in path}


def test_a_rank_above_that_of_every_matrix_is_refused_before_anything_is_made():
    with pytest.raises(ValueError, match=r"rank 1000000000 \(--lora\) must be at most \d+, the rank that"):
        lora.spec(CONFIG, 10**9)


@few
@given(SEEDS)
def test_extraction_at_full_rank_gives_the_difference(seed):
    tuned = filled(spec(CONFIG), seed)
    able = lambda path, leaf: lora_keys.adaptable(path, leaf.ndim)  # noqa: E731
    tuned = tree.map_with_path(lambda path, one, base: one if able(path, one) else base, tuned, PARAMS)
    assert close(lora.apply(PARAMS, lora.extract(tuned, PARAMS, 1000)), tuned)


@few
@given(SEEDS, st.integers(1, 3))
def test_extraction_finds_a_lora_that_was_merged_and_no_other_of_its_rank_is_nearer(seed, rank):
    one = random_lora(seed, rank=3, targets=lora.ATTENTION)
    tuned = lora.apply(PARAMS, one)
    found = lora.extract(tuned, PARAMS, rank)
    assert adapters.entries(found).keys() == adapters.entries(one).keys()
    path, node = next(iter(adapters.entries(found).items()))
    change = tree.flatten_paths(tuned)[path] - tree.flatten_paths(PARAMS)[path]
    for part, own in zip(change.chunk(3), node, strict=True):
        assert adapters.rank(own) == rank
        left = torch.linalg.svdvals(part)[rank:].norm()
        torch.testing.assert_close((part - adapters.product(own)).norm(), left, rtol=1e-3, atol=1e-4)


def test_extraction_leaves_out_what_did_not_change():
    one = random_lora(1, targets="transformer.blocks.1.image.attention.out.weight")
    assert list(adapters.entries(lora.extract(lora.apply(PARAMS, one), PARAMS, 2))) == list(adapters.entries(one))
    rows = tree.flatten_paths(PARAMS)["clip_l.blocks.0.attention.qkv.weight"].clone()
    rows[8:16] += 1.0
    place = "clip_l.blocks.0.attention.qkv.weight"
    tuned = tree.map_with_path(lambda path, leaf: rows if path == place else leaf, PARAMS)
    (node,) = adapters.entries(lora.extract(tuned, PARAMS, 2)).values()
    assert [bool(part) for part in node] == [False, True, False]
    assert close(lora.apply(PARAMS, lora.extract(tuned, PARAMS, 2)), tuned)
    assert close(velocity(lora.apply(PARAMS, lora.extract(tuned, PARAMS, 2), lazy=True)), velocity(tuned))
    assert close(texts(lora.apply(PARAMS, lora.extract(tuned, PARAMS, 2), lazy=True)), texts(tuned))


@few
@given(SEEDS, st.integers(1, 6))
def test_resizing_up_changes_nothing_and_down_cuts_the_smallest_singular_values(seed, rank):
    one = random_lora(seed, rank=3, alpha=2.0)
    resized = lora.resize(one, rank)
    for path, node in adapters.entries(resized).items():
        for part, before in zip(adapters.members(node), adapters.members(adapters.entries(one)[path]), strict=True):
            assert adapters.rank(part) == rank and float(part["alpha"]) == rank
            error = (adapters.product(before) - adapters.product(part)).norm()
            cut = torch.linalg.svdvals(adapters.product(before).flatten(1))[rank:].norm()
            torch.testing.assert_close(error, cut, rtol=1e-3, atol=1e-4)


def test_nothing_writes_into_what_it_is_given():
    one, other = random_lora(1), random_lora(2)
    given = (PARAMS, one, other)
    copies = tree.map(torch.clone, given)
    tuned = lora.apply(PARAMS, [one, other])
    lora.apply(PARAMS, one, lazy=True)
    lora.unmerge(lora.merge(PARAMS, one))
    lora.combine([one, other], [0.5, 2.0])
    lora.extract(tuned, PARAMS, 2)
    lora.resize(one, 1)
    assert same(given, copies)


@pytest.mark.parametrize("lazy", [False, True])
def test_vmap_over_a_stack_of_loras_is_a_loop(lazy):
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        loras = [random_lora(seed, targets=("transformer.*", "clip_l.*")) for seed in range(3)]
        stack = tree.map(lambda *leaves: torch.stack(leaves), *loras)
        scales = torch.tensor([0.2, 1.0, -0.5])
        run = lambda one, scale: velocity(lora.apply(PARAMS, one, scale, lazy=lazy))  # noqa: E731
        looped = torch.stack([run(one, scale) for one, scale in zip(loras, scales, strict=True)])
        torch.testing.assert_close(vmap(run)(stack, scales), looped, rtol=1e-3, atol=1e-4)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)


def test_gradients_reach_both_factors_by_both_ways_of_applying():
    one = random_lora(4, targets="transformer.*")
    loss = lambda given, lazy: velocity(lora.apply(PARAMS, given, lazy=lazy)).square().mean()  # noqa: E731
    merged, lazy = grad(loss)(one, False), grad(loss)(one, True)
    assert close(merged, lazy, 2e-3)
    factors = {path: leaf for path, leaf in tree.flatten_paths(lazy).items() if not path.endswith("alpha")}
    # The queries of the last block's context are never asked.
    unused = [path for path, leaf in factors.items() if not leaf.any()]
    assert all(".blocks.1.context.attention.qkv.weight.0." in path for path in unused), unused


def test_only_alpha_is_not_trained():
    from functional_sd3.training import step

    described = lora.spec(CONFIG, 2)
    learned, _ = tree.partition(filled(described, 1), step.trainable(described))
    names = {path.rpartition(".")[2] for path in tree.flatten_paths(learned)}
    assert names == {"down", "up"}


def test_what_can_be_adapted_is_what_the_specs_call_a_matrix_of_a_layer():
    wide = Config(clip_l=clip.CLIP_L, clip_g=clip.CLIP_G, t5=t5.T5_XXL, transformer=mmdit.SD35_MEDIUM)
    for config in (wide, CONFIG):
        for path, leaf in specs.paths(spec(config)).items():
            layer = len(leaf.axes) > 1 and not {"vocab", "positions"} & set(leaf.axes)
            assert lora_keys.adaptable(path, len(leaf.shape)) == layer, path


def test_default_targets_are_all_attentions_of_the_transformer():
    paths = adapters.entries(lora.spec(Config(transformer=mmdit.SD35_MEDIUM), 4))
    # 24 blocks of two streams, the last context without output, and 13 second attentions.
    assert len(paths) == 24 * 4 - 1 + 13 * 2
    assert sum("attention2" in path for path in paths) == 26


def test_mistakes_are_named():
    one = random_lora(1, targets="transformer.blocks.1.*")
    sizes = mmdit.Config(depth=1, heads=2, head_dim=8, context_width=8, pooled_width=6, position_size=6)
    other = Config(transformer=sizes)
    with pytest.raises(ValueError, match=r"transformer.blocks.1.image.* is not among the parameters.* more"):
        lora.apply({"transformer": mmdit.init(prng.key(0), other.transformer)}, one)
    with pytest.raises(ValueError, match="is for another model"):
        lora.apply(PARAMS, lora.init(prng.key(0), other, 2))
    with pytest.raises(ValueError, match="targets 'transformer.norm' choose no weight"):
        lora.init(prng.key(0), CONFIG, 2, "transformer.norm")
    with pytest.raises(ValueError, match="rank 0 must be at least 1"):
        lora.init(prng.key(0), CONFIG, 0)
    with pytest.raises(ValueError, match="2 scales do not fit 1 LoRAs"):
        lora.apply(PARAMS, one, [1.0, 2.0])
    with pytest.raises(ValueError, match="no weight that a LoRA can adapt differs"):
        lora.extract(PARAMS, PARAMS, 2)
    with pytest.raises(ValueError, match="without adapters"):
        lora.apply(PARAMS, {})
    bad = tree.map_with_path(lambda p, leaf: leaf * float("nan") if p == "transformer.context.weight" else leaf, PARAMS)
    with pytest.raises(ValueError, match=r"transformer.context.weight has values that are not finite"):
        lora.extract(bad, PARAMS, 2)
