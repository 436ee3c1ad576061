"""Loss landscape: eigenvalues of the Hessian over the parameters, and the gradient noise scale.

    eigen = hessian_eigenvalues(loss, params, prng.key(0))
    noise = noise_scale(transform.per_sample_grads(sample_loss)(params, latents, keys))

Losses are functions of a tree of float tensors. Products of the Hessian with one vector are `transform.hvp`, gradients
of each sample `transform.per_sample_grads`. Works under vmap, grad and torch.compile.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import transform, tree
from functional_sd3.core.types import Key, Tree
from functional_sd3.flow.analysis import spectral


class Eigenpairs(NamedTuple):
    """Ritz values of a Hessian, with residuals and eigenvectors."""

    values: Tensor
    """(steps,), descending: the first and the last are the sharpest directions up and down."""
    residuals: Tensor
    """(steps,): an eigenvalue lies within this distance of the value."""
    vectors: Tree
    """A tree like the parameters, leaves (count, ...): unit directions of the `count` largest values."""


class NoiseScale(NamedTuple):
    """Gradient noise scale: two unbiased estimates and their quotient, all scalars."""

    square: Tensor
    """|G|^2, the squared norm of the true gradient. By chance below 0 where the noise is much larger."""
    trace: Tensor
    """tr(Sigma): the variance of the gradient of one sample, summed over the parameters."""
    scale: Tensor
    """tr(Sigma) / |G|^2, in samples: far larger batches stop paying, far smaller ones lose nothing."""


def hessian_eigenvalues(
    loss: Callable[[Tree], Tensor], params: Tree, key: Key, *, steps: int = 20, count: int = 1
) -> Eigenpairs:
    """Eigenvalues of the Hessian of `loss`, a scalar, at `params`, by Lanczos with full reorthogonalisation.

    steps: Hessian-vector products, and as many vectors of the size of the parameters in memory (no more than there are
    numbers in them). Most eigenvalues of a network are near 0; the few large ones converge in tens of steps.
    See `spectral.lanczos`, which raises ValueError for a `count` above `steps`.
    """
    leaves = tree.leaves(params)
    shapes = [leaf.numel() for leaf in leaves]
    dtype = torch.promote_types(leaves[0].dtype, torch.float32)

    def unravel(vector: Tensor) -> Tree:
        parts = iter(vector.split(shapes, dim=-1))
        return tree.map(lambda leaf: next(parts).reshape(*vector.shape[:-1], *leaf.shape).to(leaf.dtype), params)

    def product(vector: Tensor) -> Tensor:
        return torch.cat([leaf.flatten() for leaf in tree.leaves(transform.hvp(loss, params, unravel(vector)))])

    pairs = spectral.lanczos(
        product, key.to(leaves[0].device), sum(shapes), steps=min(steps, sum(shapes)), count=count, dtype=dtype
    )
    return Eigenpairs(pairs.values, pairs.residuals, unravel(pairs.vectors))


def noise_scale(grads: Tree) -> NoiseScale:
    """The simple noise scale from gradients of single samples, each leaf (samples, ...), at least two of them.

    McCandlish et al. 2018, arXiv:1812.06162, eq. 2.9 and appendix A.1 with batches of 1 and of all samples. Raises
    ValueError for fewer than two samples.
    """
    leaves = [leaf.flatten(1).to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in tree.leaves(grads)]
    samples = len(leaves[0])
    if samples < 2:
        raise ValueError(f"{samples} sample: the scatter of gradients takes two at least")
    means = [leaf.mean(0) for leaf in leaves]
    trace = sum((leaf - mean).square().sum() for leaf, mean in zip(leaves, means, strict=True)) / (samples - 1)
    square = sum(mean.square().sum() for mean in means) - trace / samples
    return NoiseScale(square, trace, trace / square)
