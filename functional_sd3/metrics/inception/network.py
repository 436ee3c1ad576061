"""The Inception network of the Frechet inception distance as a pure function.

Szegedy et al. 2015, "Rethinking the Inception Architecture", as trained for TensorFlow on 2015-12-05 and used by
Heusel et al. 2017; pytorch-fid and torch-fidelity are the references. It is not torchvision's `inception_v3`: average
pools exclude the padding, the pool of the last block takes the maximum, there are 1008 classes and no second head.
Parameters are named as in `pt_inception-2015-12-05-6726825d.pth`, so a file holds the tree as it is.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import layers, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Key, Params, Tree

SIZE = 299
"""Height and width of the images."""
TAPS = (64, 192, 768, 2048)
"""Layers whose features are returned, named by their width."""
CLASSES = 1008

_EPS = 1e-3


class Unit(NamedTuple):
    """Convolution without bias, batch norm by stored statistics, ReLU."""

    name: str
    outputs: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)


class Pool(NamedTuple):
    """A pooling function."""

    apply: Callable[[Tensor], Tensor]


class Branches(NamedTuple):
    """Sequences of steps that all read the same input; their outputs are joined along the channels."""

    steps: tuple[tuple["Step", ...], ...]


class Block(NamedTuple):
    """Branches whose parameters lie under a name of their own."""

    name: str
    branches: Branches


class Tap(NamedTuple):
    """Features: the mean over all pixels of the activations here."""

    width: int


Step = Unit | Pool | Branches | Block | Tap


def spec() -> Tree:
    """The parameter tree: 472 leaves, 23,885,392 parameters. The norms' leaves are `bn.running_mean` and so on."""
    params: Tree = {}
    channels = _add_specs(params, _NETWORK, 3)
    return params | {"fc": layers.linear_spec(channels, CLASSES, axes=("classes", "channels"))}


def init(key: Key, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
    """Random parameters (He et al. 2015 for the convolutions): for tests, as scores need the trained ones."""
    return specs.init(key, spec(), dtype=dtype, device=device)


def apply(params: Params, images: Tensor, *, last: int = TAPS[-1]) -> dict[int | str, Tensor]:
    """Features of images (batch, 3, 299, 299), float in [-1, 1].

    Returns the taps 64, 192, 768 and 2048, each (batch, tap), averaged over the pixels, and "logits" (batch, 1008),
    in the dtype of the parameters; with a smaller `last` only the taps as far as that one, and no more work than they
    take. Packages differ in how they resize and scale images to these, which changes the scores: see `preprocess`.
    Raises ValueError for another shape, for integers and for a tap that does not exist.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise ValueError(f"images {list(images.shape)} must be (batch, 3, {SIZE}, {SIZE}); resize them first")
    if not images.is_floating_point():
        raise ValueError(f"images of dtype {images.dtype} must be floating, in [-1, 1]")
    if last not in TAPS:
        raise ValueError(f"last {last} must be one of {TAPS}")
    images = layers.image_layout(images.to(params["fc"]["weight"].dtype))
    features: dict[int | str, Tensor] = {}
    _apply_steps(params, _NETWORK[: _NETWORK.index(Tap(last)) + 1], images, features)
    if last != TAPS[-1]:
        return features
    return features | {"logits": layers.linear(params["fc"], features[TAPS[-1]])}


def unbiased(params: Params, logits: Tensor) -> Tensor:
    """Logits (batch, 1008) without the last layer's bias, from which the inception score is computed by convention."""
    return logits - params["fc"]["bias"]


def fingerprint(params: Params) -> str:
    """SHA-256 (hex) of the parameters as float32, whatever kind of file they came from."""
    import hashlib

    digest = hashlib.sha256()
    for path, leaf in sorted(tree.flatten_paths(params).items()):
        digest.update(f"{path}{list(leaf.shape)}".encode())
        digest.update(leaf.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def _add_specs(params: Tree, steps: tuple[Step, ...], channels: int) -> int:
    """Add the specs of `steps` to the new tree `params`; returns the number of output channels."""
    for step in steps:
        if isinstance(step, Unit):
            params[step.name] = _unit_spec(step, channels)
            channels = step.outputs
        elif isinstance(step, Block):
            params[step.name] = {}
            channels = _add_specs(params[step.name], (step.branches,), channels)
        elif isinstance(step, Branches):
            channels = sum(_add_specs(params, branch, channels) for branch in step.steps)
    return channels


def _unit_spec(unit: Unit, inputs: int) -> Tree:
    shape, axes = (unit.outputs, inputs, *unit.kernel), ("channels", "channels", "kernel", "kernel")
    per_channel = {"weight": specs.ones, "bias": specs.zeros, "running_mean": specs.zeros, "running_var": specs.ones}
    return {
        "conv": {"weight": Param(shape, specs.normal(math.sqrt(2 / math.prod(shape[1:]))), axes)},
        "bn": {name: Param((unit.outputs,), start, axes[:1]) for name, start in per_channel.items()},
    }


def _apply_steps(params: Params, steps: tuple[Step, ...], x: Tensor, features: dict[int | str, Tensor]) -> Tensor:
    """Output of `steps`; the features at their taps are added to the new dict `features`."""
    for step in steps:
        if isinstance(step, Unit):
            x = _unit(params[step.name], step, x)
        elif isinstance(step, Pool):
            x = step.apply(x)
        elif isinstance(step, Tap):
            features[step.width] = x.mean((2, 3))
        elif isinstance(step, Block):
            x = _apply_steps(params[step.name], (step.branches,), x, features)
        else:
            x = torch.cat([_apply_steps(params, branch, x, features) for branch in step.steps], 1)
    return x


def _unit(params: Params, unit: Unit, x: Tensor) -> Tensor:
    # The norm is linear and folded into the convolution, which saves two passes over every activation.
    norm = params["bn"]
    scale = norm["weight"] * torch.rsqrt(norm["running_var"] + _EPS)
    weight = params["conv"]["weight"] * scale[:, None, None, None]
    x = F.conv2d(x, weight, norm["bias"] - norm["running_mean"] * scale, unit.stride, unit.padding)
    return F.relu(x, inplace=True)


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


def _same(name: str, outputs: int, height: int, width: int) -> Unit:
    """A unit that keeps the size."""
    return Unit(name, outputs, (height, width), padding=(height // 2, width // 2))


def _chain(names: str, *shapes: tuple[int, int, int]) -> tuple[Unit, ...]:
    """Units `names_1`, `names_2`, ... of (outputs, height, width) that keep the size."""
    return tuple(_same(f"{names}_{index}", *shape) for index, shape in enumerate(shapes, 1))


def _halving(branch: tuple[Unit, ...]) -> tuple[Unit, ...]:
    return (*branch[:-1], branch[-1]._replace(stride=2, padding=(0, 0)))


def _block_a(name: str, pooled: int) -> Block:
    one = (_same("branch1x1", 64, 1, 1),)
    five = _chain("branch5x5", (48, 1, 1), (64, 5, 5))
    three = _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))
    return Block(name, Branches((one, five, three, (Pool(_mean), _same("branch_pool", pooled, 1, 1)))))


def _block_b(name: str) -> Block:
    three = _halving((_same("branch3x3", 384, 3, 3),))
    double = _halving(_chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)))
    return Block(name, Branches((three, double, (Pool(_halve),))))


def _block_c(name: str, inner: int) -> Block:
    one = (_same("branch1x1", 192, 1, 1),)
    seven = _chain("branch7x7", (inner, 1, 1), (inner, 1, 7), (192, 7, 1))
    double = _chain("branch7x7dbl", (inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7))
    return Block(name, Branches((one, seven, double, (Pool(_mean), _same("branch_pool", 192, 1, 1)))))


def _block_d(name: str) -> Block:
    three = _halving(_chain("branch3x3", (192, 1, 1), (320, 3, 3)))
    seven = _halving(_chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)))
    return Block(name, Branches((three, seven, (Pool(_halve),))))


def _block_e(name: str, pool: Callable[[Tensor], Tensor]) -> Block:
    def fork(names: str) -> Branches:
        return Branches(((_same(f"{names}a", 384, 1, 3),), (_same(f"{names}b", 384, 3, 1),)))

    one = (_same("branch1x1", 320, 1, 1),)
    three = (_same("branch3x3_1", 384, 1, 1), fork("branch3x3_2"))
    double: tuple[Step, ...] = (*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), fork("branch3x3dbl_3"))
    return Block(name, Branches((one, three, double, (Pool(pool), _same("branch_pool", 192, 1, 1)))))


_NETWORK: tuple[Step, ...] = (
    Unit("Conv2d_1a_3x3", 32, (3, 3), stride=2),
    Unit("Conv2d_2a_3x3", 32, (3, 3)),
    _same("Conv2d_2b_3x3", 64, 3, 3),
    Pool(_halve),
    Tap(64),
    Unit("Conv2d_3b_1x1", 80, (1, 1)),
    Unit("Conv2d_4a_3x3", 192, (3, 3)),
    Pool(_halve),
    Tap(192),
    _block_a("Mixed_5b", 32),
    _block_a("Mixed_5c", 64),
    _block_a("Mixed_5d", 64),
    _block_b("Mixed_6a"),
    _block_c("Mixed_6b", 128),
    _block_c("Mixed_6c", 160),
    _block_c("Mixed_6d", 160),
    _block_c("Mixed_6e", 192),
    Tap(768),
    _block_d("Mixed_7a"),
    _block_e("Mixed_7b", _mean),
    # Maximum, not mean, as in the original graph, by which every published score was computed.
    _block_e("Mixed_7c", _maximum),
    Tap(2048),
)
