"""Types of an objective, `(params, batch, keys) -> (scalar, metrics)`, and the check of its keys."""

from collections.abc import Callable

from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Params, Tree

Metrics = dict[str, Tensor]
"""Means over the batch by name."""
Loss = Callable[[Params, Tree, Key], tuple[Tensor, Metrics]]
"""Scalar loss and metrics of params, a batch (a tree of tensors (batch, ...)) and keys (batch, 2), one a sample."""


def check_keys(keys: Key, samples: Tensor) -> None:
    """Raises ValueError unless keys are (batch, 2) for samples (batch, ...)."""
    prng.check_key(keys)
    if keys.shape[:-1] != samples.shape[:1]:
        count = len(samples)
        raise ValueError(f"keys {list(keys.shape)} must be ({count}, 2), one a sample: prng.split(key, {count})")
