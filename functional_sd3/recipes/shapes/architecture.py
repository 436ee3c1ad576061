"""Tokenizers of `params/tiny`, trained on the captions of `world`, and the sizes of its components."""

from dataclasses import replace

from functional_sd3.core.types import Key
from functional_sd3.flow import schedule
from functional_sd3.image import vae
from functional_sd3.layouts.components import Config
from functional_sd3.recipes.shapes import world
from functional_sd3.text import bpe, clip, t5, unigram
from functional_sd3.transformer import mmdit
from functional_sd3.weights.model import Tokenizers

LENGTH = 24
"""Tokens of each text encoder: the longest caption has 19."""
CONTEXT_WIDTH = 192


def tokenizers(key: Key) -> Tokenizers:
    """Two byte-pair tokenizers that differ in their padding, as SD3's do, and a unigram one."""
    scenes = world.scenes(key, 4096)
    captions = [world.caption(scene, wording) for wording, scene in enumerate(scenes)]
    vocab, merges = bpe.train(captions, 1024)
    # Every printable ASCII character gets a piece, so that no prompt typed in English is unknown.
    characters = " ".join(map(chr, range(33, 127)))
    pieces = unigram.train([*captions, characters], 192, charsmap=unigram.plain_charsmap())
    return Tokenizers(
        clip_l=bpe.init((vocab, merges), model_max_length=LENGTH),
        clip_g=bpe.init((vocab, merges), model_max_length=LENGTH, pad_token="!"),
        t5=unigram.from_pieces(pieces, charsmap=unigram.plain_charsmap(), model_max_length=LENGTH),
    )


def config(tables: Tokenizers) -> Config:
    """Sizes of the model; the autoencoder's scaling and shift are measured after its training."""
    encoder = clip.Config(
        vocab=len(tables.clip_l.vocab),
        length=LENGTH,
        width=96,
        layers=3,
        heads=3,
        mlp_width=384,
        projection_width=96,
        eos_id=tables.clip_l.eos_id,
    )
    return Config(
        clip_l=encoder,
        clip_g=replace(encoder, activation="gelu"),
        t5=t5.Config(vocab=len(tables.t5.pieces), width=CONTEXT_WIDTH, layers=2, heads=6, head_dim=32, mlp_width=384),
        transformer=mmdit.Config(
            depth=5,
            heads=5,
            head_dim=32,
            patch_size=1,
            context_width=CONTEXT_WIDTH,
            pooled_width=2 * 96,
            position_size=8,
            sample_size=8,
            qk_norm=True,
            dual_attention_layers=(0,),
        ),
        # A flat colour is the mean over a group, which group norm removes: with one group only one mean is lost.
        vae=vae.Config(
            channels=(16, 32, 64, 64), blocks_per_level=1, groups=1, scaling=1.0, shift=0.0, sample_size=world.SIDE
        ),
        schedule=schedule.Config(shift=1.0),
    )
