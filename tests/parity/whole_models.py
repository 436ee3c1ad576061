"""Small whole models, ours and diffusers'."""

from dataclasses import replace

import torch

from bench import peers
from functional_sd3 import weights
from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.flow import schedule
from functional_sd3.image import vae
from functional_sd3.layouts import rules
from functional_sd3.layouts.diffusers_folder import COMPONENTS
from functional_sd3.text import clip, t5
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config, Model

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


def config_of(name: str) -> Config:
    return replace(BASE, transformer=replace(BASE.transformer, **TRANSFORMERS[name]))


def random_model(config: Config, dtype: torch.dtype = torch.float32) -> Model:
    generator = torch.Generator().manual_seed(5)
    leaf = lambda path, param: torch.randn(param.shape, generator=generator).to(dtype) / 4  # noqa: E731
    return Model(specs.map_params(leaf, weights.spec(config)), config)


def state_of(model: Model, name: str) -> dict[str, torch.Tensor]:
    described = weights.SPECS[name](getattr(model.config, name))
    return rules.to_theirs(COMPONENTS[name].layout, described, tree.flatten_paths(model.params[name]))


def write_with_diffusers(path, config: Config, **options):
    """A pipeline with random weights, made of their own classes and saved by them."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    torch.manual_seed(3)
    pipeline = StableDiffusion3Pipeline(
        transformer=peers.transformer_module(config.transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.schedule.shift),
        vae=peers.autoencoder_module(config.vae),
        text_encoder=peers.clip_module(config.clip_l),
        text_encoder_2=peers.clip_module(config.clip_g),
        text_encoder_3=peers.t5_module(config.t5),
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(path, **options)
    return pipeline
