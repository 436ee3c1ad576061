"""The fields of diffusers' and transformers' config files, as tables of `config_fields`.

A field that a file lacks has the default of the class that owns the file (diffusers 0.42, transformers 5.23).
"""

from collections.abc import Callable, Iterable

from functional_sd3.flow import distilled, schedule
from functional_sd3.image import taesd, vae
from functional_sd3.layouts.config_fields import (
    MAX_LAYERS,
    MAX_SIZE,
    Field,
    Fixed,
    Table,
    any_number,
    choice,
    flag,
    layers,
    number,
    optional,
    several,
    size,
    whole,
)
from functional_sd3.text import clip, t5
from functional_sd3.text.clip import image as clip_image
from functional_sd3.transformer import mmdit


def unsound_transformer(config: mmdit.Config) -> Iterable[str]:
    """Sentences about fields of a transformer's config that contradict one another."""
    if any(layer >= config.depth for layer in config.dual_attention_layers):
        yield f"dual_attention_layers {list(config.dual_attention_layers)} must all be below num_layers {config.depth}"
    if config.width % 4:
        yield f"width {config.width} (heads times head dim) must be a multiple of 4"
    if config.sample_size < config.patch_size:
        yield f"sample_size {config.sample_size} must be at least patch_size {config.patch_size}"


TRANSFORMER = Table(
    mmdit.Config,
    (
        Field("sample_size", "sample_size", size, 128),
        Field("patch_size", "patch_size", size, 2),
        Field("in_channels", "in_channels", size, 16),
        Field("num_layers", "depth", layers, 18),
        Field("attention_head_dim", "head_dim", size, 64),
        Field("num_attention_heads", "heads", size, 18),
        Field("joint_attention_dim", "context_width", size, 4096),
        Field("pooled_projection_dim", "pooled_width", size, 2048),
        Field("out_channels", "out_channels", size, 16),
        Field("pos_embed_max_size", "position_size", size, 96),
        Field("dual_attention_layers", "dual_attention_layers", several(whole(0, MAX_LAYERS), 0, MAX_LAYERS), ()),
        Field(
            "qk_norm",
            "qk_norm",
            lambda value: choice(None, "rms_norm")(value) is not None,
            None,
            lambda value: "rms_norm" if value else None,
        ),
        Field("interval_size", "interval_size", whole(0, MAX_SIZE), 0, optional=True),
    ),
    (Fixed("caption_projection_dim", lambda config: config.width, 1152),),
    unsound=unsound_transformer,
)


def _unsound_vae(config: vae.Config) -> Iterable[str]:
    if any(channels % config.groups for channels in config.channels):
        yield f"block_out_channels {list(config.channels)} must be multiples of norm_num_groups {config.groups}"


VAE = Table(
    vae.Config,
    (
        Field("block_out_channels", "channels", several(size, 1, 16), (64,)),
        Field("layers_per_block", "blocks_per_level", layers, 1),
        Field("latent_channels", "latent_channels", size, 4),
        Field("norm_num_groups", "groups", size, 32),
        Field("sample_size", "sample_size", size, 32),
        Field("scaling_factor", "scaling", number(), 0.18215),
        Field("shift_factor", "shift", lambda value: any_number(0 if value is None else value), None),
    ),
    (
        Fixed("in_channels", lambda config: 3, 3),
        Fixed("out_channels", lambda config: 3, 3),
        Fixed("act_fn", lambda config: "silu", "silu"),
        Fixed("down_block_types", lambda config: ["DownEncoderBlock2D"] * len(config.channels), ["DownEncoderBlock2D"]),
        Fixed("up_block_types", lambda config: ["UpDecoderBlock2D"] * len(config.channels), ["UpDecoderBlock2D"]),
        Fixed("mid_block_add_attention", lambda config: True, True),
        Fixed("use_quant_conv", lambda config: False, True),
        Fixed("use_post_quant_conv", lambda config: False, True),
        Fixed("latents_mean", lambda config: None),
        Fixed("latents_std", lambda config: None),
        Fixed("force_upcast", lambda config: True, checked=False),
    ),
    unsound=_unsound_vae,
)

# TAESD has 3 at 4 levels. Each has a rule of its own, and rules are compared with every leaf.
_blocks = several(whole(0, 32), 1, 8)


def _same_blocks(ours: str) -> Callable[[taesd.Config], list[int]]:
    return lambda config: [config.width] * len(getattr(config, ours))


TAESD = Table(
    taesd.Config,
    (
        Field("decoder_block_out_channels", "width", lambda value: several(size, 1, 16)(value)[0], (64,)),
        Field("latent_channels", "latent_channels", size, 4),
        Field("num_encoder_blocks", "encoder_blocks", _blocks, (1, 3, 3, 3)),
        Field("num_decoder_blocks", "decoder_blocks", _blocks, (3, 3, 3, 1)),
    ),
    (
        Fixed("encoder_block_out_channels", _same_blocks("encoder_blocks"), [64] * 4),
        Fixed("decoder_block_out_channels", _same_blocks("decoder_blocks"), [64] * 4),
        Fixed("block_out_channels", _same_blocks("decoder_blocks"), checked=False),
        Fixed("in_channels", lambda config: 3, 3),
        Fixed("out_channels", lambda config: 3, 3),
        Fixed("act_fn", lambda config: "relu", "relu"),
        Fixed("upsample_fn", lambda config: "nearest", "nearest"),
        Fixed("upsampling_scaling_factor", lambda config: 2, 2),
        # SD3's latents as the transformer sees them.
        Fixed("scaling_factor", lambda config: 1.0, 1.0),
        Fixed("shift_factor", lambda config: 0.0, 0.0),
        Fixed("latent_magnitude", lambda config: 3, 3, checked=False),
        Fixed("latent_shift", lambda config: 0.5, 0.5, checked=False),
        Fixed("force_upcast", lambda config: False, checked=False),
    ),
)


def _clip_tower(width: int, heads: int) -> tuple[Field, ...]:
    """The fields that CLIP's text and image encoders share, with their defaults."""
    return (
        Field("hidden_size", "width", size, width),
        Field("num_hidden_layers", "layers", layers, 12),
        Field("num_attention_heads", "heads", size, heads),
        Field("intermediate_size", "mlp_width", size, 4 * width),
        Field("hidden_act", "activation", choice(*clip.ACTIVATIONS), "quick_gelu"),
        Field("projection_dim", "projection_width", size, 512),
        Field("layer_norm_eps", "eps", number(), 1e-5),
    )


CLIP = Table(
    clip.Config,
    (
        Field("vocab_size", "vocab", size, 49408),
        Field("max_position_embeddings", "length", size, 77),
        *_clip_tower(512, 8),
        Field("eos_token_id", "eos_id", whole(0, MAX_SIZE), 49407),
    ),
    (
        Fixed("model_type", lambda config: "clip_text_model", "clip_text_model"),
        Fixed("architectures", lambda config: ["CLIPTextModelWithProjection"], checked=False),
        Fixed("quantization_config", lambda config: None, written=False),
        Fixed("bos_token_id", lambda config: 0, checked=False),
        Fixed("pad_token_id", lambda config: 1, checked=False),
        Fixed("attention_dropout", lambda config: 0.0, checked=False),
    ),
    closed=False,
)

CLIP_IMAGE = Table(
    clip_image.Config,
    (
        Field("image_size", "size", size, 224),
        Field("patch_size", "patch", size, 32),
        *_clip_tower(768, 12),
    ),
    (
        Fixed("model_type", lambda config: "clip_vision_model", "clip_vision_model"),
        Fixed("num_channels", lambda config: 3, 3),
    ),
    closed=False,
)

T5 = Table(
    t5.Config,
    (
        Field("vocab_size", "vocab", size, 32128),
        Field("d_model", "width", size, 512),
        Field("num_layers", "layers", layers, 6),
        Field("num_heads", "heads", size, 8),
        Field("d_kv", "head_dim", size, 64),
        Field("d_ff", "mlp_width", size, 2048),
        Field("relative_attention_num_buckets", "buckets", size, 32),
        Field("relative_attention_max_distance", "max_distance", size, 128),
        Field("layer_norm_epsilon", "eps", number(), 1e-6),
    ),
    (
        Fixed("model_type", lambda config: "t5", "t5"),
        Fixed("architectures", lambda config: ["T5EncoderModel"], checked=False),
        Fixed("quantization_config", lambda config: None, written=False),
        Fixed("feed_forward_proj", lambda config: "gated-gelu", "relu"),
        Fixed("num_decoder_layers", lambda config: config.layers, checked=False),
        Fixed("dropout_rate", lambda config: 0.1, checked=False),
        Fixed("is_encoder_decoder", lambda config: True, checked=False),
        Fixed("tie_word_embeddings", lambda config: False, checked=False),
        Fixed("pad_token_id", lambda config: 0, checked=False),
        Fixed("eos_token_id", lambda config: 1, checked=False),
    ),
    closed=False,
)


MAX_STEPS = 10_000


def _unsound_schedule(config: schedule.Config) -> Iterable[str]:
    try:
        schedule.check_config(config)
    except ValueError as error:
        yield str(error)


SCHEDULE = Table(
    schedule.Config,
    (
        Field("num_train_timesteps", "train_timesteps", size, 1000),
        Field("shift", "shift", number(), 1.0),
        Field("use_dynamic_shifting", "use_dynamic_shifting", flag, False),
        Field("base_shift", "base_shift", any_number, 0.5),
        Field("max_shift", "max_shift", any_number, 1.15),
        Field("base_image_seq_len", "base_image_seq_len", size, 256),
        Field("max_image_seq_len", "max_image_seq_len", size, 4096),
        Field("time_shift_type", "time_shift_type", choice("exponential", "linear"), "exponential"),
        Field("shift_terminal", "shift_terminal", optional(number()), None),
        Field("invert_sigmas", "invert_sigmas", flag, False),
        Field("use_karras_sigmas", "use_karras_sigmas", lambda value: flag(value or False), False),
        Field("use_exponential_sigmas", "use_exponential_sigmas", lambda value: flag(value or False), False),
        Field("use_beta_sigmas", "use_beta_sigmas", lambda value: flag(value or False), False),
        Field("stochastic_sampling", "stochastic_sampling", flag, False),
        Field("distilled_steps", "distilled_steps", optional(whole(1, MAX_STEPS)), None, optional=True),
        Field("trained_steps", "trained_steps", several(whole(1, MAX_STEPS), 0, 64), [], optional=True),
        Field("distillation", "distillation", optional(choice(*distilled.KINDS)), None, optional=True),
        Field("guidance_distilled", "guidance_distilled", flag, False, optional=True),
    ),
    unsound=_unsound_schedule,
)

TABLES = {
    "clip": CLIP,
    "clip_l": CLIP,
    "clip_g": CLIP,
    "t5": T5,
    "transformer": TRANSFORMER,
    "vae": VAE,
    "taesd": TAESD,
    "schedule": SCHEDULE,
}
"""Table of every component, of the schedule, and of a CLIP that may be either."""
