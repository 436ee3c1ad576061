"""The libraries' modules of our configs, and with their random weights as our trees: what the benchmark is run against
and the parity tests compare with.

`*_module` builds a module of diffusers or transformers; `transformer`, `autoencoder`, `t5_encoder` and `clip_encoder`
give it matrices of unit gain, and the same parameters as our tree.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.types import Params
from functional_sd3.image import vae
from functional_sd3.layouts import diffusers_keys, rules
from functional_sd3.text import clip, t5
from functional_sd3.transformer import controlnet, mmdit


class Pair(NamedTuple):
    """A library's module, and the config and parameters of ours that do the same."""

    module: torch.nn.Module
    config: Any
    params: Params


def transformer(config: mmdit.Config, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Pair:
    """diffusers' SD3Transformer2DModel."""
    with torch.device(device):
        module = transformer_module(config)
    module = randomized(module).to(dtype)
    return Pair(module, config, parameters_of(module, diffusers_keys.TRANSFORMER, mmdit.spec(config)))


def autoencoder(
    config: vae.Config = vae.SD3_VAE, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Pair:
    """diffusers' AutoencoderKL."""
    with torch.device(device):
        module = autoencoder_module(config)
    module = randomized(module).to(dtype)
    return Pair(module, config, parameters_of(module, diffusers_keys.VAE, vae.spec(config)))


def t5_encoder(config: t5.Config) -> Pair:
    """transformers' T5EncoderModel."""
    module = randomized(t5_module(config))
    return Pair(module, config, parameters_of(module, diffusers_keys.T5, t5.spec(config)))


def clip_encoder(config: clip.Config = clip.CLIP_L) -> Pair:
    """transformers' CLIPTextModelWithProjection."""
    module = randomized(clip_module(config))
    return Pair(module, config, parameters_of(module, diffusers_keys.CLIP, clip.spec(config)))


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """The module with matrices of unit gain, so that nothing vanishes or overflows, and biases of PyTorch's size, each
    the same in every process; norms stay as they are."""
    device = next(module.parameters()).device
    matrices, biases = (torch.Generator(device).manual_seed(seed) for seed in (0, 1))
    matrix_of_bias = {
        layer.bias: layer.weight for layer in module.modules() if isinstance(getattr(layer, "bias", None), Tensor)
    }
    with torch.no_grad():
        for parameter in module.parameters():
            matrix = matrix_of_bias.get(parameter, parameter)
            if matrix.ndim < 2:
                continue
            fan_in = matrix[0].numel()
            if matrix is parameter:
                drawn = torch.randn(parameter.shape, generator=matrices, device=device) * 0.7
            else:
                drawn = 2 * torch.rand(parameter.shape, generator=biases, device=device) - 1
            parameter.copy_(drawn / fan_in**0.5)
    return module.eval()


def parameters_of(module: torch.nn.Module, keys: rules.Layout, spec: Any) -> Params:
    """The parameters of a library's module as our tree."""
    theirs = {name: value.detach() for name, value in module.state_dict().items()}
    theirs = {meant: theirs[name] for name, meant in rules.canonical(keys, theirs).items()}
    return rules.to_ours(keys, spec, lambda source, _: source.transform.join([theirs[name] for name in source.names]))


def transformer_module(config: mmdit.Config) -> torch.nn.Module:
    """diffusers' SD3Transformer2DModel of these sizes."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(**_network(config), out_channels=config.out_channels).eval()


def controlnet_module(config: controlnet.Config) -> torch.nn.Module:
    """diffusers' SD3ControlNetModel of these sizes."""
    from diffusers import SD3ControlNetModel

    return SD3ControlNetModel(
        **_network(config),
        out_channels=config.in_channels,
        extra_conditioning_channels=config.extra_channels,
        pos_embed_type=None if config.position_size is None else "sincos",
        use_pos_embed=config.has_patch_embedding,
        force_zeros_for_pooled_projection=config.zero_pooled,
    ).eval()


def _network(config: mmdit.Config | controlnet.Config) -> dict[str, Any]:
    """The sizes that a transformer and its ControlNets share."""
    return {
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_width,
        "pos_embed_max_size": config.position_size,
        "dual_attention_layers": config.dual_attention_layers,
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def autoencoder_module(config: vae.Config) -> torch.nn.Module:
    """diffusers' AutoencoderKL of these sizes."""
    from diffusers import AutoencoderKL

    levels = len(config.channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=list(config.channels),
        layers_per_block=config.blocks_per_level,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        sample_size=config.sample_size,
        scaling_factor=config.scaling,
        shift_factor=config.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def t5_module(config: t5.Config) -> torch.nn.Module:
    """transformers' T5EncoderModel of these sizes."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=config.vocab,
            d_model=config.width,
            d_kv=config.head_dim,
            d_ff=config.mlp_width,
            num_layers=config.layers,
            num_heads=config.heads,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.eps,
        )
    ).eval()


def clip_module(config: clip.Config) -> torch.nn.Module:
    """transformers' CLIPTextModelWithProjection of these sizes."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=config.vocab,
            max_position_embeddings=config.length,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            projection_dim=config.projection_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_act=config.activation,
            layer_norm_eps=config.eps,
            bos_token_id=0,
            eos_token_id=config.eos_id,
        )
    ).eval()
