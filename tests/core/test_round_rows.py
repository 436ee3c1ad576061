"""Inputs of products in a byte: huge, subnormal and non-finite rows, in every dtype that layers compute in."""

import pytest
import torch

from functional_sd3.core import layers
from functional_sd3.kernels import int8_functions

ROUND = {"int8": layers.round_rows, "float8": layers.round_rows_to_float8}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
X = torch.randn(6, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROUND)
@pytest.mark.parametrize("largest", [3e38, 1e30, 6e4, 1.0, 1e-30, 1e-37, 1e-39, 8.8e-43, 2.5e-43, 3e-45])
def test_rows_of_any_magnitude_are_off_by_at_most_half_a_step(dtype, name, largest):
    x = (X / X.abs().amax(-1, keepdim=True) * largest).clamp(-3e38, 3e38)
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    rounded, exact = ROUND[name](x), x.double()
    wide = torch.promote_types(dtype, torch.float32)
    # The least step is the least normal number, and eps that of the dtypes of the step and of the result.
    least = torch.finfo(wide).tiny
    slack = exact.abs() * 2 * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    most = exact.abs().amax(-1, keepdim=True)
    if name == "int8":
        bound = (most / 127).clamp_min(least) / 2
    else:
        bound = torch.maximum(exact.abs() / 16, (most / 448).clamp_min(least) * 2.0**-10)
    assert rounded.dtype == dtype and torch.isfinite(rounded).all()
    assert ((rounded.double() - exact).abs() <= bound * 1.001 + slack).all()


@pytest.mark.parametrize("largest", [3e38, 1.0, 1e-37, 1e-39, 8.8e-43, 2.5e-43, 3e-45, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_of_the_kernel_are_those_of_the_formula_and_none_leaves_its_range(dtype, largest):
    x = (X / X.abs().amax(-1, keepdim=True) * largest).clamp(-3e38, 3e38).to(dtype)
    numbers, steps = int8_functions.round_to_int8(x)
    assert numbers.abs().amax() <= 127 and (numbers.sign() * x.sign() >= 0).all()
    rounded = layers.round_rows(x).double()
    error = (numbers.double() * steps.double() - rounded).abs()
    assert (error <= rounded.abs() * 2 * torch.finfo(dtype).eps + torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("name", ROUND)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_in_its_row(name, value):
    x = X.float()
    x[2, 5] = value
    finite = torch.isfinite(ROUND[name](x)).all(-1)
    assert finite.tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("name", ROUND)
def test_no_rows_are_no_rows(name):
    assert ROUND[name](X[:0]).shape == (0, 33)
