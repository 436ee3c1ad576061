"""Layers as pairs: `x_spec(...)` describes the parameters, `x(params, ...)` applies them.

Every layer is its formula; `@op` lets `core.dispatch` take a kernel instead where one fits. Norm statistics are float32
where the input's dtype is narrower.

Beside its weight a linear or convolution layer may hold
- "scale" (outputs,): the weight is then stored in int8 or float8 and dequantised as scale times the weight;
- "int8_scale" (outputs,), of a linear layer: as "scale", of a weight in int8 whose product is computed in int8, too,
  for which the input is rounded by `round_rows`;
- "float8_scale" (outputs,): likewise of a weight in float8 (e4m3fn), for which the input is rounded by
  `round_rows_to_float8`;
- "low_rank", {"down": (rank, inputs, ...), "up": (outputs, rank)}: a LoRA, whose product is added to the layer's output
  without being added to the weight.
The weight of a linear layer may be pre-packed (`weights.prepack`): of the same shape, in a layout that oneDNN reads.
An embedding may hold "added" (rows, width): rows that follow those of its table, as the vectors of new words.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import spec, tree
from functional_sd3.core.dispatch import op
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Params, Tree


def linear_spec(
    inputs: int,
    outputs: int,
    *,
    bias: bool = True,
    init: spec.Initializer | None = None,
    axes: tuple[str, str] = ("out", "in"),
) -> Tree:
    """Weight (outputs, inputs) and bias (outputs,); `init` replaces PyTorch's default weight (zero bias then). axes:
    logical names of outputs and inputs, of `spec.AXES`."""
    weight = init or spec.fan_in_uniform(inputs)
    tree = {"weight": Param((outputs, inputs), weight, axes)}
    if bias:
        tree["bias"] = Param((outputs,), spec.zeros if init else spec.fan_in_uniform(inputs), axes[:1])
    return tree


@op
def linear(params: Params, x: Tensor) -> Tensor:
    """Linear layer: x (..., inputs) -> (..., outputs)."""
    weight = dequantized_weight(params, x.dtype)
    return add_low_rank(params, x, F.linear(rounded_input(params, x), weight, params.get("bias")))


def add_low_rank(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """y (..., outputs), of a linear layer for x (..., inputs), plus the product of its LoRA, whose input is not
    rounded."""
    if "low_rank" not in params:
        return y
    down, up = low_rank_factors(params, x.dtype)
    return y + F.linear(F.linear(x, down), up)


def low_rank_factors(params: Params, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors down (rank, inputs, ...) and up (outputs, rank) of a layer's LoRA, in `dtype`."""
    return params["low_rank"]["down"].to(dtype), params["low_rank"]["up"].to(dtype)


@op
def linear_activation(params: Params, x: Tensor, activation: str) -> Tensor:
    """The hidden layer of an MLP: a linear layer, then one of `ACTIVATIONS`."""
    return ACTIVATIONS[activation](linear(params, x))


def mlp(params: Params, x: Tensor, activation: str) -> Tensor:
    """The linear layers "in" and "out" with one of `ACTIVATIONS` between them: x (..., inputs) -> (..., outputs)."""
    return linear(params["out"], linear_activation(params["in"], x, activation))


def dequantized_weight(params: Params, dtype: torch.dtype) -> Tensor:
    """The weight; dequantised and rounded once, to `dtype`, where it is stored with a scale; plain where pre-packed."""
    weight, scale = params["weight"], stored_scale(params)
    if scale is None:
        return weight.to_dense() if weight.is_mkldnn else weight
    return (weight.to(scale.dtype) * scale.reshape(-1, *[1] * (weight.ndim - 1))).to(dtype)


@op
def packed_weight(params: Params) -> Tensor:
    """The weight of a linear layer in the order in which `linear` reads it fastest; as it is where none is faster."""
    return params["weight"]


PRODUCTS = ("int8_scale", "float8_scale")
"""Names of the scales of weights whose products are computed in their own dtype."""
SCALES = ("scale", *PRODUCTS)
"""Names of the scale that a weight is stored with."""


def stored_scale(params: Params) -> Tensor | None:
    """The scale (outputs,) that a layer's weight is stored with, if any."""
    return next((params[name] for name in SCALES if name in params), None)


def rounded_input(params: Params, x: Tensor) -> Tensor:
    """The input of a layer's product: rounded where the product is of int8 or float8."""
    if "float8_scale" in params:
        return round_rows_to_float8(x)
    return round_rows(x) if "int8_scale" in params else x


def round_rows_to_float8(x: Tensor) -> Tensor:
    """x (..., inputs), each row scaled so that its largest absolute value is that of float8 (e4m3fn), and rounded
    (Micikevicius et al. 2022, "FP8 formats for deep learning"). Its gradient is that of x, as in `round_rows`."""
    numbers, steps = to_float8(x.detach())
    return x + (numbers.to(steps.dtype) * steps - x.detach().to(steps.dtype)).to(x.dtype)


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn of the shape of x, steps (..., 1), at least float32): their products are x, rounded."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    step = normal_step(wide.abs().amax(-1, keepdim=True) / FLOAT8_MAX)
    return (wide / step).to(torch.float8_e4m3fn), step


FLOAT8_MAX = 448.0
"""Largest number of float8_e4m3fn."""


def round_rows(x: Tensor) -> Tensor:
    """x (..., inputs), each row in 255 levels from minus to plus its largest absolute value: the input of a product in
    int8 (Dettmers et al. 2022, "LLM.int8()", section 2).

    Its gradient is that of x, as if nothing were rounded (Bengio et al. 2013, arXiv:1308.3432, "straight-through").
    """
    values = x.detach()
    wide = values.to(torch.promote_types(x.dtype, torch.float32))
    step = normal_step(wide.abs().amax(-1, keepdim=True) / INT8_MAX)
    return x + ((wide / step).round() * step - wide).to(x.dtype)


def normal_step(step: Tensor) -> Tensor:
    """Steps of rows, at least the least normal number: by a step of 0 or a subnormal one, which is a rounded one, a
    row's largest value would leave the range. NaN stays."""
    return step.clamp_min(torch.finfo(step.dtype).tiny)


INT8_MAX = 127.0
"""Largest absolute value of an int8 whose negative is one too."""


def split_outputs(params: Params, sizes: Sequence[int]) -> list[Params]:
    """A linear layer split by outputs into layers of `sizes` outputs: views, whose gradients join in one copy."""
    parts = {name: leaf.split(sizes) for name, leaf in params.items() if name != "low_rank"}
    layers = [dict(zip(parts, leaves, strict=True)) for leaves in zip(*parts.values(), strict=True)]
    if "low_rank" in params:
        down, ups = params["low_rank"]["down"], params["low_rank"]["up"].split(sizes)
        layers = [{**layer, "low_rank": {"down": down, "up": up}} for layer, up in zip(layers, ups, strict=True)]
    return layers


def cast(params: Params, dtype: torch.dtype) -> Params:
    """`tree.cast` by the one operation `cast_leaves`, which has a fused kernel forwards and backwards."""
    leaves, changed = tree.leaves(params), []
    for leaf in leaves:
        if leaf.is_floating_point() and leaf.dtype != dtype:
            changed.append(leaf)
    if not changed:
        return params
    converted = {id(leaf): new for leaf, new in zip(changed, cast_leaves(changed, dtype), strict=True)}
    return tree.map(lambda leaf: converted.get(id(leaf), leaf), params)


@op
def cast_leaves(leaves: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each leaf in `dtype`."""
    return [leaf.to(dtype) for leaf in leaves]


def conv2d_spec(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    init: spec.Initializer | None = None,
    axes: tuple[str, str] = ("channels", "channels"),
) -> Tree:
    """Weight (outputs, inputs, kernel, kernel) and bias (outputs,). axes: as in `linear_spec`."""
    fan_in = inputs * kernel * kernel
    weight = init or spec.fan_in_uniform(fan_in)
    return {
        "weight": Param((outputs, inputs, kernel, kernel), weight, (*axes, "kernel", "kernel")),
        "bias": Param((outputs,), spec.zeros if init else spec.fan_in_uniform(fan_in), axes[:1]),
    }


@op
def conv2d(params: Params, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """x (batch, inputs, height, width) -> (batch, outputs, ...)."""
    y = F.conv2d(x, dequantized_weight(params, x.dtype), params["bias"], stride=stride, padding=padding)
    if "low_rank" not in params:
        return y
    down, up = low_rank_factors(params, x.dtype)
    return y + F.conv2d(F.conv2d(x, down, stride=stride, padding=padding), up[:, :, None, None])


@op
def upsample_conv2d(params: Params, x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by 2, then the 3x3 convolution with padding 1."""
    return conv2d(params, F.interpolate(x, scale_factor=2.0, mode="nearest"), padding=1)


def residual_block_spec(inputs: int, outputs: int) -> Tree:
    """Parameters of `residual_block`, whose branch starts at zero; "shortcut" only where the channels change."""
    tree = {
        "norm1": norm_spec(inputs, axis="channels"),
        "conv1": conv2d_spec(inputs, outputs, 3),
        "norm2": norm_spec(outputs, axis="channels"),
        "conv2": conv2d_spec(outputs, outputs, 3, init=spec.zeros),
    }
    return tree if inputs == outputs else {**tree, "shortcut": conv2d_spec(inputs, outputs, 1)}


@op
def residual_block(params: Params, x: Tensor, groups: int, eps: float) -> Tensor:
    """Residual block with pre-activation (He et al. 2016): x + conv(silu(norm(conv(silu(norm(x)))))).

    Group norms and 3x3 convolutions; the optional "shortcut" is a 1x1 convolution of x.
    """
    h = conv2d(params["conv1"], group_norm_silu(params["norm1"], x, groups, eps), padding=1)
    h = conv2d(params["conv2"], group_norm_silu(params["norm2"], h, groups, eps), padding=1)
    return h + (conv2d(params["shortcut"], x) if "shortcut" in params else x)


def patches_linear(params: Params) -> Params:
    """A convolution whose stride equals its kernel, as a linear layer on flat patches (channels, height, width)."""
    flat = {**params, "weight": params["weight"].flatten(1)}
    if "low_rank" in params:
        flat["low_rank"] = {**params["low_rank"], "down": params["low_rank"]["down"].flatten(1)}
    return flat


def channels_last(params: Params) -> Params:
    """The tree with weights of convolutions in the memory format "channels_last", in which compiled code on a GPU and
    convolutions on a CPU read them; values and shapes are the same."""

    def leaf(value: Tensor) -> Tensor:
        return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value

    return tree.map(leaf, params)


@op
def image_layout(x: Tensor) -> Tensor:
    """x (batch, channels, height, width) in the memory format in which convolutions are fastest."""
    return x.contiguous()


def embedding_spec(entries: int, width: int, *, scale: float = 0.02, axis: str = "vocab") -> Tree:
    """Parameters of an embedding: a table (entries, width). axis: logical name of the entries, of `spec.AXES`."""
    return {"weight": Param((entries, width), spec.normal(scale), (axis, "width"))}


def embedding(params: Params, ids: Tensor) -> Tensor:
    """Rows of the embedding table: ids (...) int64 -> (..., width)."""
    table = params["weight"]
    if "added" not in params:
        return F.embedding(ids, table)
    # Not by one table of both, which would be copied at every call.
    rows, added = len(table), params["added"].to(table.dtype)
    known, new = F.embedding(ids.clamp_max(rows - 1), table), F.embedding((ids - rows).clamp_min(0), added)
    return torch.where((ids >= rows)[..., None], new, known)


def norm_spec(width: int, *, bias: bool = True, axis: str = "width") -> Tree:
    """Scale (ones) and, with `bias`, shift (zeros), both (width,): for layer, group and (without bias) RMS norm. axis:
    its logical name, of `spec.AXES`."""
    tree = {"weight": Param((width,), spec.ones, (axis,))}
    if bias:
        tree["bias"] = Param((width,), spec.zeros, (axis,))
    return tree


@op
def layer_norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """Layer norm (Ba et al. 2016) over the last axis; `params` may be empty: a norm without scale and shift.

    (x - mean) / sqrt(variance + eps) * weight + bias; statistics in float32 at least.
    """
    centred = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = centred - centred.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if "weight" in params:
        normed = normed * params["weight"]
    return (normed + params["bias"] if "bias" in params else normed).to(x.dtype)


@op
def rms_norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019); statistics in float32 at least.

    weight (x.shape[-1],).
    """
    upcast = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = upcast * torch.rsqrt(upcast.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * params["weight"]


@op
def group_norm(params: Params, x: Tensor, groups: int, eps: float) -> Tensor:
    """Group norm (Wu and He 2018) of x (batch, channels, ...); `groups` must divide channels."""
    if params["weight"].requires_grad and not x.requires_grad:
        # PyTorch 2.13 on a CPU crashes in the backward pass of a channels_last image that needs no gradient itself.
        x = x.contiguous()
    return F.group_norm(x, groups, params["weight"], params["bias"], eps)


@op
def group_norm_silu(params: Params, x: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU of the group norm."""
    return F.silu(group_norm(params, x, groups, eps))


@op
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift: the modulation of adaptive layer norm (Peebles and Xie 2023, arXiv:2212.09748)."""
    return torch.addcmul(shift, x, 1 + scale)


@op
def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch: a residual branch with a gate for each channel."""
    return torch.addcmul(x, gate, branch)


def gelu(x: Tensor) -> Tensor:
    """Exact (erf) GELU: CLIP-G."""
    return F.gelu(x)


@op
def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form: T5 and the MMDiT."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): CLIP-L."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_tanh": gelu_tanh}
"""Activation functions of an MLP, by name."""
