"""Divergence of a velocity, div v = tr dv/dx: exact, or by Hutchinson's estimate, for every sample of a batch at once.

Samples of a batch are independent, so one Jacobian-vector product serves all of them: e_i in every sample gives each
its own dv_i/dx_i. The exact divergence of D numbers a sample costs D products whatever the batch,
Hutchinson's estimate (1990; for flows: Grathwohl et al. 2018, FFJORD, arXiv:1810.01367, section 3.1) one a probe: for
E[e e^T] = 1, E[e^T (dv/dx) e] = tr dv/dx. A velocity that mixes samples has no such divergence.

Products are taken in forward mode (`torch.func.jvp`, many at once, no activations kept) or in reverse mode (one by one,
with all activations kept). Both give the velocity itself as well.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng, transform
from functional_sd3.core.types import Key, Velocity
from functional_sd3.flow.evaluation import evaluate
from functional_sd3.flow.per_sample import dot

Draw = Callable[[Key, tuple[int, ...]], Tensor]
"""`draw(keys (..., 2), shape) -> (..., *shape)`, of mean 0 and covariance 1: `rademacher`, `prng.normal`."""
Mode = Literal["forward", "reverse"]
Estimator = Literal["exact", "hutchinson"]

CHUNK = 16
"""Products taken at once: they hold the activations of as many batches."""


class QuadraticForms(NamedTuple):
    """A velocity, and quadratic forms of its Jacobian."""

    velocity: Tensor
    """(batch, ...), in the dtype of x."""
    values: Tensor
    """e^T (dv/dx) e, (vectors, batch)."""


def divergence(
    velocity: Velocity,
    x: Tensor,
    t: Tensor | float,
    *,
    estimator: Estimator | None = None,
    key: Key | None = None,
    probes: int = 1,
    draw: Draw | None = None,
    mode: Mode | None = None,
    chunk_size: int | None = CHUNK,
) -> Tensor:
    """Divergence div v at (x, t), (batch,), in float32 or the wider dtype of x. x (batch, ...); t () or (batch,).

    estimator: "exact", or "hutchinson", the mean over `probes`; by default Hutchinson's where there is a key.
    key: (2,), from which sample i takes fold_in(key, i), or (batch, 2), a key for each; so a sample's estimate does not
    depend on its batch. draw: the probes' distribution, `rademacher` by default.
    mode: "forward" or "reverse"; None tries forward mode and takes reverse where the velocity has no forward
    derivative (name one under compile). chunk_size: forward products taken at once, None for all of them.

    Works under vmap, grad and compile where the velocity does. Raises ValueError for Hutchinson without a key,
    NotImplementedError for a mode that the velocity does not have.
    """
    x, t = _in_float32(x, t)
    if (estimator or ("exact" if key is None else "hutchinson")) == "exact":
        return exact(velocity, x, t, mode=mode, chunk_size=chunk_size).values[0]
    vectors = probe_vectors(prng.sample_keys(key, len(x)), probes, x, draw)
    return quadratic_forms(velocity, x, t, vectors, mode=mode, chunk_size=chunk_size).values.mean(0)


def exact(
    velocity: Velocity, x: Tensor, t: Tensor, *, mode: Mode | None = None, chunk_size: int | None = CHUNK
) -> QuadraticForms:
    """The velocity, and its exact divergence (1, batch) by the sum over the unit vectors."""
    size, total = math.prod(x.shape[1:]), torch.zeros((), dtype=x.dtype, device=x.device)
    step = chunk_size or size
    for start in range(0, size, step):
        index = torch.arange(start, min(start + step, size), device=x.device, dtype=torch.int64)
        units = (index[:, None] == torch.arange(size, device=x.device, dtype=torch.int64)).to(x.dtype)
        vectors = units.reshape(len(index), 1, *x.shape[1:]).expand(len(index), *x.shape)
        forms = _products(velocity, x, t, vectors, mode)
        total = total + forms.values.sum(0)
    return QuadraticForms(forms.velocity, total[None])


def quadratic_forms(
    velocity: Velocity,
    x: Tensor,
    t: Tensor,
    vectors: Tensor,
    *,
    mode: Mode | None = None,
    chunk_size: int | None = CHUNK,
) -> QuadraticForms:
    """The velocity, and e^T (dv/dx) e of each of the vectors (vectors, batch, ...)."""
    parts = [_products(velocity, x, t, part, mode) for part in vectors.split(chunk_size or len(vectors))]
    return QuadraticForms(parts[0].velocity, torch.cat([part.values for part in parts]))


def rademacher(key: Key, shape: tuple[int, ...]) -> Tensor:
    """Rademacher probes, -1 or 1 with equal probability: of least variance,
    2 sum_{i != j} ((J + J^T)_ij / 2)^2."""
    return (prng.bits(key, shape) & 1).mul_(2).sub_(1).to(torch.float32)


def probe_vectors(keys: Key, count: int, x: Tensor, draw: Draw | None = None) -> Tensor:
    """Probe vectors (count, batch, ...) like x; probe k of a sample is drawn from fold_in(the sample's key, k).

    So the first probes stay the same when there are more. keys (batch, 2). Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"probes {count} must be at least 1")
    keys = prng.fold_in(keys, torch.arange(count, device=keys.device, dtype=torch.int64)[:, None])
    return (draw or rademacher)(keys, tuple(x.shape[1:])).to(dtype=x.dtype, device=x.device)


def _products(velocity: Velocity, x: Tensor, t: Tensor, vectors: Tensor, mode: Mode | None) -> QuadraticForms:
    def field(x: Tensor) -> Tensor:
        return evaluate(velocity, x, t)

    if mode is None:
        try:
            return _forward(field, x, vectors)
        except NotImplementedError:
            return _reverse(field, x, vectors)
    if mode not in _MODES:
        raise ValueError(f"mode {mode!r} must be one of {', '.join(_MODES)}, or None")
    return _MODES[mode](field, x, vectors)


def _forward(field: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor) -> QuadraticForms:
    def product(vector: Tensor) -> tuple[Tensor, Tensor]:
        value, pushed = transform.jvp(field, x, vector)
        return value, dot(pushed, vector)

    if len(vectors) == 1:
        value, form = product(vectors[0])
        return QuadraticForms(value, form[None])
    # The value does not depend on the vectors: its copies are views of one.
    values, forms = torch.func.vmap(product)(vectors)
    return QuadraticForms(values[0], forms)


def _reverse(field: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor) -> QuadraticForms:
    value, pullback = transform.vjp(field, x)
    # One by one, as a velocity's backward pass may have no batching rule.
    return QuadraticForms(value, torch.stack([dot(pullback(vector)[0], vector) for vector in vectors.unbind()]))


def _in_float32(x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x, torch.as_tensor(t, dtype=x.dtype, device=x.device)


_MODES = {"forward": _forward, "reverse": _reverse}
