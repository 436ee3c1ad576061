"""Folders against diffusers and transformers: what they write we load, what we write they load, bit for bit."""

from dataclasses import replace

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.flow import schedule
from functional_sd3.image import vae
from functional_sd3.layouts import rules
from functional_sd3.layouts.diffusers_folder import COMPONENTS
from functional_sd3.text import bpe, clip, t5, unigram
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config, Model, Tokenizers

BASE = Config(
    clip_l=clip.Config(vocab=60, length=20, width=16, layers=2, heads=2, mlp_width=24, projection_width=16),
    clip_g=clip.Config(vocab=60, length=20, width=24, layers=3, heads=2, mlp_width=40, activation="gelu", eos_id=59),
    t5=t5.Config(vocab=50, width=48, layers=2, heads=2, head_dim=4, mlp_width=12),
    transformer=mmdit.Config(
        depth=3, heads=2, head_dim=8, context_width=48, pooled_width=40, position_size=6, sample_size=8
    ),
    vae=vae.Config(channels=(4, 8, 8), groups=2, sample_size=32),
    schedule=schedule.Config(shift=2.5),
)
TRANSFORMERS = {
    "SD3": {},
    "SD3.5-medium": {"qk_norm": True, "dual_attention_layers": (0, 1), "position_size": 12},
    "SD3.5-large": {"qk_norm": True},
}
FOLDERS = {name: component.folder for name, component in COMPONENTS.items()}


def config_of(name: str) -> Config:
    return replace(BASE, transformer=replace(BASE.transformer, **TRANSFORMERS[name]))


def random_model(config: Config, dtype: torch.dtype = torch.float32) -> Model:
    generator = torch.Generator().manual_seed(5)
    leaf = lambda path, param: torch.randn(param.shape, generator=generator).to(dtype) / 4  # noqa: E731
    return Model(config, specs.map_params(leaf, weights.spec(config)))


def state_of(model: Model, name: str) -> dict[str, torch.Tensor]:
    described = weights.SPECS[name](getattr(model.config, name))
    return rules.to_theirs(COMPONENTS[name].layout, described, tree.flatten_paths(model.params[name]))


def differences(model: Model, pipeline) -> list[str]:
    """Their tensors that are not ours, by name; T5's second name for its embedding is not counted.

    Their table of positions stays float32 whatever the dtype asked for: its values are compared, not its dtype.
    """
    found = []
    for name, folder in FOLDERS.items():
        ours, theirs = state_of(model, name), getattr(pipeline, folder).state_dict()
        # Newer transformers leave the wrapper of CLIP out of the names in memory, not in the file.
        shortened = {key.removeprefix("text_model."): value for key, value in ours.items()}
        theirs = {key.removeprefix("text_model."): value for key, value in theirs.items()}
        theirs.pop("encoder.embed_tokens.weight", None)
        found += [f"{name}: {key}" for key in shortened.keys() ^ theirs.keys()]
        found += [
            f"{name}: {key}"
            for key in shortened.keys() & theirs.keys()
            if not torch.equal(shortened[key].float(), theirs[key].float())
            or (shortened[key].dtype != theirs[key].dtype and key != "pos_embed.pos_embed")
        ]
    return found


def from_pretrained(path, **options):
    from diffusers import StableDiffusion3Pipeline

    # Theirs asks to be told of everything that is absent.
    absent = {name: None for name in ("tokenizer", "tokenizer_2", "tokenizer_3") if not (path / name).exists()}
    pipeline = StableDiffusion3Pipeline.from_pretrained(path, **absent, **options)
    for folder in FOLDERS.values():
        getattr(pipeline, folder).eval()
    return pipeline


def write_with_diffusers(path, config: Config, **options):
    """A pipeline with random weights, made of their own classes and saved by them."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    def clip_model(ours: clip.Config):
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=ours.vocab,
                hidden_size=ours.width,
                intermediate_size=ours.mlp_width,
                projection_dim=ours.projection_width,
                num_hidden_layers=ours.layers,
                num_attention_heads=ours.heads,
                max_position_embeddings=ours.length,
                hidden_act=ours.activation,
                bos_token_id=0,
                eos_token_id=ours.eos_id,
            )
        )

    network = config.transformer
    torch.manual_seed(3)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=network.sample_size,
            num_layers=network.depth,
            attention_head_dim=network.head_dim,
            num_attention_heads=network.heads,
            joint_attention_dim=network.context_width,
            caption_projection_dim=network.width,
            pooled_projection_dim=network.pooled_width,
            pos_embed_max_size=network.position_size,
            dual_attention_layers=network.dual_attention_layers,
            qk_norm="rms_norm" if network.qk_norm else None,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.schedule.shift),
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * len(config.vae.channels),
            up_block_types=["UpDecoderBlock2D"] * len(config.vae.channels),
            block_out_channels=config.vae.channels,
            layers_per_block=config.vae.blocks_per_level,
            latent_channels=16,
            norm_num_groups=config.vae.groups,
            sample_size=config.vae.sample_size,
            scaling_factor=config.vae.scaling,
            shift_factor=config.vae.shift,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip_model(config.clip_l),
        text_encoder_2=clip_model(config.clip_g),
        text_encoder_3=T5EncoderModel(
            T5Config(
                vocab_size=config.t5.vocab,
                d_model=config.t5.width,
                d_kv=config.t5.head_dim,
                d_ff=config.t5.mlp_width,
                num_layers=config.t5.layers,
                num_heads=config.t5.heads,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(path, **options)
    return pipeline


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_diffusers_writes_loads_bit_for_bit(tmp_path, name):
    config = config_of(name)
    pipeline = write_with_diffusers(tmp_path / "model", config)
    model = weights.load(tmp_path / "model")
    assert model.config == config
    assert differences(model, pipeline) == []


def test_what_diffusers_writes_in_shards_of_a_variant_loads_bit_for_bit(tmp_path):
    pipeline = write_with_diffusers(tmp_path / "model", BASE, variant="fp16", max_shard_size="20KB")
    assert list((tmp_path / "model" / "transformer").glob("*.safetensors.index.*json"))
    assert differences(weights.load(tmp_path / "model", variant="fp16"), pipeline) == []


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_what_we_write_diffusers_loads_bit_for_bit(tmp_path, name, shard_bytes):
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
def test_loaded_parameters_compute_what_the_pipelines_own_modules_compute(tmp_path):
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
