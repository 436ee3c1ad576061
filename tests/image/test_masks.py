"""Masks in all common forms of transparency, by one rule."""

import numpy
import pytest
from PIL import Image, ImageDraw, ImageFilter

from functional_sd3.image import masks

SIZE = (40, 30)
BOX = (10, 5, 24, 19)


def photograph(size=SIZE) -> Image.Image:
    noise = numpy.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=numpy.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def inside() -> Image.Image:
    mask = Image.new("L", SIZE)
    ImageDraw.Draw(mask).rectangle(BOX, fill=255)
    return mask


def with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(alpha)
    return image


def outside() -> Image.Image:
    return inside().point(lambda value: 255 - value)


def filled(colour) -> Image.Image:
    return Image.new("RGB", SIZE, colour)


def two_coloured() -> Image.Image:
    """White in the box, black in the left half beside it, the rest transparent."""
    image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((0, 0, 20, 30), fill=(0, 0, 0, 255))
    ImageDraw.Draw(image).rectangle(BOX, fill=(255, 255, 255, 255))
    return image


FORMS = {
    "white on black": lambda: inside().convert("RGBA"),
    "white on black, all of it half transparent": lambda: with_alpha(inside(), Image.new("L", SIZE, 128)),
    "white strokes on transparent": lambda: with_alpha(filled("white"), inside()),
    "nearly white strokes": lambda: with_alpha(filled((250, 248, 251)), inside()),
    "red strokes on transparent": lambda: with_alpha(filled("red"), inside()),
    "white on black, black made transparent": lambda: with_alpha(inside(), inside()),
    "white and black strokes": two_coloured,
    "a photograph with a part erased": lambda: with_alpha(photograph(), outside()),
    "a black layer with a hole": lambda: with_alpha(filled("black"), outside()),
    "what was erased is white beneath": lambda: Image.composite(
        with_alpha(photograph(), Image.new("L", SIZE, 255)), Image.new("RGBA", SIZE, (255, 255, 255, 0)), outside()
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_box_is_drawn_anew_whatever_the_form(form):
    mask = masks.from_image(FORMS[form](), photograph())
    assert mask.image.mode == "L" and numpy.array_equal(numpy.asarray(mask.image) >= 128, numpy.asarray(inside()) > 0)
    assert bool(mask.reading) == (not form.startswith("white on black") or "black made" in form)


def test_an_image_in_black_and_white_or_of_one_colour_with_a_part_erased_is_known_by_the_image():
    drawing = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(drawing).rectangle((0, 0, 40, 12), fill="black")
    for image in (drawing, filled((90, 140, 220))):
        mask = masks.from_image(with_alpha(image, outside()), image)
        assert numpy.array_equal(numpy.asarray(mask.image), numpy.asarray(inside()))


def test_soft_edges_stay_soft():
    soft = inside().filter(ImageFilter.GaussianBlur(2))
    assert numpy.array_equal(numpy.asarray(masks.from_image(with_alpha(filled("white"), soft)).image), soft)
    erased = masks.from_image(with_alpha(photograph(), soft.point(lambda value: 255 - value))).image
    assert numpy.array_equal(numpy.asarray(erased), soft)


def test_a_single_visible_pixel_of_a_large_mask_counts():
    mask = Image.new("RGBA", (1500, 1500), (0, 0, 0, 0))
    mask.putpixel((701, 3), (255, 255, 255, 255))
    assert masks.from_image(mask).image.getbbox() == (701, 3, 702, 4)


@pytest.mark.parametrize(
    ("value", "least", "said"),
    [
        (0, 128, "is black everywhere"),
        (1, 128, "no value above 1, .* 0 and 1 must be multiplied by 255"),
        (1, 4, "multiplied by 255"),
        (127, 128, "no value above 127"),
    ],
)
def test_a_mask_that_changes_nothing_is_refused(value, least, said):
    mask = Image.new("L", SIZE)
    mask.putpixel((3, 3), value)
    with pytest.raises(ValueError, match=said):
        masks.check_effect(mask, least)
    mask.putpixel((3, 3), least)
    masks.check_effect(mask, least)


@pytest.mark.parametrize("alpha", [0, 1])
def test_a_mask_that_is_transparent_everywhere_is_refused(alpha):
    mask = with_alpha(photograph(), inside().point(lambda value: alpha if value else 0))
    with pytest.raises(ValueError, match=f"transparent everywhere: its alpha is at most {alpha} of 255"):
        masks.from_image(mask)


def test_white_strokes_are_strokes_on_a_white_image_too():
    mask = masks.from_image(with_alpha(filled("white"), inside()), filled("white"))
    assert numpy.array_equal(numpy.asarray(mask.image), numpy.asarray(inside()))
