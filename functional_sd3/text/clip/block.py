"""Pre-norm transformer block of CLIP's text and image encoders: causal for texts, not for images."""

from torch import Tensor

from functional_sd3.core import attention, layers
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Params, Tree
from functional_sd3.parallel import tensor
from functional_sd3.parallel.transport import Group, group_size

ACTIVATIONS = ("quick_gelu", "gelu")


def check(width: int, heads: int, activation: str) -> None:
    """Raises ValueError for sizes no block can have."""
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of the {heads} heads")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} must be one of {sorted(ACTIVATIONS)}")


def spec(width: int, mlp_width: int, depth: int) -> Tree:
    """Parameters of one block of an encoder of `depth` blocks, with the initialisation of the CLIP paper's code."""
    narrow = specs.normal(width**-0.5)
    residual = specs.normal(width**-0.5 * (2 * depth) ** -0.5)
    return {
        "norm1": layers.norm_spec(width),
        "attention": {
            "qkv": layers.linear_spec(width, 3 * width, init=narrow, axes=("qkv", "width")),
            "out": layers.linear_spec(width, width, init=residual, axes=("width", "heads")),
        },
        "norm2": layers.norm_spec(width),
        "mlp": {
            "in": layers.linear_spec(
                width, mlp_width, init=specs.normal((2 * width) ** -0.5), axes=("hidden", "width")
            ),
            "out": layers.linear_spec(mlp_width, width, init=residual, axes=("width", "hidden")),
        },
    }


def apply(
    params: Params,
    x: Tensor,
    heads: int,
    activation: str,
    eps: float,
    *,
    causal: bool,
    implementation: Implementation = "sdpa",
    tensor_group: Group = None,
) -> Tensor:
    """x (batch, tokens, width) -> the same shape; with `causal` a token attends to itself and those before it.

    tensor_group: processes of which each has part of the heads and hidden features; `heads` is the number of all.
    """
    normed = layers.layer_norm(params["norm1"], x, eps)
    qkv_layer = tensor.columns(params["attention"]["qkv"], tensor_group)
    qkv = layers.linear(qkv_layer, tensor.enter(normed, tensor_group)).chunk(3, dim=-1)
    query, key, value = (attention.split_heads(part, heads // group_size(tensor_group)) for part in qkv)
    attended = attention.attention(query, key, value, causal=causal, implementation=implementation)
    x = x + tensor.linear_rows(params["attention"]["out"], attention.merge_heads(attended), tensor_group)
    return x + tensor.mlp(params["mlp"], layers.layer_norm(params["norm2"], x, eps), activation, tensor_group)
