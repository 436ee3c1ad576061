"""Folders written by diffusers, transformers and this project load in each other bit for bit."""

from dataclasses import replace

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.image import vae
from functional_sd3.layouts.diffusers_folder import COMPONENTS
from functional_sd3.text import bpe, clip, t5, unigram
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Model, Tokenizers
from tests.parity.whole_models import BASE, TRANSFORMERS, config_of, random_model, state_of, write_with_diffusers

FOLDERS = {name: component.folder for name, component in COMPONENTS.items()}


def differences(model: Model, pipeline) -> list[str]:
    """Their tensors that are not ours, by name; T5's second name for its embedding is not counted.

    Their table of positions stays float32 whatever the dtype asked for: its values are compared, not its dtype.
    """
    actual = []
    for name, folder in FOLDERS.items():
        ours, theirs = state_of(model, name), getattr(pipeline, folder).state_dict()
        # Newer transformers leave the wrapper of CLIP out of the names in memory, not in the file.
        shortened = {key.removeprefix("text_model."): value for key, value in ours.items()}
        theirs = {key.removeprefix("text_model."): value for key, value in theirs.items()}
        theirs.pop("encoder.embed_tokens.weight", None)
        actual += [f"{name}: {key}" for key in shortened.keys() ^ theirs.keys()]
        actual += [
            f"{name}: {key}"
            for key in shortened.keys() & theirs.keys()
            if not torch.equal(shortened[key].float(), theirs[key].float())
            or (shortened[key].dtype != theirs[key].dtype and key != "pos_embed.pos_embed")
        ]
    return actual


def from_pretrained(path, **options):
    from diffusers import StableDiffusion3Pipeline

    # Theirs asks to be told of everything that is absent.
    absent = {name: None for name in ("tokenizer", "tokenizer_2", "tokenizer_3") if not (path / name).exists()}
    pipeline = StableDiffusion3Pipeline.from_pretrained(path, **absent, **options)
    for folder in FOLDERS.values():
        getattr(pipeline, folder).eval()
    return pipeline


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_folders_that_diffusers_wrote_load_bit_for_bit(tmp_path, name):
    config = config_of(name)
    pipeline = write_with_diffusers(tmp_path / "model", config)
    model = weights.load(tmp_path / "model")
    assert model.config == config
    assert differences(model, pipeline) == []


def test_shards_of_a_variant_that_diffusers_wrote_load_bit_for_bit(tmp_path):
    pipeline = write_with_diffusers(tmp_path / "model", BASE, variant="fp16", max_shard_size="20KB")
    assert list((tmp_path / "model" / "transformer").glob("*.safetensors.index.*json"))
    assert differences(weights.load(tmp_path / "model", variant="fp16"), pipeline) == []


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_diffusers_loads_our_folders_bit_for_bit(tmp_path, name, shard_bytes):
    model = random_model(config_of(name))
    weights.save(tmp_path / "ours", model, shard_bytes=shard_bytes)
    pipeline = from_pretrained(tmp_path / "ours")
    assert differences(model, pipeline) == []
    assert pipeline.scheduler.config.shift == 2.5
    pipeline.save_pretrained(tmp_path / "theirs")
    again = weights.load(tmp_path / "theirs")
    assert again.config == model.config
    assert tree.diff(again.params, model.params) == []


def test_half_precision_folders_load_in_diffusers_as_they_are(tmp_path):
    model = random_model(config_of("SD3.5-medium"), torch.bfloat16)
    weights.save(tmp_path / "ours", model)
    assert differences(model, from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)) == []


@torch.no_grad()
def test_loaded_parameters_compute_the_same_as_the_pipelines_modules(tmp_path):
    config = config_of("SD3.5-medium")
    weights.save(tmp_path / "model", random_model(config))
    pipeline, model = from_pretrained(tmp_path / "model"), weights.load(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 49, (2, 9), generator=generator)
    shapes = ((2, 16, 8, 8), (2, 5, 48), (2, 40), (1, 3, 16, 16))
    latents, context, pooled, images = (torch.randn(shape, generator=generator) for shape in shapes)
    t = torch.tensor([0.3, 0.9])

    def close(ours, theirs):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()

    for name in ("clip_l", "clip_g"):
        ours = clip.apply(model.params[name], getattr(config, name), ids)
        close(ours.projected, getattr(pipeline, FOLDERS[name])(ids).text_embeds)
    close(t5.apply(model.params["t5"], config.t5, ids), pipeline.text_encoder_3(ids)[0])
    close(
        mmdit.apply(model.params["transformer"], config.transformer, latents, t, context, pooled),
        pipeline.transformer(latents, context, pooled, 1000 * t).sample,
    )
    encoded = pipeline.vae.encode(images).latent_dist
    close(vae.encode(model.params["vae"], config.vae, images).mean, encoded.mean)
    close(vae.decode(model.params["vae"], config.vae, encoded.mean), pipeline.vae.decode(encoded.mean).sample)


def test_their_tokenizers_read_ours_and_the_reverse(tmp_path, tokenizer_files):
    source = tokenizer_files
    tokenizers = Tokenizers(
        bpe.init(source / "tokenizer"), bpe.init(source / "tokenizer_2"), unigram.init(source / "tokenizer_3")
    )
    # As many embeddings as the tokenizers have ids, or a load refuses them.
    sizes = {"clip_l": 49408, "clip_g": 49408, "t5": 32128}
    config = replace(BASE, **{name: replace(getattr(BASE, name), vocab=size) for name, size in sizes.items()})
    weights.save(tmp_path / "ours", random_model(config)._replace(tokenizers=tokenizers))
    pipeline = from_pretrained(tmp_path / "ours")
    pipeline.save_pretrained(tmp_path / "theirs")
    again = weights.load(tmp_path / "theirs").tokenizers
    texts = ["A photograph of an astronaut riding a horse, 4k!", "naïve café ﬁ 🎈", ""]
    for name, module, length, theirs in (
        ("clip_l", bpe, 77, pipeline.tokenizer),
        ("clip_g", bpe, 77, pipeline.tokenizer_2),
        ("t5", unigram, 64, pipeline.tokenizer_3),
    ):
        ids = theirs(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        assert torch.equal(module.apply(getattr(tokenizers, name), texts, length=length), ids)
        assert torch.equal(module.apply(getattr(again, name), texts, length=length), ids)
