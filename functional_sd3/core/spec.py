"""A parameter tree described once: every leaf a `Param` of shape, initialiser and logical axes.

Initialisation, loading, counting, sharding and LoRA targets derive from the same description, which holds no tensors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Params, Tree

Initializer = Callable[[Key, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Elementwise:
    """An initialiser whose elements depend on the key and their position alone, so that a part of a leaf can be drawn
    without the rest (`prng.Part`)."""

    draw: Initializer

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Tensor:
        return self.draw(key, shape)


AXES = {
    "width": "features of the stream of tokens that a network's blocks add to",
    "heads": "attention heads one after another: head_dim features of each, or one number of each",
    "qkv": "queries, keys and values of a fused layer, each like heads",
    "key_value": "keys and values of a fused layer, each like heads",
    "head_dim": "features of one attention head",
    "hidden": "features between the two layers of an MLP",
    "gated": "gates and values of a fused gated layer, each like hidden",
    "modulation": "shifts, scales and gates (adaLN), each like width",
    "frequencies": "sinusoids of a time",
    "context": "features of a token of the embedded prompt",
    "pooled": "features of the pooled prompt",
    "vocab": "entries of a vocabulary",
    "positions": "entries of a table of positions: tokens, patches, or buckets of distances",
    "queries": "learned tokens (IP-Adapter)",
    "features": "features of an image encoder, or of the space that two encoders project to",
    "channels": "channels of an image, of latents or of a convolution",
    "patch": "numbers of one patch of the latents",
    "kernel": "height or width of a convolution's kernel",
    "classes": "logits of a classifier",
    "rank": "rank of a LoRA",
    "out": "outputs of a layer of no network of this library",
    "in": "inputs of a layer of no network of this library",
}
"""Logical axes: name -> what lies along it. An axis that is never divided has the name None."""

FUSED = {"qkv": ("heads", 3), "key_value": ("heads", 2), "gated": ("hidden", 2)}
"""Axes that hold several matrices of equal size one after another: name -> (the axis of each of them, how many). A
division of the heads or the hidden features among processes divides each of them."""


@dataclass(frozen=True)
class Param:
    """One leaf: shape, initialiser (`(key, shape) -> float32 tensor`), and a logical name of `AXES` for each axis.

    trainable=False: a table that is stored with the weights but not learned (SD3's positions).
    """

    shape: tuple[int, ...]
    init: Initializer
    axes: tuple[str | None, ...]
    trainable: bool = True

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"axes {self.axes} must name each of the {len(self.shape)} dimensions of {self.shape}")


@Elementwise
def zeros(key: Key, shape: tuple[int, ...]) -> Tensor:
    """Every element 0; the key is not used."""
    return torch.zeros(shape, device=key.device, dtype=torch.float32)


@Elementwise
def ones(key: Key, shape: tuple[int, ...]) -> Tensor:
    """Every element 1; the key is not used."""
    return torch.ones(shape, device=key.device, dtype=torch.float32)


def constant(value: float) -> Initializer:
    """Every element `value`."""
    return Elementwise(lambda key, shape: torch.full(shape, value, dtype=torch.float32, device=key.device))


def normal(scale: float) -> Initializer:
    """Gaussian with standard deviation `scale`."""
    return Elementwise(lambda key, shape: scale * prng.normal(key, shape))


def fan_in_uniform(fan_in: int) -> Initializer:
    """Uniform in +-1/sqrt(fan_in): PyTorch's own default for linear and convolution weights and biases."""
    bound = 1.0 / math.sqrt(fan_in)
    return Elementwise(lambda key, shape: bound * (2.0 * prng.uniform(key, shape) - 1.0))


def xavier_uniform(fan_in: int, fan_out: int) -> Initializer:
    """Uniform with variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010, equation 16)."""
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    return Elementwise(lambda key, shape: bound * (2.0 * prng.uniform(key, shape) - 1.0))


def map_params(fn: Callable[[str, Param], Any], spec: Tree, path: str = "") -> Tree:
    """The tree of `fn(path, param)` for every leaf of a spec."""
    if isinstance(spec, Param):
        return fn(path, spec)
    prefix = path + "." if path else ""
    if isinstance(spec, dict):
        return {name: map_params(fn, child, prefix + name) for name, child in spec.items()}
    return [map_params(fn, child, f"{prefix}{index}") for index, child in enumerate(spec)]


def paths(spec: Tree) -> dict[str, Param]:
    """Every leaf by its dotted path, in the order of the tree."""
    params: dict[str, Param] = {}
    map_params(params.__setitem__, spec)
    return params


def count(spec: Tree) -> int:
    """Number of parameters; costs no memory whatever the size."""
    return sum(math.prod(param.shape) for param in paths(spec).values())


def init(key: Key, spec: Tree, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
    """Initial parameters of a spec, each leaf from a separate key; `device="meta"` allocates nothing."""
    if torch.device(device).type == "meta":
        return map_params(lambda path, param: torch.empty(param.shape, dtype=dtype, device="meta"), spec)
    keys = leaf_keys(key.to(device), spec)
    return map_params(lambda path, param: param.init(keys[path], param.shape).to(dtype), spec)


def leaf_keys(key: Key, spec: Tree) -> dict[str, Key]:
    """The key of each leaf, by path, from which `init` draws it."""
    names = list(paths(spec))
    return dict(zip(names, prng.split(key, max(len(names), 1)), strict=False))


def check(spec: Tree, tensors: dict[str, Any]) -> list[str]:
    """Missing, unexpected and misshapen leaves of `tensors` (path -> anything with a `.shape`) against the spec.

    Returns one sentence for each problem, naming the path; empty when they fit.
    """
    wanted = paths(spec)
    problems = [f"{path} is missing (shape {list(wanted[path].shape)})" for path in wanted if path not in tensors]
    problems += [f"{path} is unexpected{_closest(path, wanted)}" for path in tensors if path not in wanted]
    for path, param in wanted.items():
        if path in tensors and tuple(tensors[path].shape) != param.shape:
            problems.append(f"{path} has shape {list(tensors[path].shape)}, expected {list(param.shape)}")
    return problems


def _closest(path: str, wanted: dict[str, Param]) -> str:
    import difflib

    matches = difflib.get_close_matches(path, wanted, n=1, cutoff=0.8)
    return f" (closest known: {matches[0]})" if matches else ""
