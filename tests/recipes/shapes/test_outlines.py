"""The second reader: every drawing is read as drawn, and a shape that has lost its corners as another."""

import pytest
import torch
import torch.nn.functional as F

from functional_sd3.core import prng
from functional_sd3.image import pixels
from functional_sd3.recipes import shapes
from functional_sd3.recipes.shapes import outlines, prompts

KINDS = [(size, shape) for size in shapes.RADII for shape in shapes.SHAPES]


def drawn(size, shape, x=32.0, y=32.0):
    return shapes.Scene((shapes.Thing(size, "blue", shape, x, y),), "white")


def read(scene):
    return outlines.read(pixels.from_pil(shapes.draw(scene))[0])


def test_drawings_of_the_world_are_read_as_drawn():
    scenes = shapes.scenes(prng.key(21), 150, hold_out=False)
    images = pixels.from_pil([shapes.draw(scene) for scene in scenes])
    assert prompts.table(images, scenes, reader=outlines.read)["right"] == 1.0


@pytest.mark.parametrize(("size", "shape"), KINDS)
@pytest.mark.parametrize("place", [(13.0, 13.0), (31.3, 40.8), (50.5, 22.25)])
def test_every_kind_is_named_at_any_place(size, shape, place):
    reading = read(drawn(size, shape, *place))
    (thing,) = reading.things
    assert (thing.size, thing.colour, thing.shape, reading.background) == (size, "blue", shape, "white")
    # A star's and a triangle's middle lies above or below that of their bounding boxes.
    assert abs(thing.x - place[0]) <= 1.0 and abs(thing.y - place[1]) <= 0.2 * shapes.RADII[size]


def test_a_star_without_points_is_no_star_though_the_first_reader_takes_it_for_one():
    scene = drawn("small", "star")
    image = pixels.from_pil(shapes.draw(scene, 128))
    # A blur as wide as the points, made hard again, rounds them off.
    blurred = F.avg_pool2d(F.pad(image, (5, 5, 5, 5), mode="replicate"), 11, stride=1)
    rounded = F.avg_pool2d(
        torch.where((blurred[:, :1] < 0.55), image.amin((-2, -1), True), image.amax((-2, -1), True)), 2
    )
    assert prompts.judge(prompts.read(rounded[0]), scene).right
    assert not prompts.judge(outlines.read(rounded[0]), scene).shape


def test_a_blemish_counts_and_a_blank_image_has_no_things():
    image = pixels.from_pil(shapes.draw(drawn("large", "circle")))[0]
    image[:, 2:6, 2:6] = torch.tensor([0.8, 0.1, 0.1]).reshape(3, 1, 1)
    assert len(outlines.read(image).things) == 2
    blank = outlines.read(torch.zeros(3, 64, 64))
    assert blank.background == "black" and not blank.things
    faint = pixels.from_pil(shapes.draw(drawn("large", "circle")))[0]
    faint[:, 2:6, 2:30] = faint[:, 2:6, 2:30] - 0.15
    assert outlines.read(faint).things[-1].shape == ""


def test_any_noise_is_read():
    for seed in range(5):
        outlines.read(prng.uniform(prng.key(seed), (3, 64, 64)))
        outlines.read(1e3 * prng.normal(prng.key(seed), (3, 64, 64)))
