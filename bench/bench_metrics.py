"""Metrics of generated images."""

import torch

from functional_sd3.core import prng
from functional_sd3.metrics import frechet


def test_frechet(versus):
    """Against the matrix square root that the usual packages take, with the rest of their formula."""
    from scipy.linalg import sqrtm

    width = 2048
    a, b = (frechet.statistics(prng.normal(prng.key(seed), (2 * width, width)).double()) for seed in (1, 2))
    ours, theirs = ([each.mean, frechet.covariance(each)] for each in (a, b))

    def peer():
        (mean, covariance), (other, others) = ours, theirs
        root = torch.from_numpy(sqrtm((covariance @ others).numpy()).real)
        return (mean - other).square().sum() + covariance.trace() + others.trace() - 2 * root.trace()

    versus(
        "Frechet distance of two statistics of 2,048 features",
        lambda: torch.tensor(frechet.distance(a, b)),
        peer,
        peer="scipy's sqrtm, as in pytorch-fid",
        tolerance=1e-6,
        rounds=1,
    )
