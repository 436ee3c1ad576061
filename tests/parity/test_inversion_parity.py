"""Added words against transformers: ids of texts that contain them, and the encoders' outputs."""

import pytest
import torch

from functional_sd3.layouts import rules
from functional_sd3.layouts.diffusers_keys import CLIP
from functional_sd3.text import bpe, clip, t5, textual_inversion, unigram
from functional_sd3.weights import Config, Tokenizers

transformers = pytest.importorskip("transformers")

TEXTS = [
    "a photo of <cat-toy> on a beach",
    "<cat-toy>",
    "(<cat-toy>)s and dogs,<cat-toy><cat-toy> end",
    "a <Cat-Toy> IN CAPITALS",
    "no word of ours < cat-toy >",
]
COUNT = 3
WIDTHS = {"clip_l": 16, "clip_g": 24, "t5": 32}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "tokenizers"


@pytest.fixture(scope="module")
def learned(folder):
    """Ours with the word, on small encoders with real vocabularies; the vectors; the params before."""
    config = Config(
        clip_l=clip.Config(width=16, layers=2, heads=2, mlp_width=24, projection_width=16),
        t5=t5.Config(width=32, layers=1, heads=2, head_dim=8, mlp_width=24),
    )
    tokenizers = Tokenizers(clip_l=bpe.init(folder / "tokenizer"), t5=unigram.init(folder / "tokenizer_3"))
    from functional_sd3.core import prng

    params = {"clip_l": clip.init(prng.key(0), config.clip_l), "t5": t5.init(prng.key(1), config.t5)}
    vectors = {name: random(index, COUNT, WIDTHS[name]) for index, name in enumerate(params)}
    word = textual_inversion.Word("<cat-toy>", vectors)
    return textual_inversion.add(params, config, tokenizers, word), vectors, params, config


def their_texts():
    """As diffusers writes a word of several vectors before it tokenises: "<cat> <cat>_1 <cat>_2"."""
    spelled = " ".join(textual_inversion.names("<cat-toy>", COUNT))
    return [text.replace("<cat-toy>", spelled).replace("<Cat-Toy>", spelled) for text in TEXTS]


def test_clip_ids_equal_transformers(folder, learned):
    theirs = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    theirs.add_tokens(textual_inversion.names("<cat-toy>", COUNT))
    tables = learned[0].tokenizers.clip_l
    assert bpe.apply(tables, TEXTS, length=None) == theirs(their_texts()).input_ids
    assert bpe.apply(tables, ["<cat-toy>"], length=None) == [[49406, 49408, 49409, 49410, 49407]]


def test_t5_ids_equal_transformers(folder, learned):
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer_3", local_files_only=True)
    theirs.add_tokens(textual_inversion.names("<cat-toy>", COUNT))
    tables = learned[0].tokenizers.t5
    assert unigram.apply(tables, TEXTS[:3], length=None, mode="transformers") == theirs(their_texts()[:3]).input_ids
    assert unigram.apply(tables, "<cat-toy>", length=None) == [[32100, 32101, 32102, 1]]


def test_the_encoders_equal_transformers_with_resized_embeddings(folder, learned):
    ours, vectors, params, config = learned
    sizes = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, eos_token_id=49407,
    )  # fmt: skip
    theirs = transformers.CLIPTextModelWithProjection(sizes).eval()
    from functional_sd3.core import tree

    state = rules.to_theirs(CLIP, clip.spec(config.clip_l), tree.flatten_paths(params["clip_l"]))
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    theirs.resize_token_embeddings(49408 + COUNT, mean_resizing=False)
    with torch.no_grad():
        theirs.get_input_embeddings().weight[49408:] = vectors["clip_l"]
        ids = bpe.apply(ours.tokenizers.clip_l, TEXTS, length=30)
        expected = theirs(ids, output_hidden_states=True)
    output = clip.apply(ours.params["clip_l"], ours.config.clip_l, ids)
    torch.testing.assert_close(output.penultimate, expected.hidden_states[-2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.projected, expected.text_embeds, atol=1e-5, rtol=1e-5)


def test_t5_embeds_the_vectors_where_its_spare_rows_are(learned):
    ours, vectors, params, config = learned
    weight = ours.params["t5"]["embedding"]["weight"]
    assert weight.shape == params["t5"]["embedding"]["weight"].shape == (32128, 32)
    assert torch.equal(weight[32100:32103], vectors["t5"])
    assert ours.config.t5 == config.t5
