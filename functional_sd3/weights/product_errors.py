"""Errors of products of int8 or float8, layer by layer, on inputs that layers have in a run of one's own."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import layers, tree
from functional_sd3.core.types import Params


def product_errors(params: Params, quantized: Params, run: Callable[[Params], object]) -> dict[str, float]:
    """|W^ x^ - W x| / |W x| of every layer whose product `quantized` computes so, by the path of its weight: norms
    over all its inputs x in `run(params)`, x^ and W^ rounded.

    params: of floats, which are what the run computes with, so that no layer's error enters the inputs of another.
    quantized: their `quantize(..., compute=...)`. Layers that the run does not apply are left out.
    """
    sums: dict[str, Tensor] = {}
    stored = tree.flatten_paths(quantized)

    def watched(path: str, leaf: Tensor) -> Tensor:
        layer = path.removesuffix("weight")
        product = next((name for name in layers.PRODUCTS if layer + name in stored), None)
        if product is None:
            return leaf
        scale = stored[layer + product]
        rounded = layers.dequantized_weight({"weight": stored[path], "scale": scale}, leaf.dtype)
        return _Watched.of(path, leaf, rounded, sums, {product: scale})

    with torch.no_grad():
        run(tree.map_with_path(watched, params))
    return {path: math.sqrt(float(error / exact)) if exact > 0 else 0.0 for path, (error, exact) in sums.items()}


class _Watched(Tensor):
    """A weight whose products are compared with those of its rounded form; parts of it are watched, too."""

    path: str
    exact: Tensor
    rounded: Tensor
    sums: dict[str, Tensor]
    scales: Params

    @classmethod
    def of(cls, path: str, exact: Tensor, rounded: Tensor, sums: dict[str, Tensor], scales: Params) -> "_Watched":
        watched = exact.detach().as_subclass(cls)
        watched.path, watched.exact, watched.rounded, watched.sums = path, exact, rounded, sums
        watched.scales = scales
        return watched

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        own = next(each for each in args if isinstance(each, cls))
        result = func(*(each.exact if isinstance(each, cls) else each for each in args), **kwargs)
        if func is F.linear:
            x, bias = args[0], args[2] if len(args) > 2 else kwargs.get("bias")
            product = result if bias is None else result - bias
            error = F.linear(layers.rounded_input(own.scales, x), own.rounded) - product
            total = torch.stack([each.double().square().sum() for each in (error, product)])
            own.sums[own.path] = own.sums.get(own.path, 0) + total
        elif func in (Tensor.split, Tensor.chunk):
            parts = func(*(each.rounded if isinstance(each, cls) else each for each in args), **kwargs)
            return tuple(
                cls.of(own.path, exact, rounded, own.sums, own.scales)
                for exact, rounded in zip(result, parts, strict=True)
            )
        return result
