"""IP-Adapter for SD3.5: image prompts, by additional keys and values for every attention of the transformer.

Ye et al. 2023, "IP-Adapter: Text Compatible Image Prompt Adapter" (arXiv:2308.06721), in InstantX's form for
SD3.5-large: a time-dependent resampler turns an image encoder's features into tokens (Alayrac et al. 2022, Flamingo,
section 3.1), which are projected to keys and values for each attention. Same numerics as diffusers'
`IPAdapterTimeImageProjection` and `SD3IPAdapterJointAttnProcessor2_0`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Implementation, attention, merge_heads, split_heads
from functional_sd3.core.checks import check_floating
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.transformer import mmdit
from functional_sd3.transformer.checks import check_shape, check_times
from functional_sd3.transformer.embeddings import embed_time
from functional_sd3.transformer.joint_block import EPS, norm

_EPS = 1e-5


@dataclass(frozen=True)
class Config:
    """Sizes of an IP-Adapter; `SD35_LARGE` is the released one.

    attentions: number of the transformer's attentions; width, head_dim: the transformer's. image_width: of the image
    encoder's features. hidden_width, depth, heads, resampler_head_dim, tokens (of its result), mlp_width and
    time_frequencies: the resampler's.
    """

    attentions: int
    width: int
    head_dim: int = 64
    image_width: int = 1152
    hidden_width: int = 1280
    depth: int = 4
    heads: int = 20
    resampler_head_dim: int = 64
    tokens: int = 64
    mlp_width: int = 5120
    time_frequencies: int = 320


SD35_LARGE = Config(attentions=38, width=2432)


class ImagePrompt(NamedTuple):
    """An IP-Adapter and its image: features (batch or 1, tokens, image_width), SigLIP's penultimate hidden state;
    scale: a number, or a tensor () or (batch,)."""

    params: Params
    config: Config
    features: Tensor
    scale: float | Tensor = 1.0


def spec(config: Config) -> Tree:
    """Parameter tree: {"resampler", "attentions"}."""
    hidden = config.hidden_width
    return {
        "resampler": {
            "queries": Param((1, config.tokens, hidden), specs.normal(hidden**-0.5), (None, "queries", "width")),
            "in": layers.linear_spec(config.image_width, hidden, axes=("width", "features")),
            "time": {
                "in": layers.linear_spec(config.time_frequencies, hidden, axes=("width", "frequencies")),
                "out": layers.linear_spec(hidden, hidden, axes=("width", "width")),
            },
            "blocks": [_block_spec(config) for _ in range(config.depth)],
            "out": layers.linear_spec(hidden, config.width, axes=("context", "width")),
            "norm": layers.norm_spec(config.width, axis="context"),
        },
        "attentions": [_attention_spec(config) for _ in range(config.attentions)],
    }


def init(key: Key, config: Config, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
    """Initial parameters."""
    return specs.init(key, spec(config), dtype=dtype, device=device)


def apply(
    params: Params,
    config: Config,
    features: Tensor,
    t: Tensor,
    transformer: mmdit.Config,
    scale: float | Tensor = 1.0,
    *,
    implementation: Implementation = "sdpa",
) -> list[Tree]:
    """Keys, values and norms of the image prompt for each block, for `mmdit.apply(..., image_prompt=)`.

    features (batch, tokens, image_width): an image encoder's (zeros for no image, as in the negative velocity of
    guidance); t () or (batch,) in [0, 1]; scale: a number, or a tensor () or (batch,); at 0 the velocity is that
    without an image prompt, to the bit. Raises ValueError when the adapter was made for another transformer, or a shape
    does not fit.
    """
    check(config, transformer)
    tokens, time = resample(params["resampler"], config, features, t, implementation=implementation)
    entries = iter([_key_value(part, config, tokens, time, _scale(scale, tokens)) for part in params["attentions"]])
    return [
        {name: next(entries) for name in _attention_names(index in transformer.dual_attention_layers)}
        for index in range(transformer.depth)
    ]


def per_sample(image_prompt: ImagePrompt | None, batch: int) -> dict[str, Tensor]:
    """Features and scale of an image prompt, one row per sample of a batch; guidance stacks and splits them."""
    if image_prompt is None:
        return {}
    features, scale = image_prompt.features, image_prompt.scale
    if not isinstance(scale, Tensor):
        scale = torch.full((), float(scale), dtype=torch.float32, device=features.device)
    for name, rows in (("images", features.shape[0]), ("scales", len(scale) if scale.ndim else 1)):
        if rows not in (1, batch):
            raise ValueError(f"{rows} {name} of an image prompt for {batch} samples; give one, or one for each")
    return {"features": features.expand(batch, -1, -1), "scale": scale.expand(batch)}


def prompt(
    image_prompt: ImagePrompt | None,
    tensors: Tree,
    t: Tensor,
    transformer: mmdit.Config,
    *,
    implementation: Implementation = "sdpa",
) -> list[Tree]:
    """`apply` of an image prompt with the tensors of `per_sample` at t; [] without one."""
    if image_prompt is None:
        return []
    features, scale = tensors["features"], tensors["scale"]
    return apply(
        image_prompt.params, image_prompt.config, features, t, transformer, scale, implementation=implementation
    )


def check(config: Config, transformer: mmdit.Config) -> None:
    """Raises ValueError when an IP-Adapter was made for another transformer."""
    count = transformer.depth + len(transformer.dual_attention_layers)
    wanted = {"width": transformer.width, "head_dim": transformer.head_dim, "attentions": count}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"the IP-Adapter was made for another model: its {name} is {getattr(config, name)}, the model's {value}"
            )


def resample(
    params: Params, config: Config, features: Tensor, t: Tensor, *, implementation: Implementation = "sdpa"
) -> tuple[Tensor, Tensor]:
    """Features (batch, tokens, image_width) at t -> tokens (batch, tokens, width) and time (batch, hidden_width)."""
    check_floating("features", features)
    check_shape("features", features, "(batch, tokens, image_width)", (None, None, config.image_width))
    batch, dtype = features.shape[0], params["in"]["weight"].dtype
    check_times(t, batch)
    sinusoid = embed_time(t.expand(batch), config.time_frequencies, dtype)
    time = layers.linear(params["time"]["out"], F.silu(layers.linear(params["time"]["in"], sinusoid)))
    image = layers.linear(params["in"], features.to(dtype)) + time[:, None]
    tokens = params["queries"].expand(batch, -1, -1)
    for block in params["blocks"]:
        tokens = _resample_block(block, config.heads, image, tokens, time, implementation)
    return layers.layer_norm(params["norm"], layers.linear(params["out"], tokens), _EPS), time


def _resample_block(params, heads, image, tokens, time, implementation) -> Tensor:
    """Block of the resampler: tokens attend to the image's features and to themselves; modulated by time."""
    parts = layers.linear(params["modulation"], F.silu(time))[:, None].chunk(4, dim=-1)
    shift, scale, mlp_shift, mlp_scale = parts
    normed = layers.modulate(layers.layer_norm(params["token_norm"], tokens, _EPS), shift, scale)
    attention_input = torch.cat([layers.layer_norm(params["image_norm"], image, _EPS), normed], dim=1)
    query = split_heads(layers.linear(params["query"], normed), heads)
    key_value = layers.linear(params["key_value"], attention_input)
    key, value = (split_heads(part, heads) for part in key_value.chunk(2, dim=-1))
    attended = attention(query, key, value, implementation=implementation)
    tokens = tokens + layers.linear(params["out"], merge_heads(attended))
    hidden = layers.modulate(layers.layer_norm(params["mlp_norm"], tokens, _EPS), mlp_shift, mlp_scale)
    return tokens + layers.mlp(params["mlp"], hidden, "gelu")


def _key_value(params: Params, config: Config, tokens: Tensor, time: Tensor, scale: float | Tensor) -> Tree:
    """Keys and values (batch, heads, tokens, head_dim) for one attention, and norms for the image stream's queries and
    keys in it."""
    shift, scales = layers.linear(params["modulation"], F.silu(time))[:, None].chunk(2, dim=-1)
    modulated = layers.modulate(norm(tokens), shift, scales)
    heads = config.width // config.head_dim
    key, value = (split_heads(layers.linear(params[name], modulated), heads) for name in ("key", "value"))
    return {
        "key": layers.rms_norm(params["prompt_key_norm"], key, EPS),
        "value": value,
        "query_norm": params["query_norm"],
        "key_norm": params["key_norm"],
        "scale": scale,
    }


def _scale(scale: float | Tensor, like: Tensor) -> float | Tensor:
    if not isinstance(scale, Tensor):
        return scale
    scale = scale.to(like.dtype)
    return scale[:, None, None, None] if scale.ndim else scale


def _attention_names(dual: bool) -> tuple[str, ...]:
    return ("attention", "attention2") if dual else ("attention",)


def _block_spec(config: Config) -> Tree:
    hidden, inner = config.hidden_width, config.heads * config.resampler_head_dim
    return {
        "image_norm": layers.norm_spec(hidden),
        "token_norm": layers.norm_spec(hidden),
        "query": layers.linear_spec(hidden, inner, bias=False, axes=("heads", "width")),
        "key_value": layers.linear_spec(hidden, 2 * inner, bias=False, axes=("key_value", "width")),
        "out": layers.linear_spec(inner, hidden, bias=False, axes=("width", "heads")),
        "modulation": layers.linear_spec(hidden, 4 * hidden, axes=("modulation", "width")),
        "mlp_norm": layers.norm_spec(hidden),
        "mlp": {
            "in": layers.linear_spec(hidden, config.mlp_width, bias=False, axes=("hidden", "width")),
            "out": layers.linear_spec(config.mlp_width, hidden, bias=False, axes=("width", "hidden")),
        },
    }


def _attention_spec(config: Config) -> Tree:
    return {
        "modulation": layers.linear_spec(config.hidden_width, 2 * config.width, axes=("modulation", "width")),
        "key": layers.linear_spec(config.width, config.width, bias=False, axes=("heads", "context")),
        "value": layers.linear_spec(config.width, config.width, bias=False, axes=("heads", "context")),
        "query_norm": layers.norm_spec(config.head_dim, bias=False, axis="head_dim"),
        "key_norm": layers.norm_spec(config.head_dim, bias=False, axis="head_dim"),
        "prompt_key_norm": layers.norm_spec(config.head_dim, bias=False, axis="head_dim"),
    }
