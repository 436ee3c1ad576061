"""Cuts of images: the part that is taken, and the pixels that become of it."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from functional_sd3.image import cuts

SIDES = st.integers(1, 3000)


@given(SIDES, SIDES, SIDES, SIDES, st.floats(0, 1))
def test_a_box_lies_within_the_image_and_has_the_shape_of_the_cut(width, height, to_width, to_height, offset):
    left, top, right, bottom = cuts.box(width, height, cuts.Cut(to_width, to_height, offset))
    assert 0 <= left < right <= width * (1 + 1e-12) and 0 <= top < bottom <= height * (1 + 1e-12)
    assert (right - left) * to_height == pytest.approx((bottom - top) * to_width)
    assert right - left == width or bottom - top == height


@pytest.mark.parametrize(("offset", "column"), [(0.0, 0), (0.5, 4), (1.0, 8)])
def test_the_offset_moves_the_part_along_the_side_that_is_cut(offset, column):
    values = numpy.repeat(numpy.arange(12, dtype=numpy.uint8)[None, :, None], 4, 0).repeat(3, 2)
    cut = cuts.apply(Image.fromarray(values), cuts.Cut(4, 4, offset))
    assert numpy.array(cut)[0, :, 0].tolist() == list(range(column, column + 4))
    mirrored = cuts.apply(Image.fromarray(values), cuts.Cut(4, 4, offset, mirrored=True))
    assert (numpy.array(mirrored) == numpy.array(cut)[:, ::-1]).all()
