"""Weights stored in one byte each: int8 or float8, with a scale for every output channel; and products of int8.

The weights of the linear and convolution layers inside blocks, where nearly all parameters are, become {"weight": int8
or float8_e4m3fn, "scale": (outputs,)}; scale times weight is the weight, and every `apply` reads such trees
unchanged: `layers` dequantise one weight at a time. The scale takes an output's largest weight to the largest number of
the format (Dettmers et al. 2022, "LLM.int8()", section 2; Micikevicius et al. 2022, "FP8 formats for deep learning").

With `compute="int8"` the scale of a linear layer is "int8_scale": the product itself is then of int8, of the weight and
of the layer's input, each of whose rows is rounded by its own largest value when it comes (`layers.round_rows`).
`compute="float8"` ("float8_scale") does so with weights of float8, on GPUs that multiply it (Ada, Hopper, Blackwell).
`product_errors` measures what that costs on inputs of one's own; `without_products` takes it back layer by layer, and
`with_floats` the rounding of weights, too, as `error_budget` does where a velocity is off by too much.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from functional_sd3.core import layers, tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.lora.keys import adaptable
from functional_sd3.weights import merge
from functional_sd3.weights.merge import Change

_ENDINGS = tuple(f".{name}" for name in layers.SCALES)
MAX_VALUE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Format -> its largest number."""


COMPUTED = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
"""Products -> the dtype of their weights."""
SMALLEST_PRODUCT = 1 << 16
"""Least size of a weight whose product is computed in a byte: of a smaller one rounding its input costs what it saves
on every processor that was measured (`kernels.narrow.TABLE`)."""
ONE_ROW = ("modulation",)
"""Names of layers that are applied to one row of each sample, for all steps of a run at once: their products take
little of its time, and a rounded input moves all tokens (in int8 a quarter of the velocity's squared error on
params/tiny)."""


def quantize(
    params: Params,
    dtype: torch.dtype = torch.int8,
    *,
    targets: tree.Chooser = "*",
    keep: tree.Chooser = (),
    compute: str | None = None,
    smallest: int | None = None,
) -> Params:
    """The tree with the weights that `targets` chooses, of those inside blocks, stored as `dtype`.

    The scales have the dtype that the weights had; all other leaves, and weights that are quantised already, stay.
    keep: weights that stay floats, of those that `targets` chooses.
    compute: "int8" or "float8", as `dtype` is, for products of it of the chosen linear layers that have at least
    `smallest` weights (by default `SMALLEST_PRODUCT`) and are not of `ONE_ROW`; of the rest, and with None, weights are
    dequantised where they are used. Derivatives are those of the dequantised weights.
    Raises ValueError for another dtype, for targets that choose nothing, and for values that are not finite.
    """
    if dtype not in MAX_VALUE:
        raise ValueError(f"dtype {dtype} must be one of {', '.join(map(str, MAX_VALUE))}")
    if compute is not None and COMPUTED.get(compute) != dtype:
        raise ValueError(f"compute {compute!r} with dtype {dtype} must be None, or that of the dtype: {_computed()}")
    able = lambda path, leaf: inside_blocks(path, leaf.ndim) and leaf.dtype.itemsize > 1  # noqa: E731
    chosen = {path for path, leaf in tree.select(params, targets).items() if able(path, leaf)}
    chosen -= tree.select(params, keep).keys()
    if not chosen:
        raise ValueError(_nothing_chosen(params, targets, keep))
    quantized = lambda path, one: _quantized(path, one, dtype) if path + ".weight" in chosen else one  # noqa: E731
    stored = _layers(params, quantized)
    if compute is None:
        return stored
    return _with_products(stored, chosen, SMALLEST_PRODUCT if smallest is None else smallest, f"{compute}_scale")


def _nothing_chosen(params: Params, targets: tree.Chooser, keep: tree.Chooser) -> str:
    stored = {path for path in tree.select(params, targets) if path.endswith(_ENDINGS)}
    if is_quantized(params) and (stored or targets == "*"):
        return (
            f"targets {targets!r} choose no weight of a layer inside blocks that is not stored in a byte already: for "
            "another format `quantize.dequantize` them first, or load them without quantized=True"
        )
    kept = f" that keep {keep!r} leaves" if keep else ""
    return f"targets {targets!r} choose no weight of a layer inside blocks{kept}"


def _computed() -> str:
    return " or ".join(f"{name!r} with {dtype}" for name, dtype in COMPUTED.items())


def without_products(params: Params, paths: Collection[str] | None = None) -> Params:
    """The tree without products of int8, or without those of the weights at `paths`: they are dequantised instead."""

    def change(path: str, layer: Params) -> Params:
        if not any(name in layer for name in layers.PRODUCTS) or (paths is not None and path + ".weight" not in paths):
            return layer
        return {"scale" if name in layers.PRODUCTS else name: leaf for name, leaf in layer.items()}

    return _layers(params, change)


def with_floats(params: Params, floats: Params, paths: Collection[str]) -> Params:
    """The tree with the weights at `paths` as `floats` has them, without scales. Raises ValueError for a path that is
    stored with no scale."""
    missing = set(paths) - {f"{path.rpartition('.')[0]}.weight" for path in stored_scales(params)}
    if missing:
        raise ValueError(f"{min(missing)} is not stored with a scale")
    before = {path: leaf for path, leaf in tree.flatten_paths(floats).items() if path in paths}

    def change(path: str, layer: Params) -> Params:
        if path + ".weight" not in before:
            return layer
        bare = {name: leaf for name, leaf in layer.items() if name not in layers.SCALES}
        return {**bare, "weight": before[path + ".weight"]}

    return _layers(params, change)


def stored_scales(params: Params) -> list[str]:
    """Paths of the scales of all weights that are stored with one."""
    return [path for path in tree.flatten_paths(params) if path.endswith(_ENDINGS)]


def has_products(params: Params, *computes: str) -> bool:
    """True if any layer's product is computed in one of `computes`, by default "int8" and "float8"."""
    names = [f"{compute}_scale" for compute in computes or COMPUTED]
    return any(path.rpartition(".")[2] in names for path in tree.flatten_paths(params))


def dequantize(params: Params) -> Params:
    """The tree without scales: every weight in the dtype that its scale has."""
    return _layers(params, lambda path, one: one if layers.stored_scale(one) is None else _dequantized(one))


def is_quantized(params: Params) -> bool:
    """True if any weight is stored with a scale."""
    return bool(stored_scales(params))


def errors(params: Params, quantized: Params) -> list[Change]:
    """Quantization error, one row for each weight that is stored with a scale: `relative` to the weight's norm."""
    before, after = tree.flatten_paths(params), tree.flatten_paths(quantized)
    rows = []
    for path in after:
        if path.endswith(_ENDINGS):
            place = path.rpartition(".")[0] + ".weight"
            dequantized = layers.dequantized_weight({"weight": after[place], "scale": after[path]}, torch.float32)
            rows.append(merge.diff({"weight": before[place]}, {"weight": dequantized})[0]._replace(path=place))
    return rows


def inside_blocks(path: str, ndim: int) -> bool:
    """True for the weight of a linear or convolution layer inside a block."""
    return "blocks" in path.split(".") and adaptable(path, ndim)


def _quantized(path: str, layer: Params, dtype: torch.dtype) -> Params:
    weight = layer["weight"]
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    largest = wide.flatten(1).abs().amax(1)
    if not (weight.is_meta or torch.isfinite(largest).all()):
        raise ValueError(f"{path}.weight has values that are not finite")
    # Rounded as it is stored, before it is divided by; a row of zeros has any scale.
    scale = torch.where(largest > 0, largest / MAX_VALUE[dtype], 1.0).to(weight.dtype)
    # Subnormal scales, of float16 those of weights below 0.008, may be rounded so far down that weights are cut off.
    least = torch.finfo(weight.dtype).tiny * torch.finfo(weight.dtype).eps
    scale = torch.where(scale.to(wide.dtype) * (MAX_VALUE[dtype] + 0.5) < largest, scale + least, scale)
    units = wide / scale.to(wide.dtype).reshape(-1, *[1] * (wide.ndim - 1))
    units = units.clamp(-MAX_VALUE[dtype], MAX_VALUE[dtype])
    return {**layer, "weight": (units.round() if dtype == torch.int8 else units).to(dtype), "scale": scale}


def _dequantized(layer: Params) -> Params:
    scale = layers.stored_scale(layer)
    weight = layers.dequantized_weight(layer, layer["weight"].dtype if scale is None else scale.dtype)
    return {name: weight if name == "weight" else leaf for name, leaf in layer.items() if name not in layers.SCALES}


def _with_products(params: Params, chosen: Collection[str], smallest: int, product: str) -> Params:
    """The tree with `product` as the scale of the chosen linear layers that are large enough."""

    def change(path: str, layer: Params) -> Params:
        weight = layer["weight"]
        is_one_row = path.rpartition(".")[2] in ONE_ROW
        if path + ".weight" not in chosen or weight.ndim != 2 or weight.numel() < smallest or is_one_row:
            return layer
        return {product if name == "scale" else name: leaf for name, leaf in layer.items()}

    return _layers(params, change)


def _layers(params: Tree, change: Callable[[str, Params], Params], path: str = "") -> Tree:
    """The tree with `change(path, layer)` for every dict that has a weight."""
    if isinstance(params, list):
        return [_layers(child, change, f"{path}.{index}" if path else str(index)) for index, child in enumerate(params)]
    if not isinstance(params, dict):
        return params
    children = {name: _layers(child, change, f"{path}.{name}" if path else name) for name, child in params.items()}
    return change(path, children) if isinstance(children.get("weight"), Tensor) else children
