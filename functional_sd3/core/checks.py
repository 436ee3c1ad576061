"""Checks of arguments at the boundary: ValueErrors that name the argument, before a kernel raises its own."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core.dispatch import tracking
from functional_sd3.core.types import Params


def check_floating(name: str, x: object, meaning: str = "") -> None:
    """Raises ValueError unless x is a tensor of a floating dtype; `meaning` completes "must be floating"."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is {_short_repr(x)}, not a tensor; it must be a floating tensor{meaning}")
    if not x.is_floating_point():
        raise ValueError(f"{name} of dtype {x.dtype} must be floating{meaning}")


def check_channels(name: str, x: object, channels: int) -> None:
    """Raises ValueError unless x is a tensor (batch, channels, height, width)."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is {_short_repr(x)}, not a tensor; it must be (batch, {channels}, height, width)")
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} of shape {list(x.shape)} must be (batch, {channels}, height, width)")


def check_dtype(name: str, x: Tensor, layer: Params) -> None:
    """Raises ValueError where x has another dtype than the weight of `layer`, the layer that reads it."""
    weight = layer["weight"]
    # A weight that is stored with a scale is dequantized to the dtype of x, and autocast chooses dtypes itself.
    if layers.stored_scale(layer) is not None or weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return
    raise ValueError(f"{name} of dtype {x.dtype} must have the parameters' dtype, {weight.dtype}: {name}.to(...)")


def check_component(function: str, name: str, params: object, leaf: str, config: object, field: str) -> None:
    """Raises ValueError unless params have `leaf`, and config has `field`, as those of one component do.

    The tree or the config of a whole model is given most often instead; `name` is what the component has in both.
    """
    if not isinstance(params, Mapping) or leaf not in params:
        what = f"of {list(params)[:8]}" if isinstance(params, Mapping) else f"a {type(params).__name__}"
        raise ValueError(
            f"params are {what}, without {leaf!r}: {function} takes those of {name}, model.params[{name!r}]"
        )
    if not hasattr(config, field):
        kind = type(config)
        raise ValueError(
            f"config is a {kind.__module__}.{kind.__qualname__}, without {field!r}: {function} takes that of {name}, "
            f"model.config.{name}"
        )


def check_ids(name: str, ids: object) -> None:
    """Raises ValueError unless ids are a tensor of integers that an embedding reads."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} are {_short_repr(ids)}, not a tensor; they must be an int64 tensor of token ids")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} of dtype {ids.dtype} must be int64: token ids, as the tokenizers return them")


def check_time(t: object) -> None:
    """Raises ValueError unless t is a floating tensor; and for a timestep of 0 to 1000 where its value can be read."""
    if not isinstance(t, Tensor):
        text = _short_repr(t)
        raise ValueError(f"t is {text}, not a tensor: give torch.tensor({text}), in [0, 1], 1 = noise")
    if not t.is_floating_point():
        raise ValueError(f"t of dtype {t.dtype} must be floating, in [0, 1], 1 = noise: a timestep divided by 1000")
    # Differences of a velocity in t may step over the ends: only what can be no such time is refused.
    if t.device.type == "cpu" and tracking(t) in ("none", "autograd") and (t.detach().abs() > 2).any():
        largest = t.detach().abs().max().item()
        raise ValueError(f"t of {largest:g} must be in [0, 1], 1 = noise: a timestep divided by 1000")


def function_name(function: object) -> str:
    """module.name of a function, of the function of a partial, or of the class of any other callable."""
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _short_repr(x: object) -> str:
    text = repr(x)
    return text if len(text) <= 60 else f"a {type(x).__name__}"
