"""The other side of the rows: modules of diffusers and transformers, and the same random weights as our trees."""

from typing import Any, NamedTuple

import torch

from functional_sd3.core.types import Params
from functional_sd3.image import vae
from functional_sd3.layouts import diffusers_keys, rules
from functional_sd3.text import clip, t5
from functional_sd3.transformer import mmdit


class Pair(NamedTuple):
    """A library's module, and the config and parameters of ours that do the same."""

    module: torch.nn.Module
    config: Any
    params: Params


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """The module with matrices of unit gain, so that nothing vanishes or overflows; norms stay as they are."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                drawn = torch.randn(parameter.shape, generator=generator, device=device)
                parameter.copy_(drawn * 0.7 / fan_in**0.5)
    return module.eval()


def parameters_of(module: torch.nn.Module, keys: rules.Layout, spec: Any) -> Params:
    """The parameters of a library's module as our tree."""
    theirs = {name: value.detach() for name, value in module.state_dict().items()}
    theirs = {meant: theirs[name] for name, meant in rules.canonical(keys, theirs).items()}
    return rules.to_ours(keys, spec, lambda source, _: source.transform.join([theirs[name] for name in source.names]))


def transformer(config: mmdit.Config, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Pair:
    """diffusers' SD3Transformer2DModel."""
    from diffusers import SD3Transformer2DModel

    with torch.device(device):
        module = SD3Transformer2DModel(
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            num_layers=config.depth,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.heads,
            joint_attention_dim=config.context_width,
            caption_projection_dim=config.width,
            pooled_projection_dim=config.pooled_width,
            out_channels=config.out_channels,
            pos_embed_max_size=config.position_size,
            dual_attention_layers=config.dual_attention_layers,
            qk_norm="rms_norm" if config.qk_norm else None,
        )
    module = randomized(module).to(dtype)
    return Pair(module, config, parameters_of(module, diffusers_keys.TRANSFORMER, mmdit.spec(config)))


def autoencoder(
    config: vae.Config = vae.SD3_VAE, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Pair:
    """diffusers' AutoencoderKL."""
    from diffusers import AutoencoderKL

    levels = len(config.channels)
    with torch.device(device):
        module = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.channels,
            layers_per_block=config.blocks_per_level,
            latent_channels=config.latent_channels,
            norm_num_groups=config.groups,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    module = randomized(module).to(dtype)
    return Pair(module, config, parameters_of(module, diffusers_keys.VAE, vae.spec(config)))


def t5_encoder(config: t5.Config) -> Pair:
    """transformers' T5EncoderModel."""
    from transformers import T5Config, T5EncoderModel

    module = T5EncoderModel(
        T5Config(
            vocab_size=config.vocab,
            d_model=config.width,
            d_kv=config.head_dim,
            d_ff=config.mlp_width,
            num_layers=config.layers,
            num_heads=config.heads,
            feed_forward_proj="gated-gelu",
            dense_act_fn="gelu_new",
        )
    )
    module = randomized(module)
    return Pair(module, config, parameters_of(module, diffusers_keys.T5, t5.spec(config)))


def clip_encoder(config: clip.Config = clip.CLIP_L) -> Pair:
    """transformers' CLIPTextModelWithProjection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    module = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            projection_dim=config.projection_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_act=config.activation,
        )
    )
    module = randomized(module)
    return Pair(module, config, parameters_of(module, diffusers_keys.CLIP, clip.spec(config)))
