"""Densities and weights of training times against diffusers' `training_utils`."""

import pytest
import torch
from scipy import stats

training_utils = pytest.importorskip("diffusers.training_utils")

from functional_sd3.cli import train_objective  # noqa: E402
from functional_sd3.core import prng  # noqa: E402
from functional_sd3.flow import loss_weights  # noqa: E402


@pytest.mark.parametrize(("ours", "theirs"), [("sigma-sqrt", "sigma_sqrt"), ("cosmap", "cosmap")])
def test_weights_equal_diffusers(ours, theirs):
    t = torch.linspace(0.001, 1, 1000)
    expected = training_utils.compute_loss_weighting_for_sd3(theirs, t)
    torch.testing.assert_close(train_objective.weight([ours])(t), expected)


@pytest.mark.parametrize(
    ("text", "scheme", "numbers"),
    [
        ("logit-normal", "logit_normal", {"logit_mean": 0.0, "logit_std": 1.0}),
        # Their draw is an index of a descending table.
        ("logit-normal:0.5,0.7", "logit_normal", {"logit_mean": -0.5, "logit_std": 0.7}),
        ("mode", "mode", {"mode_scale": 1.29}),
        ("mode:-0.6", "mode", {"mode_scale": -0.6}),
        ("uniform", "none", {}),
    ],
)
def test_densities_are_those_of_diffusers(text, scheme, numbers):
    options = {"logit_mean": None, "logit_std": None, "mode_scale": None, **numbers}
    generator = torch.Generator().manual_seed(0)
    u = training_utils.compute_density_for_timestep_sampling(scheme, 20_000, generator=generator, **options)
    ours = train_objective.density(text)(prng.key(1), (20_000,))
    assert stats.ks_2samp(ours.numpy(), (1 - u).numpy()).pvalue > 0.01


def test_preconditioned_outputs_are_the_weight_of_data():
    """diffusers' `--precondition_outputs 1` compares x - sigma v with the data."""
    t, error = torch.rand(5, generator=torch.Generator().manual_seed(2)), torch.ones(5)
    torch.testing.assert_close((t * error).square(), loss_weights.data(t) * error.square())
