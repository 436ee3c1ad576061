"""Arguments refused at the boundary, in words that name them, before a kernel refuses them in its own."""

import torch
from torch import Tensor

from functional_sd3.core.types import Params


def check_floating(name: str, x: object, meaning: str = "") -> None:
    """Raises ValueError unless x is a tensor of a floating dtype; `meaning` completes "must be floating"."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is {_shown(x)}, not a tensor; it must be a floating tensor{meaning}")
    if not x.is_floating_point():
        raise ValueError(f"{name} of dtype {x.dtype} must be floating{meaning}")


def check_dtype(name: str, x: Tensor, layer: Params) -> None:
    """Raises ValueError where x has another dtype than the weight of `layer`, the layer that reads it."""
    weight = layer["weight"]
    # A weight that is stored with a scale is dequantized to the dtype of x, and autocast chooses dtypes itself.
    if "scale" in layer or weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return
    raise ValueError(f"{name} of dtype {x.dtype} must have the parameters' dtype, {weight.dtype}: {name}.to(...)")


def check_ids(name: str, ids: object) -> None:
    """Raises ValueError unless ids are a tensor of integers that an embedding reads."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} are {_shown(ids)}, not a tensor; they must be an int64 tensor of token ids")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} of dtype {ids.dtype} must be int64: token ids, as the tokenizers give them")


def check_time(t: object) -> None:
    """Raises ValueError unless t is a floating tensor."""
    if not isinstance(t, Tensor):
        raise ValueError(f"t is {_shown(t)}, not a tensor: give torch.tensor({_shown(t)}), in [0, 1], 1 = noise")
    if not t.is_floating_point():
        raise ValueError(f"t of dtype {t.dtype} must be floating, in [0, 1], 1 = noise: a timestep divided by 1000")


def _shown(x: object) -> str:
    text = repr(x)
    return text if len(text) <= 60 else f"a {type(x).__name__}"
