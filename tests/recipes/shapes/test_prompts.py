"""The reader of drawn shapes reads any image: rewards are built on it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.image import pixels
from functional_sd3.recipes import shapes
from functional_sd3.recipes.shapes import prompts

COLOURS = [*shapes.COLOURS.values(), (0, 0, 0), (255, 255, 255), (127, 127, 127), (0, 255, 0)]
SCENE = shapes.Scene((shapes.Thing("large", "red", "circle"),), "white")


def painted(ground, rectangles):
    image = torch.tensor(ground).reshape(3, 1, 1).expand(3, 64, 64).clone()
    for top, left, height, width, colour in rectangles:
        image[:, top : top + height, left : left + width] = torch.tensor(colour).reshape(3, 1, 1)
    return image / 255


def rectangles():
    side = st.integers(1, 64)
    return st.lists(st.tuples(st.integers(0, 63), st.integers(0, 63), side, side, st.sampled_from(COLOURS)), max_size=6)


@given(st.sampled_from(COLOURS), rectangles())
@settings(max_examples=60)
def test_rectangles_of_any_place_size_and_colour_are_read(ground, given_rectangles):
    reading = prompts.read(painted(ground, given_rectangles))
    assert reading.background in shapes.COLOURS and len(reading.things) == len(reading.overlaps)
    assert all(0 <= overlap <= 1 for overlap in reading.overlaps)
    prompts.judge(reading, SCENE)


@pytest.mark.parametrize("length", [20, 40, 64])
@pytest.mark.parametrize("edge", ["left", "top", "right", "bottom"])
def test_a_region_one_pixel_wide_at_an_edge_is_no_shape(edge, length):
    strip = {
        "left": (0, 0, length, 1),
        "top": (0, 0, 1, length),
        "right": (3, 63, length, 1),
        "bottom": (63, 3, 1, length),
    }
    reading = prompts.read(painted((245, 245, 245), [(*strip[edge], (220, 40, 40))]))
    (thing,), (overlap,) = reading.things, reading.overlaps
    assert thing.colour == "red" and overlap < prompts.MIN_OVERLAP
    assert not prompts.judge(reading, SCENE).right


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, -3.0, 1e30, -1e30, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_constant_images_of_any_value_are_read_and_wrong(value, dtype):
    reading = prompts.read(torch.full((3, 64, 64), value, dtype=torch.float64).to(dtype))
    assert not prompts.judge(reading, SCENE).right


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 0.3, 3.0, 1e20, 1e38]), st.sampled_from([0.0, 0.01, 0.5]))
@settings(max_examples=25)
def test_noise_with_and_without_numbers_is_read(seed, scale, strange):
    image = scale * prng.normal(prng.key(seed), (3, 64, 64))
    holes = prng.uniform(prng.key(seed + 1), (3, 64, 64))
    for value, part in ((math.nan, 1.0), (math.inf, 0.5), (-math.inf, 0.25)):
        image = torch.where(holes < strange * part, value, image)
    prompts.judge(prompts.read(image), SCENE)


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (64, 1), (2, 3), (8, 8), (63, 65), (200, 10)])
def test_images_of_other_sizes_are_read(size):
    prompts.judge(prompts.read(prng.uniform(prng.key(1), (3, *size))), SCENE)


def test_a_drawing_of_any_size_and_dtype_is_read_alike():
    image = pixels.from_pil(shapes.draw(SCENE))[0]
    expected = prompts.read(image)
    assert prompts.judge(expected, SCENE).right
    for other in (image.double(), image.half(), image.bfloat16(), (image * 255).round().to(torch.uint8)):
        assert prompts.judge(prompts.read(other), SCENE).right
    large = image.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert prompts.judge(prompts.read(large), SCENE).right
    broken = image.clone()
    broken[:, 20:44, 20:44] = math.nan
    assert not prompts.judge(prompts.read(broken), SCENE).right


def test_tensors_that_are_no_image_are_refused():
    for wrong in (torch.zeros(64, 64), torch.zeros(1, 64, 64), torch.zeros(3, 0, 64), torch.zeros(2, 3, 64, 64)):
        with pytest.raises(ValueError, match="must be \\(3, height, width\\)"):
            prompts.read(wrong)
    with pytest.raises(ValueError, match="torch.int64 must be floating"):
        prompts.read(torch.zeros(3, 64, 64, dtype=torch.int64))
