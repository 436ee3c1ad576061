"""CLIP text encoders, as pure functions.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision": a causal, pre-norm
transformer over byte-pair tokens, pooled at the end token. Numerics of transformers' `CLIPTextModelWithProjection`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import computation, layers
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Implementation
from functional_sd3.core.checks import check_component, check_ids
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.parallel.tensor import check_heads
from functional_sd3.parallel.transport import group_size
from functional_sd3.text.clip import block as clip_block

# The value of `eos_id` that in old configurations, all of SD3's among them, means pooling at the highest id.
LEGACY_EOS_ID = 2


@dataclass(frozen=True)
class Config:
    """Sizes of a CLIP text encoder; `CLIP_L` and `CLIP_G` are SD3's, `CLIP_B` is that of ViT-B/32.

    `activation`: a key of `ACTIVATIONS`. `eos_id`: texts are pooled at the first token with this id; 2 means at the
    first token with the text's highest id (the end token is the last of CLIP's vocabulary), as in transformers.
    """

    vocab: int = 49408
    length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    projection_width: int = 768
    eps: float = 1e-5
    eos_id: int = LEGACY_EOS_ID

    def __post_init__(self) -> None:
        clip_block.check(self.width, self.heads, self.activation)


CLIP_B = Config(width=512, heads=8, mlp_width=2048, projection_width=512)
CLIP_L = Config()
CLIP_G = Config(width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", projection_width=1280)


class Output(NamedTuple):
    """Features of a text.

    last (batch, tokens, width): after the final norm; penultimate (batch, tokens, width): the last block's input,
    without the final norm; pooled (batch, width): `last` at the end token; projected (batch, projection_width).
    """

    last: Tensor
    penultimate: Tensor
    pooled: Tensor
    projected: Tensor


def spec(config: Config) -> Tree:
    """The parameter tree, with the initialisation of the CLIP paper's code."""
    width = config.width
    return {
        "token_embedding": layers.embedding_spec(config.vocab, width),
        "position_embedding": layers.embedding_spec(config.length, width, scale=0.01, axis="positions"),
        "blocks": [clip_block.spec(width, config.mlp_width, config.layers)] * config.layers,
        "final_norm": layers.norm_spec(width),
        "projection": layers.linear_spec(
            width, config.projection_width, bias=False, init=specs.normal(width**-0.5), axes=("features", "width")
        ),
    }


def init(key: Key, config: Config, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
    """Initial parameters of `spec(config)`."""
    return specs.init(key, spec(config), dtype=dtype, device=device)


def apply(
    params: Params,
    config: Config,
    ids: Tensor,
    *,
    skip: int = 0,
    implementation: Implementation = "sdpa",
    materialize: Callable[[Params], Params] | None = None,
    block_transform: computation.BlockTransform | None = None,
    mesh: Mesh | None = None,
) -> Output:
    """Encodes token ids (batch, tokens), int64, tokens <= config.length, each id below config.vocab.

    `skip` more layers are left out of `penultimate` (clip skip): it is transformers' `hidden_states[-(skip + 2)]`. The
    outputs have the parameters' dtype. materialize, block_transform: as in `mmdit.apply`. mesh: as in `t5.apply`.
    Raises ValueError for ids of another shape and for a skip that leaves no layer.
    """
    check_component("clip", "clip_l", params, "token_embedding", config, "projection_width")
    check_ids("ids", ids)
    if ids.ndim != 2 or not 1 <= ids.shape[1] <= config.length:
        raise ValueError(f"ids have shape {tuple(ids.shape)}; CLIP reads (batch, 1 to {config.length} tokens)")
    if not 0 <= skip < config.layers:
        raise ValueError(f"skip {skip} must be between 0 and {config.layers - 1}, one less than the layers")
    group = None if mesh is None else mesh.group("tensor")
    check_heads(config.heads, group_size(group))
    params = computation.materialize_rest(params, materialize)
    block_functions = computation.block_functions(clip_block.apply, materialize, block_transform, len(params["blocks"]))
    positions = params["position_embedding"]["weight"][: ids.shape[1]]
    x = layers.embedding(params["token_embedding"], ids) + positions
    block_inputs = []
    for apply_block, block in zip(block_functions, params["blocks"], strict=True):
        block_inputs.append(x)
        x = apply_block(
            block, x, config.heads, config.activation, config.eps, causal=True, implementation=implementation,
            tensor_group=group,
        )  # fmt: skip
    last = layers.layer_norm(params["final_norm"], x, config.eps)
    pooled = torch.take_along_dim(last, _end(config, ids)[:, None, None], dim=1).squeeze(1)
    return Output(last, block_inputs[-1 - skip], pooled, layers.linear(params["projection"], pooled))


def _end(config: Config, ids: Tensor) -> Tensor:
    """Position of the first end token of every text, (batch,): argmax returns the first of equal values."""
    if config.eos_id == LEGACY_EOS_ID:
        return ids.argmax(dim=-1)
    return (ids == config.eos_id).int().argmax(dim=-1)
