"""Lanczos eigenvalues and randomised singular values of matrix-free operators.

A Jacobian or a Hessian is never formed: `transform.hvp`, `torch.func.jvp` and `vjp` multiply by it. All loops
have a fixed length and read nothing on the host, so everything here works under vmap, grad and torch.compile.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key

Operator = Callable[[Tensor], Tensor]


class Eigenpairs(NamedTuple):
    """Ritz values of a symmetric operator, with residuals and vectors."""

    values: Tensor
    """(steps,), descending: Ritz values, all within the spectrum. Those at both ends converge first."""
    residuals: Tensor
    """(steps,): |A v - value v| of the unit Ritz vector v; an eigenvalue lies within this distance of the value."""
    vectors: Tensor
    """(count, n): unit Ritz vectors of the `count` largest values."""


class Singular(NamedTuple):
    """Singular values and vectors of a batch of operators A, each (m, n)."""

    values: Tensor
    """(batch, k), descending; each at most the true one."""
    left: Tensor
    """(batch, k, m), orthonormal."""
    right: Tensor
    """(batch, k, n), orthonormal: A right = values left."""


def lanczos(
    operator: Operator, key: Key, size: int, *, steps: int, count: int = 1, dtype: torch.dtype = torch.float32
) -> Eigenpairs:
    """Eigenvalues of a symmetric operator on vectors (size,), from `steps` products with it.

    Lanczos 1950, in the form of Golub and Van Loan, "Matrix Computations", section 10.3, with every vector
    orthogonalised twice against all before, so that no value appears twice by rounding. Where the vectors span an
    invariant subspace the next is random, which gives eigenvalues of any multiplicity; with steps = size
    all are exact up to rounding. Holds `steps` vectors, on the key's device. Raises ValueError unless
    1 <= count <= steps <= size.
    """
    if not 1 <= count <= steps <= size:
        raise ValueError(f"count {count}, steps {steps} and size {size} must be 1 <= count <= steps <= size")
    vector = _unit(prng.normal(prng.fold_in(key, 0), (size,), dtype))
    basis, diagonal, off = [vector], [], []
    largest = vector.new_zeros(())
    for index in range(steps):
        image = operator(vector).to(dtype)
        diagonal.append(vector @ image)
        rest = _orthogonal(image, basis)
        length = rest.norm()
        largest = torch.maximum(largest, image.norm())
        # Below rounding there is nothing left in `rest` but noise: the subspace is invariant.
        is_invariant = length <= 10 * torch.finfo(dtype).eps * size**0.5 * largest
        off.append(torch.where(is_invariant, 0.0, length))
        if index + 1 < steps:
            random = _unit(_orthogonal(prng.normal(prng.fold_in(key, index + 1), (size,), dtype), basis))
            vector = torch.where(is_invariant, random, rest / torch.where(is_invariant, 1.0, length))
            basis.append(vector)
    projected = torch.diag_embed(torch.stack(diagonal))
    if steps > 1:
        # Both triangles, though eigh reads one: its derivative assumes a symmetric matrix.
        off_diagonal = torch.stack(off[:-1])
        projected = projected + torch.diag_embed(off_diagonal, -1) + torch.diag_embed(off_diagonal, 1)
    values, within = torch.linalg.eigh(projected)
    values, within = values.flip(-1), within.flip(-1)
    return Eigenpairs(values, off[-1] * within[-1].abs(), within[:, :count].mT @ torch.stack(basis))


def singular(forward: Operator, transpose: Operator, probes: Tensor, *, iterations: int = 4) -> Singular:
    """The k largest singular values of operators A with their vectors, from k probes and 2 `iterations` + 2 products.

    Randomised subspace iteration: Halko, Martinsson and Tropp 2011, "Finding structure with randomness", algorithms
    4.4 and 5.1. forward: (batch, n, k) -> A of each column, (batch, m, k); transpose: (batch, m, k) -> (batch, n, k) of
    A^T; probes (batch, n, k), random. More probes than values, and more iterations, make the values more accurate: the
    error of the j-th falls as (sigma_(k+1) / sigma_j)^(2 iterations + 1). Exact where k is at least the rank.
    Raises ValueError for more probes than n.
    """
    if probes.ndim != 3 or probes.shape[2] > probes.shape[1] or iterations < 0:
        raise ValueError(
            f"probes {tuple(probes.shape)} with {iterations} iterations; they must be (batch, n, k), k at most n"
        )
    span = _orthonormal(forward(probes))
    for _ in range(iterations):
        span = _orthonormal(forward(_orthonormal(transpose(span))))
    right, values, within = torch.linalg.svd(transpose(span), full_matrices=False)
    return Singular(values, (span @ within.mT).mT, right.mT)


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> Tensor:
    rows = torch.stack(basis)
    for _ in range(2):
        vector = vector - (rows @ vector) @ rows
    return vector


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q
