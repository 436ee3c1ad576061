"""Types that every module shares: trees, parameters, keys and velocities."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Tree = Any
"""Nested dicts and lists (or NamedTuples, for states) whose leaves are tensors."""

Params = dict[str, Any]
"""A tree of float tensors; the path of a leaf joined by dots is its key on disk."""

Key = Tensor
"""A random key: int64 (..., 2) holding two 32-bit words (see `core.prng`)."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""dx/dt of the flow: `(x (batch, ...), t scalar or (batch,) in [0, 1], 1 = noise) -> tensor shaped like x`."""

MeanVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mean of dx/dt over [r, t] along the flow through x at t: `(x (batch, ...), t, r <= t) -> tensor shaped like x`."""
