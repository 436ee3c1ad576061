"""The encoder of T5 version 1.1, as pure functions.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", with the gated
GELU of Shazeer 2020, "GLU Variants Improve Transformer". Numerics of transformers' `T5EncoderModel`: no biases,
attention scores without a scale, one table of relative positions shared by all blocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from functional_sd3.core import attention, computation, layers, prng
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Implementation
from functional_sd3.core.checks import check_component, check_ids
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.parallel import tensor
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.transport import Group, group_size


@dataclass(frozen=True)
class Config:
    """Sizes of a T5 encoder; `T5_XXL` is the one of SD3.

    `buckets` relative positions are distinguished, half of them in each direction, up to `max_distance` tokens.
    """

    vocab: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp_width: int = 10240
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"buckets {self.buckets} must be a multiple of 4: near and far ones, before and after")
        if self.max_distance <= self.buckets // 4:
            raise ValueError(f"max_distance {self.max_distance} must be above a quarter of the {self.buckets} buckets")


T5_XXL = Config()


def spec(config: Config) -> Tree:
    """The parameter tree, with T5's own initialisation."""
    width, inner = config.width, config.heads * config.head_dim
    block = {
        "norm1": layers.norm_spec(width, bias=False),
        "attention": {
            "qkv": layers.linear_spec(width, 3 * inner, bias=False, init=_qkv_init(config), axes=("qkv", "width")),
            "out": layers.linear_spec(
                inner, width, bias=False, init=specs.normal(inner**-0.5), axes=("width", "heads")
            ),
        },
        "norm2": layers.norm_spec(width, bias=False),
        "mlp": {
            "in": layers.linear_spec(
                width, 2 * config.mlp_width, bias=False, init=specs.normal(width**-0.5), axes=("gated", "width")
            ),
            "out": layers.linear_spec(
                config.mlp_width, width, bias=False, init=specs.normal(config.mlp_width**-0.5), axes=("width", "hidden")
            ),
        },
    }
    bias = specs.Param((config.buckets, config.heads), specs.normal(width**-0.5), ("positions", "heads"))
    return {
        "embedding": layers.embedding_spec(config.vocab, width, scale=1.0),
        "relative_bias": {"weight": bias},
        "blocks": [block] * config.layers,
        "final_norm": layers.norm_spec(width, bias=False),
    }


def init(key: Key, config: Config, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
    """Initial parameters of `spec(config)`."""
    return specs.init(key, spec(config), dtype=dtype, device=device)


def apply(
    params: Params,
    config: Config,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    implementation: Implementation = "sdpa",
    materialize: Callable[[Params], Params] | None = None,
    block_transform: computation.BlockTransform | None = None,
    mesh: Mesh | None = None,
) -> Tensor:
    """Encodes token ids (batch, tokens), int64, each below config.vocab, to (batch, tokens, width).

    `mask` (batch, tokens), bool or int: tokens where it is zero are not attended to; None attends to all, padding too,
    as SD3 does. The output has the parameters' dtype; with 16-bit parameters the sums between blocks are float32
    (T5-XXL's overflow float16). materialize, block_transform: as in `mmdit.apply`. mesh: of processes of which each
    has part of the heads and hidden features (`parallel.tensor.cut`), by its axis tensor. Raises ValueError for ids or
    a mask of another shape.
    """
    check_component("t5", "t5", params, "embedding", config, "buckets")
    check_ids("ids", ids)
    if ids.ndim != 2 or ids.shape[1] < 1:
        raise ValueError(f"ids have shape {tuple(ids.shape)}; T5 reads (batch, tokens) with at least one token")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the ids {tuple(ids.shape)}; they must be the same")
    group = None if mesh is None else mesh.group("tensor")
    tensor.check_heads(config.heads, group_size(group))
    params = computation.materialize_rest(params, materialize)
    embedded = layers.embedding(params["embedding"], ids)
    dtype = embedded.dtype
    bias = relative_bias(params["relative_bias"], config, ids.shape[1])
    if mask is not None:
        # The lowest finite number: where nothing may be attended to, minus infinity would give NaN.
        bias = bias.masked_fill((mask == 0)[:, None, None, :], torch.finfo(dtype).min)
    x = embedded.to(torch.promote_types(dtype, torch.float32))
    block_functions = computation.block_functions(_block, materialize, block_transform, len(params["blocks"]))
    for apply_block, block in zip(block_functions, params["blocks"], strict=True):
        x = apply_block(block, config, x, bias, dtype, implementation, group)
    return layers.rms_norm(params["final_norm"], x, config.eps).to(dtype)


def _block(
    block: Params,
    config: Config,
    x: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    implementation: Implementation,
    group: Group,
) -> Tensor:
    normed = layers.rms_norm(block["norm1"], x, config.eps).to(dtype)
    x = x + _attention(block["attention"], config, normed, bias, implementation, group)
    normed = layers.rms_norm(block["norm2"], x, config.eps).to(dtype)
    return x + _mlp(block["mlp"], normed, group)


def relative_bias(params: Params, config: Config, tokens: int) -> Tensor:
    """Relative position bias of the attention scores, shared by all blocks: (1, heads, query tokens, key tokens)."""
    positions = torch.arange(tokens, device=params["weight"].device, dtype=torch.int64)
    # Only 2 tokens - 1 of the tokens ** 2 distances differ.
    distances = torch.arange(1 - tokens, tokens, device=positions.device, dtype=torch.int64)
    bucket = relative_bucket(distances, config.buckets, config.max_distance)
    return params["weight"].t()[:, bucket[positions[None, :] - positions[:, None] + tokens - 1]][None]


def relative_bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of a distance (key position - query position), int64, same shape, in [0, buckets).

    Half of the buckets are for keys after the query. In each half the first half of the buckets holds one distance
    each, the others widen logarithmically up to `max_distance`; larger distances share the last (Raffel et al. 2020,
    section 2.1).
    """
    directed = buckets // 2
    exact = directed // 2
    absolute = distance.abs()
    # float32 in this order of operations, as the released weights were trained: some distances lie on a bucket's edge.
    position = torch.log(absolute.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (position * (directed - exact)).long()).clamp(max=directed - 1)
    return torch.where(absolute < exact, absolute, logarithmic) + directed * (distance > 0)


def _attention(
    params: Params, config: Config, x: Tensor, bias: Tensor, implementation: Implementation, group: Group
) -> Tensor:
    qkv = layers.linear(tensor.columns(params["qkv"], group), tensor.enter(x, group)).chunk(3, dim=-1)
    query, key, value = (attention.split_heads(part, config.heads // group_size(group)) for part in qkv)
    attended = attention.attention(query, key, value, mask=bias, scale=1.0, implementation=implementation)
    return tensor.linear_rows(params["out"], attention.merge_heads(attended), group)


def _mlp(params: Params, x: Tensor, group: Group) -> Tensor:
    """GEGLU with the tanh form of GELU (Shazeer 2020): (gelu(x W) * (x V)) W_2."""
    both, x = tensor.columns(params["in"], group), tensor.enter(x, group)
    gate_layer, value_layer = layers.split_outputs(both, 2 * [both["weight"].shape[0] // 2])
    gate, value = layers.linear_activation(gate_layer, x, "gelu_tanh"), layers.linear(value_layer, x)
    if x.dtype == torch.float16:
        # T5-XXL's outputs exceed float16's range: divide by a power of two before, multiply in float32 after.
        return tensor.linear_rows(params["out"], gate * (value / 64), group).float() * 64
    return tensor.linear_rows(params["out"], value * gate, group)


def _qkv_init(config: Config) -> specs.Initializer:
    """Normal, 1/sqrt(width); queries divided by sqrt(head_dim), in place of the scale that the scores lack."""

    def draw(key: Key, shape: tuple[int, ...]) -> Tensor:
        weight = config.width**-0.5 * prng.normal(key, shape)
        query, key_value = weight.split([shape[0] // 3, shape[0] - shape[0] // 3])
        return torch.cat((query * config.head_dim**-0.5, key_value))

    return draw
