"""How the three encoders are put together; against diffusers in tests/parity."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from functional_sd3.core import prng, tree
from functional_sd3.text import bpe, clip, conditioning, t5, unigram
from functional_sd3.weights import shipped

CLIP_L = clip.Config(vocab=50, length=9, width=16, layers=2, heads=2, mlp_width=24, projection_width=16, eos_id=49)
CLIP_G = clip.Config(50, 9, 20, 3, 2, 24, "gelu", 24, eos_id=2)
T5 = t5.Config(vocab=60, width=48, layers=1, heads=3, head_dim=8, mlp_width=32)
TRANSFORMER = SimpleNamespace(context_width=48, pooled_width=40)
PARAMS = {
    "clip_l": clip.init(prng.key(0), CLIP_L),
    "clip_g": clip.init(prng.key(1), CLIP_G),
    "t5": t5.init(prng.key(2), T5),
}
IDS = conditioning.Ids(
    prng.randint(prng.key(3), (2, 9), 0, 50),
    prng.randint(prng.key(4), (2, 9), 0, 50),
    prng.randint(prng.key(5), (2, 6), 0, 60),
)


def config(**changes):
    parts = {"clip_l": CLIP_L, "clip_g": CLIP_G, "t5": T5, "transformer": TRANSFORMER}
    return SimpleNamespace(**(parts | changes))


def without(*names):
    return {name: params for name, params in PARAMS.items() if name not in names}


def test_context_and_pooled_are_the_encoders_outputs_side_by_side():
    context, pooled = conditioning.encode(PARAMS, config(), IDS)
    left, right = (clip.apply(PARAMS["clip_l"], CLIP_L, IDS.clip_l), clip.apply(PARAMS["clip_g"], CLIP_G, IDS.clip_g))
    assert context.shape == (2, 15, 48) and pooled.shape == (2, 40)
    assert torch.equal(context[:, :9, :16], left.penultimate)
    assert torch.equal(context[:, :9, 16:36], right.penultimate)
    assert not context[:, :9, 36:].any()
    assert torch.equal(context[:, 9:], t5.apply(PARAMS["t5"], T5, IDS.t5))
    assert torch.equal(pooled, torch.cat((left.projected, right.projected), dim=1))


@pytest.mark.parametrize(
    "absent", [("clip_l",), ("clip_g",), ("t5",), ("clip_l", "clip_g"), ("clip_l", "clip_g", "t5")], ids="+".join
)
def test_absent_encoders_leave_zeros_where_they_were(absent):
    """All is as with every encoder, but for zeros in the place of the absent ones."""
    context, pooled = (part.clone() for part in conditioning.encode(PARAMS, config(), IDS))
    if "clip_l" in absent:
        context[:, :9, :16], pooled[:, :16] = 0, 0
    if "clip_g" in absent:
        context[:, :9, 16:36], pooled[:, 16:] = 0, 0
    if "t5" in absent:
        context[:, 9:] = 0
    ours = conditioning.encode(without(*absent), config(), IDS)
    assert torch.equal(ours.context, context) and torch.equal(ours.pooled, pooled)


def test_widths_of_a_clip_without_a_config_are_read_off_the_transformer():
    # CLIP-L is as wide as its pooled vector here; without its config 40 - 24 = 16 are left for it.
    unknown = conditioning.encode(without("clip_l"), config(clip_l=None), IDS)
    known = conditioning.encode(without("clip_l"), config(), IDS)
    assert torch.equal(unknown.context, known.context) and torch.equal(unknown.pooled, known.pooled)
    nothing = conditioning.encode({}, config(clip_l=None, clip_g=None, t5=None), IDS)
    assert nothing.context.shape == (2, 15, 48) and nothing.pooled.shape == (2, 40)
    assert not nothing.context.any() and nothing.context.dtype == torch.float32


def test_without_a_transformer_the_widths_are_t5s_and_the_released_ones():
    assert conditioning.encode(PARAMS, config(transformer=None), IDS).context.shape == (2, 15, 48)
    nothing = conditioning.encode({}, config(clip_l=None, clip_g=None, t5=None, transformer=None), IDS)
    assert nothing.context.shape == (2, 15, 4096) and nothing.pooled.shape == (2, 2048)


def test_zeros_have_the_dtype_of_the_encoders():
    half = conditioning.encode(tree.cast(without("clip_l", "t5"), torch.bfloat16), config(), IDS)
    assert half.context.dtype == half.pooled.dtype == torch.bfloat16


def test_clip_skip_reaches_both_clips_and_leaves_pooled_alone():
    plain, skipped = (conditioning.encode(PARAMS, config(), IDS, clip_skip=skip) for skip in (0, 1))
    assert torch.equal(
        skipped.context[:, :9, :16], clip.apply(PARAMS["clip_l"], CLIP_L, IDS.clip_l, skip=1).penultimate
    )
    assert torch.equal(
        skipped.context[:, :9, 16:36], clip.apply(PARAMS["clip_g"], CLIP_G, IDS.clip_g, skip=1).penultimate
    )
    assert torch.equal(skipped.pooled, plain.pooled)


def test_t5_mask_reaches_t5():
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    masked = conditioning.encode(PARAMS, config(), IDS, t5_mask=mask)
    assert torch.equal(masked.context[:, 9:], t5.apply(PARAMS["t5"], T5, IDS.t5, mask=mask))


def test_encoders_that_do_not_fit_the_transformer_are_refused():
    narrow = SimpleNamespace(context_width=30, pooled_width=40)
    with pytest.raises(ValueError, match="CLIP features together are 36 wide, more than the context's 30"):
        conditioning.encode(without("t5"), config(t5=None, transformer=narrow), IDS)
    with pytest.raises(ValueError, match="T5 is 48 wide, but the transformer reads a context of width 30"):
        conditioning.encode(PARAMS, config(transformer=narrow), IDS)
    with pytest.raises(ValueError, match=r"ids of \[1, 2\] texts"):
        conditioning.encode(PARAMS, config(), IDS._replace(t5=IDS.t5[:1]))


@pytest.fixture(scope="module")
def tokenizers(shared_data):
    folder = shared_data / "tokenizers"
    return SimpleNamespace(
        clip_l=bpe.init(folder / "tokenizer"),
        clip_g=bpe.init(folder / "tokenizer_2"),
        t5=unigram.init(folder / "tokenizer_3" / "tokenizer.json"),
    )


REAL = config(clip_l=clip.CLIP_L, clip_g=clip.CLIP_G, t5=t5.T5_XXL, transformer=None)


def test_ids_are_those_of_each_tokenizer(tokenizers):
    ids = conditioning.tokenize(REAL, tokenizers, ["a cat", "two dogs"], prompts_2="one", prompts_3=["x", ""])
    assert torch.equal(ids.clip_l, bpe.apply(tokenizers.clip_l, ["a cat", "two dogs"], length=77))
    assert torch.equal(ids.clip_g, bpe.apply(tokenizers.clip_g, ["one", "one"], length=77))
    assert torch.equal(ids.t5, unigram.apply(tokenizers.t5, ["x", ""], length=256))


def test_padding_of_the_empty_prompt_is_that_of_sd3(tokenizers):
    ids = conditioning.tokenize(REAL, tokenizers, "", t5_length=77)
    assert ids.clip_l.tolist() == [[49406] + [49407] * 76]
    assert ids.clip_g.tolist() == [[49406, 49407] + [0] * 75]
    assert ids.t5.tolist() == [[1] + [0] * 76]


def test_one_string_is_a_batch_of_one_and_serves_every_encoder(tokenizers):
    alone = conditioning.tokenize(REAL, tokenizers, "a cat", t5_length=12)
    listed = conditioning.tokenize(REAL, tokenizers, ["a cat"], prompts_2=["a cat"], prompts_3="a cat", t5_length=12)
    assert all(torch.equal(*pair) for pair in zip(alone, listed, strict=True))
    assert [tuple(part.shape) for part in alone] == [(1, 77), (1, 77), (1, 12)]


def test_clip_length_is_never_more_than_clip_has_positions(tokenizers):
    short = conditioning.tokenize(config(), tokenizers, "a very long story of many words and more", t5_length=5)
    assert short.clip_l.shape == short.clip_g.shape == (1, 9)
    assert short.clip_l[0, -1] == 49407


def test_absent_tokenizers_leave_zeros(tokenizers):
    partial = SimpleNamespace(clip_l=None, clip_g=tokenizers.clip_g, t5=None)
    ids = conditioning.tokenize(REAL, partial, ["a", "b"], t5_length=8)
    assert not ids.clip_l.any() and ids.clip_l.shape == (2, 77)
    assert ids.clip_g.any()
    assert not ids.t5.any() and ids.t5.shape == (2, 8) and ids.t5.dtype == torch.int64


def test_apply_is_encode_of_tokenize(tokenizers):
    big_l, big_g, big_t5 = (
        clip.Config(length=20, width=16, layers=1, heads=2, mlp_width=24, projection_width=16),
        clip.Config(length=20, width=24, layers=1, heads=2, mlp_width=24, projection_width=24),
        t5.Config(width=48, layers=1, heads=2, head_dim=8, mlp_width=24),
    )
    whole = config(clip_l=big_l, clip_g=big_g, t5=big_t5)
    params = {
        "clip_l": clip.init(prng.key(0), big_l),
        "clip_g": clip.init(prng.key(1), big_g),
        "t5": t5.init(prng.key(2), big_t5),
    }
    prompts = ["a red circle", "a blue star left of a green square"]
    ours = conditioning.apply(params, whole, tokenizers, prompts, prompts_3="x", t5_length=10)
    ids = conditioning.tokenize(whole, tokenizers, prompts, prompts_3="x", t5_length=10)
    by_hand = conditioning.encode(params, whole, ids)
    assert torch.equal(ours.context, by_hand.context) and torch.equal(ours.pooled, by_hand.pooled)
    assert ours.context.shape == (2, 30, 48)
    with pytest.raises(ValueError, match="no tokenizer for t5, whose parameters are given"):
        conditioning.apply(params, whole, SimpleNamespace(**(vars(tokenizers) | {"t5": None})), prompts)


def test_prompts_that_do_not_match_are_refused(tokenizers):
    with pytest.raises(ValueError, match=r"\[2, 2, 3\] prompts for the three encoders"):
        conditioning.tokenize(REAL, tokenizers, ["a", "b"], prompts_3=["a", "b", "c"])
    with pytest.raises(ValueError, match="there are no prompts"):
        conditioning.tokenize(REAL, tokenizers, [])
    with pytest.raises(ValueError, match="t5_length 0 must be at least 1"):
        conditioning.tokenize(REAL, tokenizers, "a", t5_length=0)
    with pytest.raises(ValueError, match="t5_length 1000000000 must be at most 4,096 .*its square in memory"):
        conditioning.tokenize(REAL, tokenizers, "a", t5_length=10**9)
    for module, tables in ((bpe, tokenizers.clip_l), (unigram, tokenizers.t5)):
        with pytest.raises(ValueError, match="length 1000000000 must be at most 1,048,576, as every text is padded"):
            module.apply(tables, ["a"], length=10**9)


def test_ids_of_the_shipped_tokenizers_are_those_of_each():
    folder = shipped.folder()
    own = SimpleNamespace(
        clip_l=bpe.init(folder / "tokenizer"),
        clip_g=bpe.init(folder / "tokenizer_2"),
        t5=unigram.init(folder / "tokenizer_3"),
    )
    prompts = ["a large red circle", "an unknown word, !"]
    ids = conditioning.tokenize(REAL, own, prompts, prompts_3="a star", t5_length=16)
    # CLIP's 77 positions are more than these tokenizers write.
    assert torch.equal(ids.clip_l, bpe.apply(own.clip_l, prompts, length=24))
    assert torch.equal(ids.clip_g, bpe.apply(own.clip_g, prompts, length=24))
    assert torch.equal(ids.t5, unigram.apply(own.t5, ["a star"] * 2, length=16))
    short = config(clip_l=replace(clip.CLIP_L, length=8), clip_g=clip.CLIP_G, t5=t5.T5_XXL, transformer=None)
    assert conditioning.tokenize(short, own, prompts).clip_g.shape == (2, 8)
    absent = SimpleNamespace(clip_l=None, clip_g=own.clip_g, t5=None)
    ids = conditioning.tokenize(REAL, absent, prompts, t5_length=16)
    assert not ids.clip_l.any() and not ids.t5.any() and ids.clip_g.shape == (2, 24)


@pytest.mark.parametrize("prompts", [None, 5, b"a cat", {"a"}, [b"a"], [None]])
def test_prompts_of_another_type_are_named(prompts):
    own = SimpleNamespace(clip_l=bpe.init(shipped.folder() / "tokenizer"), clip_g=None, t5=None)
    with pytest.raises(ValueError, match="prompts are of type|prompt 0 is of type"):
        conditioning.tokenize(REAL, own, prompts)


def test_tokens_that_an_encoder_has_no_embedding_for_are_named_before_it_runs():
    folder = shipped.folder()
    own = SimpleNamespace(
        clip_l=bpe.init(folder / "tokenizer"),
        clip_g=bpe.init(folder / "tokenizer_2"),
        t5=unigram.init(folder / "tokenizer_3"),
    )
    said = "the tokenizer of clip_l gives the token .*, but its encoder has embeddings for .* tokens"
    with pytest.raises(ValueError, match=said):
        conditioning.apply(PARAMS, config(), own, "a red circle", t5_length=16)
    with pytest.raises(ValueError, match=said):
        conditioning.apply_from(PARAMS.__getitem__, config(), own, "a red circle", t5_length=16)
