"""The world of shapes, and the reader of its images."""

import hashlib

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.image import pixels
from functional_sd3.recipes import shapes
from functional_sd3.recipes.shapes import prompts


def scene(size="large", colour="red", shape="circle", background="white", x=32.0, y=32.0):
    return shapes.Scene((shapes.Thing(size, colour, shape, x, y),), background)


def test_canonical_captions_follow_the_grammar():
    assert shapes.caption(scene()) == "a large red circle on a white background"
    two = shapes.Scene(
        (shapes.Thing("small", "blue", "star"), shapes.Thing("large", "green", "square")), "black", "left of"
    )
    assert shapes.caption(two) == "a small blue star left of a large green square on a black background"


def test_every_wording_is_lower_case_and_names_everything():
    for drawn in shapes.scenes(prng.key(1), 50):
        for wording in range(8):
            text = shapes.caption(drawn, wording)
            words = set(text.replace(",", "").split())
            assert text == text.lower() and drawn.background in words
            for thing in drawn.things:
                assert {thing.size, thing.colour, thing.shape} <= words


def test_held_out_captions_are_never_drawn_and_are_a_tenth():
    drawn = shapes.scenes(prng.key(2), 2000)
    assert not any(hashlib.sha256(shapes.caption(one).encode()).digest()[0] < 26 for one in drawn)
    share = len(shapes.held_out_captions(1)) / (2 * 8 * 6 * 7)
    assert 0.07 < share < 0.15


@pytest.mark.parametrize("things", [1, 2])
def test_listed_captions_are_those_of_all_held_out_scenes(things):
    listed = dict(shapes.held_out_captions(things))
    assert all(shapes.caption(scene) == text for text, scene in list(listed.items())[::7])
    drawn = shapes.scenes(prng.key(3), 500, two=things - 1, hold_out=False)
    assert [shapes.caption(scene) in listed for scene in drawn] == [shapes.is_held_out(scene) for scene in drawn]
    assert 20 < sum(shapes.is_held_out(scene) for scene in drawn) < 120


@given(st.integers(0, 2**31))
def test_things_are_inside_apart_and_in_the_relation_of_the_caption(seed):
    (drawn,) = shapes.scenes(prng.key(seed), 1, two=1.0)
    first, second = drawn.things
    for thing in drawn.things:
        radius = shapes.RADII[thing.size]
        assert radius <= thing.x <= shapes.SIDE - radius and radius <= thing.y <= shapes.SIDE - radius
    across, down = shapes.RELATIONS[drawn.relation]
    dx, dy = first.x - second.x, first.y - second.y
    along = dx * across + dy * down
    assert along >= shapes.RADII[first.size] + shapes.RADII[second.size] + shapes.GAP - 1e-6
    assert along > abs(dy if across else dx)
    assert len({first.colour, second.colour, drawn.background}) == 3


def test_scenes_are_a_function_of_the_key():
    assert shapes.scenes(prng.key(3), 5) == shapes.scenes(prng.key(3), 9)[:5] != shapes.scenes(prng.key(4), 5)


def test_shapes_have_the_areas_of_their_definitions():
    def area(shape, size):
        img = numpy.asarray(shapes.draw(scene(size, "white", shape, "black"), supersample=8), dtype=float)
        return ((img[:, :, 0] - 20) / 225).sum()

    for size, r in shapes.RADII.items():
        expected = {
            "circle": numpy.pi * r**2,
            "square": 4 * r**2,
            "triangle": 2 * r**2,
            "ring": numpy.pi * r**2 * (1 - 0.62**2),
            "cross": 4 * r**2 * (2 / 3 - 1 / 9),
            "star": 10 * 0.5 * r * 0.45 * r * numpy.sin(numpy.pi / 5),
        }
        for shape, value in expected.items():
            assert area(shape, size) == pytest.approx(value, rel=0.06), (shape, size)


def test_the_reader_reads_every_kind_of_drawn_image():
    drawn = shapes.scenes(prng.key(5), 150)
    images = pixels.from_pil([shapes.draw(one) for one in drawn])
    assert prompts.table(images, drawn)["right"] == 1.0
    noisy = (images + 0.06 * prng.normal(prng.key(6), tuple(images.shape))).clamp(0, 1)
    assert prompts.table(noisy, drawn)["right"] > 0.98


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (scene(shape="square"), "shape"),
        (scene(colour="blue"), "colour"),
        (scene(size="small"), "size"),
        (scene(background="black"), "background"),
    ],
)
def test_the_reader_names_the_wrong_property(wrong, named):
    verdict = prompts.judge(prompts.read(pixels.from_pil(shapes.draw(wrong))[0]), scene())
    assert not getattr(verdict, named) and not verdict.right
    assert [name for name in verdict._fields if not getattr(verdict, name)] == [named]


def test_the_reader_notices_a_surplus_thing_and_a_wrong_relation():
    two = shapes.Scene(
        (shapes.Thing("small", "blue", "star", 12, 30), shapes.Thing("large", "green", "square", 45, 32)),
        "black",
        "left of",
    )
    reading = prompts.read(pixels.from_pil(shapes.draw(two))[0])
    assert prompts.judge(reading, two).right
    swapped = shapes.Scene(two.things, "black", "right of")
    assert (
        prompts.judge(reading, swapped)._replace(relation=True).right and not prompts.judge(reading, swapped).relation
    )
    one = shapes.Scene(two.things[:1], "black")
    assert not prompts.judge(reading, one).count


def test_a_blank_or_a_blurred_image_is_not_right():
    assert not prompts.judge(prompts.read(torch.ones(3, 64, 64)), scene()).right
    smear = torch.linspace(0, 1, 64).expand(3, 64, 64)
    assert not prompts.judge(prompts.read(smear), scene()).right
