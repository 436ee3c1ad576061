"""Mixtures: arcs of vectors, and weights of tiles that sum to one number over their seams."""

import pytest
import torch

from functional_sd3.core import blend


def test_slerp_is_exact_at_its_ends_and_keeps_what_is_equal():
    start, end = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    amounts = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    mixed = blend.slerp(start, end, amounts)
    assert torch.equal(mixed[0], start[0])
    torch.testing.assert_close(mixed[1], end[1])
    torch.testing.assert_close(mixed[2], blend.slerp(end, start, 1 - amounts)[2])
    for amount in (0.0, 0.1, 0.3, 0.7, 1.0):
        assert torch.equal(blend.slerp(start, start, amount), start)
        zero = torch.zeros_like(start)
        torch.testing.assert_close(blend.slerp(start, zero, amount), (1 - amount) * start)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slerp_of_16_bits_is_that_of_float64_rounded(dtype):
    noise = torch.randn(2, 2, 70_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = blend.slerp(*noise.double(), 0.3)
    mixed = blend.slerp(*noise, 0.3)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(("length", "overlap"), [(8, 3), (8, 0), (4, 6)])
def test_ramps_of_neighbours_meet(length, overlap):
    like = torch.zeros(1, dtype=torch.float64)
    falling = blend.ramp(length, overlap, rises=False, falls=True, like=like)
    rising = blend.ramp(length, overlap, rises=True, falls=False, like=like)
    seam = min(overlap, length)
    if seam:
        torch.testing.assert_close(falling[-seam:] + rising[:seam], torch.ones(seam, dtype=torch.float64))
    assert (falling[: length - seam] == 1).all() and (rising[seam:] == 1).all() and (rising > 0).all()
    assert torch.equal(blend.ramp(length, overlap, rises=False, falls=False, like=like), torch.ones_like(falling))
