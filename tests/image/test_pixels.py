"""Conversions between images and tensors."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from functional_sd3.image import pixels


def test_every_byte_survives_the_round_trip():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pixels.to_bytes(pixels.from_bytes(every)), every)


def test_bytes_are_rounded_halves_to_even_and_clamped():
    values = torch.tensor([-1.0, 0.5 / 255, 1.5 / 255, 0.499, 2.0])
    assert pixels.to_bytes(values).tolist() == [0, 0, 2, 127, 255]


def test_nan_is_refused_rather_than_drawn():
    with pytest.raises(ValueError, match="NaN"):
        pixels.to_bytes(torch.tensor([float("nan")]))


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8))
def test_signed_and_back_is_the_identity(values):
    images = torch.tensor(values)
    torch.testing.assert_close(pixels.from_signed(pixels.to_signed(images)), images, atol=1e-6, rtol=0)


def test_pil_round_trip_keeps_every_pixel():
    image = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    back = pixels.from_pil(pixels.to_pil(pixels.from_bytes(image)))
    assert torch.equal(pixels.to_bytes(back), image)


def test_greyscale_becomes_rgb_and_transparency_white():
    grey = pixels.from_pil(Image.new("L", (4, 4), 51))
    assert torch.allclose(grey, torch.full((1, 3, 4, 4), 0.2))
    clear = pixels.from_pil(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))
    assert torch.equal(clear, torch.ones(1, 3, 4, 4))
    palette = Image.fromarray(numpy.zeros((4, 4), numpy.uint8)).convert("P")
    assert pixels.from_pil(palette).shape == (1, 3, 4, 4)


def test_images_of_two_sizes_are_no_batch():
    with pytest.raises(ValueError, match="one size"):
        pixels.from_pil([Image.new("RGB", (4, 4)), Image.new("RGB", (8, 4))])


def test_a_grid_holds_every_image_in_reading_order():
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 2, 2) / 10
    sheet = pixels.grid(images, columns=3, gap=1)
    assert sheet.shape == (1, 3, 5, 8)
    assert sheet[0, 0, 0, [0, 3, 6]].tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert sheet[0, 0, 3, [0, 3, 6]].tolist() == pytest.approx([0.3, 0.4, 1.0])


def test_images_of_sixteen_bits_are_scaled_and_not_clipped():
    import numpy
    from PIL import Image

    ramp = numpy.linspace(0, 65535, 256).round().astype(numpy.uint16).reshape(1, 256)
    for values in (ramp, ramp.astype(numpy.int32), (ramp / 65535).astype(numpy.float32)):
        images = pixels.from_pil(Image.fromarray(values))
        assert torch.equal(images[0, 1, 0], pixels.from_bytes(torch.arange(256, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="from 0 to 65535: floats are read as 0"):
        pixels.from_pil(Image.fromarray(ramp.astype(numpy.float32)))
