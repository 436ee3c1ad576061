"""The fields of diffusers' and transformers' config files, each paired with one of ours, read and written by one table.

Every field that changes the computation is checked: a value we do not compute with is an error, never ignored. What a
file does not say is what the class that owns the file assumes (diffusers 0.42, transformers 5.23).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from functional_sd3.flow import schedule
from functional_sd3.image import taesd, vae
from functional_sd3.text import clip, clip_image, t5
from functional_sd3.transformer import mmdit
from functional_sd3.weights.errors import WeightsError

# Far above any network there is, and low enough that a hostile file cannot make us build a spec for ever.
_MOST_LAYERS = 1024
_LARGEST_SIZE = 2**24
_LARGEST_NUMBER = 1e30


class Field(NamedTuple):
    """`read` turns theirs into ours, or raises ValueError saying what would be right; `default`: of an absent field."""

    theirs: str
    ours: str
    read: Callable[[Any], Any]
    default: Any
    write: Callable[[Any], Any] = lambda value: list(value) if isinstance(value, tuple) else value


class Fixed(NamedTuple):
    """A field whose only supported value follows from the rest."""

    theirs: str
    value: Callable[[Any], Any]
    default: Any = None
    checked: bool = True
    written: bool = True


class Table(NamedTuple):
    """How one kind of config file corresponds to one config of ours.

    closed: fields the table does not know are errors, unless they say nothing; transformers' configs are full of unused
    ones. unsound: sentences about values that do not go together.
    """

    config: type
    fields: tuple[Field, ...]
    fixed: tuple[Fixed, ...] = ()
    closed: bool = True
    unsound: Callable[[Any], Iterable[str]] = lambda config: ()


def read(table: Table, values: dict[str, Any], path: Path) -> Any:
    """Our config from the values of a file. Raises one WeightsError naming every field that is unsupported."""
    problems: list[str] = []
    found = {}
    for field in table.fields:
        value = values.get(field.theirs, field.default)
        try:
            found[field.ours] = field.read(value)
        except ValueError as error:
            problems.append(f"{field.theirs} is {_shown(value)}, {error}")
    if table.closed:
        known = {field.theirs for field in (*table.fields, *table.fixed)}
        problems += [
            f"{name} is {_shown(value)}, a field that is not known"
            for name, value in values.items()
            if name not in known and not name.startswith("_") and value not in (None, False, [], {})
        ]
    if not problems:
        try:
            config = table.config(**found)
            problems += [*_wrong_fixed(table, config, values), *table.unsound(config)]
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise WeightsError([f"{path}: {problem}" for problem in problems])
    return config


def write(table: Table, config: Any) -> dict[str, Any]:
    """The values of a file from our config: `read(table, write(table, config), path) == config`."""
    fields = {field.theirs: field.write(getattr(config, field.ours)) for field in table.fields}
    return {**fields, **{fixed.theirs: fixed.value(config) for fixed in table.fixed if fixed.written}}


def _wrong_fixed(table: Table, config: Any, values: dict[str, Any]) -> Iterable[str]:
    for fixed in table.fixed:
        found, right = values.get(fixed.theirs, fixed.default), fixed.value(config)
        if fixed.checked and found != right:
            yield f"{fixed.theirs} is {_shown(found)}, only {right!r} is supported here"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _whole(lowest: int, highest: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not lowest <= value <= highest:
            raise ValueError(f"must be a whole number from {lowest} to {highest}")
        return value

    return read


def _number(lowest: float = 0.0) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if type(value) not in (int, float) or not lowest < value < _LARGEST_NUMBER:
            raise ValueError(f"must be a number above {lowest:g}")
        return float(value)

    return read


def _choice(*values: Any) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not any(value == choice and type(value) is type(choice) for choice in values):
            raise ValueError(f"must be {' or '.join(map(repr, values))}")
        return value

    return read


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _several(read: Callable[[Any], Any], fewest: int, most: int) -> Callable[[Any], tuple]:
    def read_all(value: Any) -> tuple:
        if not isinstance(value, list | tuple) or not fewest <= len(value) <= most:
            raise ValueError(f"must be a list of {fewest} to {most}")
        return tuple(read(item) for item in value)

    return read_all


_size, _layers, _flag = _whole(1, _LARGEST_SIZE), _whole(1, _MOST_LAYERS), _choice(True, False)
_any_number = _number(-_LARGEST_NUMBER)


def _unsound_transformer(config: mmdit.Config) -> Iterable[str]:
    if any(layer >= config.depth for layer in config.dual_attention_layers):
        yield f"dual_attention_layers {list(config.dual_attention_layers)} must all be below num_layers {config.depth}"
    if config.width % 4:
        yield f"width {config.width} (heads times head dim) must be a multiple of 4"
    if config.sample_size < config.patch_size:
        yield f"sample_size {config.sample_size} must be at least patch_size {config.patch_size}"


TRANSFORMER = Table(
    mmdit.Config,
    (
        Field("sample_size", "sample_size", _size, 128),
        Field("patch_size", "patch_size", _size, 2),
        Field("in_channels", "in_channels", _size, 16),
        Field("num_layers", "depth", _layers, 18),
        Field("attention_head_dim", "head_dim", _size, 64),
        Field("num_attention_heads", "heads", _size, 18),
        Field("joint_attention_dim", "context_width", _size, 4096),
        Field("pooled_projection_dim", "pooled_width", _size, 2048),
        Field("out_channels", "out_channels", _size, 16),
        Field("pos_embed_max_size", "position_size", _size, 96),
        Field("dual_attention_layers", "dual_attention_layers", _several(_whole(0, _MOST_LAYERS), 0, _MOST_LAYERS), ()),
        Field(
            "qk_norm",
            "qk_norm",
            lambda value: _choice(None, "rms_norm")(value) is not None,
            None,
            lambda value: "rms_norm" if value else None,
        ),
    ),
    (Fixed("caption_projection_dim", lambda config: config.width, 1152),),
    unsound=_unsound_transformer,
)


def _unsound_vae(config: vae.Config) -> Iterable[str]:
    if any(channels % config.groups for channels in config.channels):
        yield f"block_out_channels {list(config.channels)} must be multiples of norm_num_groups {config.groups}"


VAE = Table(
    vae.Config,
    (
        Field("block_out_channels", "channels", _several(_size, 1, 16), (64,)),
        Field("layers_per_block", "blocks_per_level", _layers, 1),
        Field("latent_channels", "latent_channels", _size, 4),
        Field("norm_num_groups", "groups", _size, 32),
        Field("sample_size", "sample_size", _size, 32),
        Field("scaling_factor", "scaling", _number(), 0.18215),
        Field("shift_factor", "shift", lambda value: _any_number(0 if value is None else value), None),
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

_blocks = _several(_whole(0, _MOST_LAYERS), 1, 16)


def _same_blocks(ours: str) -> Callable[[taesd.Config], list[int]]:
    return lambda config: [config.width] * len(getattr(config, ours))


TAESD = Table(
    taesd.Config,
    (
        Field("decoder_block_out_channels", "width", lambda value: _several(_size, 1, 16)(value)[0], (64,)),
        Field("latent_channels", "latent_channels", _size, 4),
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

CLIP = Table(
    clip.Config,
    (
        Field("vocab_size", "vocab", _size, 49408),
        Field("max_position_embeddings", "length", _size, 77),
        Field("hidden_size", "width", _size, 512),
        Field("num_hidden_layers", "layers", _layers, 12),
        Field("num_attention_heads", "heads", _size, 8),
        Field("intermediate_size", "mlp_width", _size, 2048),
        Field("hidden_act", "activation", _choice(*clip.ACTIVATIONS), "quick_gelu"),
        Field("projection_dim", "projection_width", _size, 512),
        Field("layer_norm_eps", "eps", _number(), 1e-5),
        Field("eos_token_id", "eos_id", _whole(0, _LARGEST_SIZE), 49407),
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
        Field("image_size", "size", _size, 224),
        Field("patch_size", "patch", _size, 32),
        Field("hidden_size", "width", _size, 768),
        Field("num_hidden_layers", "layers", _layers, 12),
        Field("num_attention_heads", "heads", _size, 12),
        Field("intermediate_size", "mlp_width", _size, 3072),
        Field("hidden_act", "activation", _choice(*clip.ACTIVATIONS), "quick_gelu"),
        Field("projection_dim", "projection_width", _size, 512),
        Field("layer_norm_eps", "eps", _number(), 1e-5),
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
        Field("vocab_size", "vocab", _size, 32128),
        Field("d_model", "width", _size, 512),
        Field("num_layers", "layers", _layers, 6),
        Field("num_heads", "heads", _size, 8),
        Field("d_kv", "head_dim", _size, 64),
        Field("d_ff", "mlp_width", _size, 2048),
        Field("relative_attention_num_buckets", "buckets", _size, 32),
        Field("relative_attention_max_distance", "max_distance", _size, 128),
        Field("layer_norm_epsilon", "eps", _number(), 1e-6),
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

SCHEDULE = Table(
    schedule.Config,
    (
        Field("num_train_timesteps", "train_timesteps", _size, 1000),
        Field("shift", "shift", _number(), 1.0),
        Field("use_dynamic_shifting", "use_dynamic_shifting", _flag, False),
        Field("base_shift", "base_shift", _any_number, 0.5),
        Field("max_shift", "max_shift", _any_number, 1.15),
        Field("base_image_seq_len", "base_image_seq_len", _size, 256),
        Field("max_image_seq_len", "max_image_seq_len", _size, 4096),
        Field("time_shift_type", "time_shift_type", _choice("exponential", "linear"), "exponential"),
        Field("shift_terminal", "shift_terminal", _optional(_number()), None),
        Field("invert_sigmas", "invert_sigmas", _flag, False),
        Field("use_karras_sigmas", "use_karras_sigmas", lambda value: _flag(value or False), False),
        Field("use_exponential_sigmas", "use_exponential_sigmas", lambda value: _flag(value or False), False),
        Field("use_beta_sigmas", "use_beta_sigmas", lambda value: _flag(value or False), False),
        Field("stochastic_sampling", "stochastic_sampling", _flag, False),
    ),
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
