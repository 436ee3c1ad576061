"""Types of an objective: `(params, batch, keys) -> (scalar, metrics)`."""

from collections.abc import Callable

from torch import Tensor

from functional_sd3.core.types import Key, Params, Tree

Metrics = dict[str, Tensor]
"""Means over the batch by name."""
Loss = Callable[[Params, Tree, Key], tuple[Tensor, Metrics]]
"""Scalar loss and metrics of params, a batch (a tree of tensors (batch, ...)) and keys (batch, 2), one a sample."""
