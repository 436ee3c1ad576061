"""Tokenizers and text encoders."""

from dataclasses import replace

import pytest
import torch

from bench import openvino_peer, peers
from functional_sd3.core import prng
from functional_sd3.recipes import shapes
from functional_sd3.text import bpe, clip, t5, unigram
from functional_sd3.weights import shipped

TOKENIZERS = shipped.folder()


@pytest.fixture(scope="module")
def captions():
    return [shapes.caption(scene, index) for index, scene in enumerate(shapes.scenes(prng.key(0), 1000))]


def test_clip_tokenizer(versus, captions):
    from transformers import CLIPTokenizer

    tables = bpe.init(TOKENIZERS / "tokenizer")
    theirs = CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer")
    versus(
        "CLIP tokenizer of params/tiny, 1,000 captions one by one",
        lambda: [bpe.apply(tables, [text], length=None)[0] for text in captions],
        lambda: [theirs._tokenizer.encode(text).ids for text in captions],
        peer="tokenizers (Rust)",
        tolerance=None,
    )


def test_t5_tokenizer(versus, captions):
    from tokenizers import Tokenizer

    tables = unigram.init(TOKENIZERS / "tokenizer_3" / "tokenizer.json")
    theirs = Tokenizer.from_file(str(TOKENIZERS / "tokenizer_3" / "tokenizer.json"))
    versus(
        "T5 tokenizer of params/tiny, 1,000 captions one by one",
        lambda: [unigram.apply(tables, [text], length=None)[0] for text in captions],
        lambda: [theirs.encode(text).ids for text in captions],
        peer="tokenizers (Rust)",
        tolerance=None,
    )


@pytest.mark.parametrize(
    ("name", "config"),
    [("CLIP-L forward, true size", clip.CLIP_L), ("CLIP-G forward, 6 layers", replace(clip.CLIP_G, layers=6))],
    ids=["L", "G"],
)
def test_clip(versus, name, config):
    pair = peers.clip_encoder(config)
    ids = prng.randint(prng.key(0), (2, 77), 0, config.vocab)
    versus(
        f"{name}, 77 tokens, batch 2",
        lambda: clip.apply(pair.params, pair.config, ids).last,
        lambda: pair.module(ids).last_hidden_state,
        peer="transformers",
        rounds=11,
        memory=True,
        least=True,
        beside=openvino_peer.beside(
            lambda ids: pair.module(ids).last_hidden_state, (ids,), pair.module, dtype=torch.float32
        ),
    )


def test_t5(versus):
    pair = peers.t5_encoder(t5.Config(vocab=1000, width=1024, layers=4, heads=16, mlp_width=2560))
    ids = prng.randint(prng.key(0), (2, 256), 0, 1000)
    versus(
        "T5 forward, width 1024, 4 layers, 256 tokens, batch 2",
        lambda: t5.apply(pair.params, pair.config, ids),
        lambda: pair.module(ids).last_hidden_state,
        peer="transformers",
        rounds=11,
        memory=True,
        least=True,
        beside=openvino_peer.beside(
            lambda ids: pair.module(ids).last_hidden_state, (ids,), pair.module, dtype=torch.float32
        ),
    )
