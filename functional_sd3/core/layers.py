"""Layers as pairs: `x_spec(...)` describes the parameters, `x(params, ...)` applies them.

Norm statistics are float32 where the input's dtype is narrower.

Beside its weight a linear or convolution layer may hold
- "scale" (outputs,): the weight is then stored in int8 or float8, and scale times the weight is what is meant;
- "low_rank", {"down": (rank, inputs, ...), "up": (outputs, rank)}: a LoRA, whose product is added to what the layer
  computes without being added to the weight;
- "packed", a `cpu.Packed`: the weight once more, as it is read fastest during one run.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import cpu, cuda, derivatives, spec, tree, winograd
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Params, Tree
from functional_sd3.core.watching import by_autograd, plain, unwatched

NAIVE_SUM = 1 << 16
"""Numbers of a group beyond which PyTorch's group norm of channels_last pictures, which adds them one after another on
a CPU, is wrong in the sixth decimal."""
NUMBERS_AT_ONCE = 1 << 17
"""Numbers summed together: what stays in a core's cache."""


def linear_spec(inputs: int, outputs: int, *, bias: bool = True, init=None, axes=("out", "in")) -> Tree:
    """Weight (outputs, inputs) and bias (outputs,); `init` replaces PyTorch's default weight (zero bias then)."""
    weight = init or spec.fan_in_uniform(inputs)
    tree = {"weight": Param((outputs, inputs), weight, axes)}
    if bias:
        tree["bias"] = Param((outputs,), spec.zeros if init else spec.fan_in_uniform(inputs), axes[:1])
    return tree


def linear(params: Params, x: Tensor) -> Tensor:
    """x (..., inputs) -> (..., outputs)."""
    # In this order: rows that are looked at while tracing would become a condition of the graph.
    if cpu.has_packed_linear(params, x):
        return cpu.packed_linear(params, x)
    if cpu.has_linear(params, x):
        if x.shape[:-1].numel() in cpu.ONE_DNN_ROWS:
            return cpu.linear(params, x)
        return cpu.product(x.flatten(0, -2), params["weight"], params.get("bias")).unflatten(0, x.shape[:-1])
    weight, bias = meant_weight(params, x.dtype), params.get("bias")
    if bias is None or x.ndim < 3:
        y = F.linear(x, weight, bias)
    else:
        # As a matrix: with the bias, three dimensions specialise shapes under compile(grad) and recompile at every
        # resolution, and a separate addition of the bias costs eager code another pass over the result.
        product = derivatives.linear if by_autograd(x, weight, bias) else F.linear
        y = product(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    if "low_rank" not in params:
        return y
    down, up = (params["low_rank"][name].to(x.dtype) for name in ("down", "up"))
    return y + F.linear(F.linear(x, down), up)


def linear_activation(params: Params, x: Tensor, activation: str) -> Tensor:
    """A linear layer and one of `ACTIVATIONS` of it: the hidden layer of an MLP.

    The largest tensor there is, on which PyTorch's GELU takes a third of the time of the product on a CPU: oneDNN
    computes it while the product is in the cache, where nothing is differentiated, mapped or traced.
    """
    chosen = ACTIVATIONS[activation]
    if cpu.has_linear(params, x):
        return cpu.linear(params, x, chosen.fused, chosen.algorithm, chosen.scale)
    if activation == "gelu_tanh" and cuda.has_linear_gelu_tanh(params, x):
        return cuda.linear_gelu_tanh(params, x)
    return chosen.over(linear(params, x))


def mlp(params: Params, x: Tensor, activation: str) -> Tensor:
    """The linear layers "in" and "out" with one of `ACTIVATIONS` between them: x (..., inputs) -> (..., outputs)."""
    both = [params["in"], params["out"]]
    if activation == "gelu_tanh" and all(layer.keys() == {"weight", "bias"} for layer in both):
        leaves = [layer[name] for layer in both for name in ("weight", "bias")]
        if by_autograd(x, *leaves):
            return derivatives.mlp(x.flatten(0, -2), *leaves).unflatten(0, x.shape[:-1])
    return linear(params["out"], linear_activation(params["in"], x, activation))


def meant_weight(params: Params, dtype: torch.dtype) -> Tensor:
    """The weight as it is, or, where it is stored with a scale, dequantised: rounded once, to `dtype`."""
    weight, scale = params["weight"], params.get("scale")
    if scale is None:
        return weight
    return (weight.to(scale.dtype) * scale.reshape(-1, *[1] * (weight.ndim - 1))).to(dtype)


def split_outputs(params: Params, sizes: Sequence[int]) -> list[Params]:
    """A linear layer as several, of `sizes` outputs each: views, whose gradients are joined in one copy."""
    parts = {name: leaf.split(sizes) for name, leaf in params.items() if name not in ("low_rank", "packed")}
    layers = [dict(zip(parts, leaves, strict=True)) for leaves in zip(*parts.values(), strict=True)]
    if "low_rank" in params:
        down, ups = params["low_rank"]["down"], params["low_rank"]["up"].split(sizes)
        layers = [{**layer, "low_rank": {"down": down, "up": up}} for layer, up in zip(layers, ups, strict=True)]
    return layers


def cast(params: Params, dtype: torch.dtype) -> Params:
    """`tree.cast` of a whole model, which a GPU does in a few kernels instead of one a leaf."""

    def changes(leaf: Tensor) -> bool:
        return leaf.is_floating_point() and leaf.dtype != dtype

    leaves = [leaf for leaf in tree.leaves(params) if changes(leaf)]
    if not cuda.has_cast(leaves):
        return tree.cast(params, dtype)
    found = iter(cuda.cast(leaves, dtype))
    return tree.map(lambda leaf: next(found) if changes(leaf) else leaf, params)


def conv2d_spec(inputs: int, outputs: int, kernel: int, *, init=None) -> Tree:
    """Weight (outputs, inputs, kernel, kernel) and bias (outputs,)."""
    fan_in = inputs * kernel * kernel
    return {
        "weight": Param(
            (outputs, inputs, kernel, kernel), init or spec.fan_in_uniform(fan_in), ("out", "in", None, None)
        ),
        "bias": Param((outputs,), spec.zeros if init else spec.fan_in_uniform(fan_in), ("out",)),
    }


def conv2d(params: Params, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """x (batch, inputs, height, width) -> (batch, outputs, ...)."""
    weight, bias = meant_weight(params, x.dtype), params["bias"]
    if _by_winograd(params, x, stride, padding):
        y = winograd.convolve(weight, bias, x)
    else:
        y = F.conv2d(x, weight, bias, stride=stride, padding=padding)
    if "low_rank" not in params:
        return y
    down, up = (params["low_rank"][name].to(x.dtype) for name in ("down", "up"))
    return y + F.conv2d(F.conv2d(x, down, stride=stride, padding=padding), up[:, :, None, None])


def conv2d_over(params: Params, fresh: Tensor, plus: Tensor | None = None) -> Tensor:
    """The 3x3 convolution with padding 1 of a picture that nobody else holds, in whose memory the result then is where
    it may; and `plus` added."""
    outputs, inputs = params["weight"].shape[:2]
    alone = "low_rank" not in params and (plus is None or plain(plus))
    if outputs == inputs and alone and _by_winograd(params, fresh):
        return winograd.convolve(meant_weight(params, fresh.dtype), params["bias"], fresh, plus=plus, over=True)
    found = conv2d(params, fresh, padding=1)
    return found if plus is None else add_over(found, plus)


def conv2d_doubled(params: Params, x: Tensor) -> Tensor:
    """The 3x3 convolution with padding 1 of x with every pixel twice a side."""
    if "low_rank" not in params and _by_winograd(params, x, scale=2):
        return winograd.convolve(meant_weight(params, x.dtype), params["bias"], x, scale=2)
    return conv2d(params, F.interpolate(x, scale_factor=2.0, mode="nearest"), padding=1)


def _by_winograd(params: Params, x: Tensor, stride: int = 1, padding: int = 1, scale: int = 1) -> bool:
    own = [leaf for name, leaf in params.items() if name != "low_rank"]
    return all(map(plain, (x, *own))) and winograd.pays(params["weight"], x, stride, padding, scale)


def patches_linear(params: Params) -> Params:
    """A convolution whose stride is its kernel as the linear layer it is on patches (channels, height, width)."""
    flat = {**params, "weight": params["weight"].flatten(1)}
    if "low_rank" in params:
        flat["low_rank"] = {**params["low_rank"], "down": params["low_rank"]["down"].flatten(1)}
    return flat


def embedding_spec(entries: int, width: int, *, scale: float = 0.02) -> Tree:
    """Table (entries, width)."""
    return {"weight": Param((entries, width), spec.normal(scale), ("vocab", "width"))}


def embedding(params: Params, ids: Tensor) -> Tensor:
    """ids (...) int64 -> (..., width)."""
    return F.embedding(ids, params["weight"])


def norm_spec(width: int, *, bias: bool = True) -> Tree:
    """Scale (ones) and, with `bias`, shift (zeros), both (width,): for layer, group and (without bias) RMS norm."""
    tree = {"weight": Param((width,), spec.ones, ("width",))}
    if bias:
        tree["bias"] = Param((width,), spec.zeros, ("width",))
    return tree


def layer_norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """Over the last axis; `params` may be empty (a norm without scale and shift)."""
    return F.layer_norm(x, x.shape[-1:], params.get("weight"), params.get("bias"), eps)


def rms_norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019); statistics in float32 at least."""
    weight = params["weight"]
    if cuda.has_rms_norm(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    if unwatched(x, weight):
        return derivatives.normed(x, weight, eps)[0]
    norm = derivatives.rms_norm if by_autograd(x, weight) else derivatives.rms_norm_formula
    return norm(x, weight, eps)


def group_norm(params: Params, x: Tensor, groups: int, eps: float) -> Tensor:
    """x (batch, channels, ...); `groups` must divide channels."""
    if _in_parts(params, x, groups):
        return _group_norm_in_parts(params, x, groups, eps, torch.empty_like(x))
    return F.group_norm(x, groups, params["weight"], params["bias"], eps)


def group_norm_silu(params: Params, x: Tensor, groups: int, eps: float, *, over: bool = False) -> Tensor:
    """SiLU of the group norm; `over`: nobody else holds x, whose memory may then be the result's."""
    if _in_parts(params, x, groups):
        return _group_norm_in_parts(params, x, groups, eps, x if over else torch.empty_like(x), silu=True)
    return silu_over(group_norm(params, x, groups, eps))


def _in_parts(params: Params, x: Tensor, groups: int) -> bool:
    if not unwatched(x, *params.values()) or x[0].numel() < NAIVE_SUM * groups:
        return False
    return x.ndim == 4 and x.shape[1] % groups == 0 and x.is_contiguous(memory_format=torch.channels_last)


def _group_norm_in_parts(
    params: Params, x: Tensor, groups: int, eps: float, into: Tensor, silu: bool = False
) -> Tensor:
    """Parts of a picture are summed while they are in the cache, about a mean that is nearly theirs; and so normed."""
    batch, channels, height, width = x.shape
    each = channels // groups

    def parts(x: Tensor) -> Sequence[Tensor]:
        pixels = x.permute(0, 2, 3, 1).view(batch, height * width, channels)
        return pixels.split(max(1, NUMBERS_AT_ONCE // channels), dim=1)

    given = parts(x)
    pivot = given[0].mean(1).view(batch, groups, each).mean(-1, keepdim=True)
    flat = pivot.expand(batch, groups, each).reshape(batch, 1, channels)
    sums = torch.zeros(2, batch, channels, dtype=torch.float64, device=x.device)
    for part in given:
        centred = part - flat
        sums += torch.stack([centred.sum(1), centred.square_().sum(1)])
    mean, square = sums.view(2, batch, groups, each).sum(-1) / (height * width * each)
    inverse = torch.rsqrt(square - mean.square() + eps).float()
    scale = params["weight"].view(groups, each) * inverse[..., None]
    shift = params["bias"].view(groups, each) - (mean + pivot[..., 0]).float()[..., None] * scale
    scale, shift = scale.view(batch, 1, channels), shift.view(batch, 1, channels)
    for part, place in zip(given, parts(into), strict=True):
        torch.addcmul(shift, part, scale, out=place)
        if silu:
            F.silu(place, inplace=True)
    return into


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b, broadcast."""
    by_hand = by_autograd(x, a, b, devices=("cpu", "cuda"))
    return (derivatives.add_product if by_hand else torch.addcmul)(x, a, b)


def silu_over(fresh: Tensor) -> Tensor:
    """x * sigmoid(x) of a tensor that nobody else holds, in its own memory where it is `plain`."""
    return F.silu(fresh, inplace=True) if plain(fresh) else F.silu(fresh)


def add_over(fresh: Tensor, other: Tensor) -> Tensor:
    """fresh + other, where nobody else holds `fresh`: in its own memory where both are `plain`."""
    return fresh.add_(other) if plain(fresh) and plain(other) else fresh + other


def multiply_over(fresh: Tensor, other: Tensor) -> Tensor:
    """fresh * other, where nobody else holds `fresh`: in its own memory where both are `plain`."""
    return fresh.mul_(other) if plain(fresh) and plain(other) else fresh * other


def gelu(x: Tensor) -> Tensor:
    """Exact (erf) GELU: CLIP-G."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form: T5 and the MMDiT."""
    if not torch.compiler.is_compiling() or x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    # (1 + tanh y) / 2 is sigmoid 2y, with which inductor takes 9.3 ms of 4 million numbers, with tanh 11.9.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cubic = wide * (1 + 0.044715 * wide.square())
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * cubic)).to(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): CLIP-L."""
    return x * torch.sigmoid(_QUICK * x)


# A tensor that nobody else holds is overwritten where it is `plain`: a second one of its size costs page faults.
def _gelu_over(fresh: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(fresh) if plain(fresh) else gelu(fresh)


def _gelu_tanh_over(fresh: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(fresh, approximate="tanh") if plain(fresh) else gelu_tanh(fresh)


def _quick_gelu_over(fresh: Tensor) -> Tensor:
    if not plain(fresh):
        return quick_gelu(fresh)
    return F.silu(fresh.mul_(_QUICK), inplace=True).mul_(1 / _QUICK)


_QUICK = 1.702


class Activation(NamedTuple):
    """over: of a tensor that nobody else holds; fused, algorithm: oneDNN's names for f, with activation(x) =
    f(scale x) / scale."""

    over: Callable[[Tensor], Tensor]
    fused: str
    algorithm: str
    scale: float = 1.0


ACTIVATIONS = {
    "quick_gelu": Activation(_quick_gelu_over, "swish", "", _QUICK),
    "gelu": Activation(_gelu_over, "gelu", "none"),
    "gelu_tanh": Activation(_gelu_tanh_over, "gelu", "tanh"),
}
"""What stands between the two layers of an MLP."""
