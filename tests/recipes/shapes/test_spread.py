"""Diversity of drawn images: as spread as the world's, and not when one image is drawn for every caption."""

from dataclasses import replace

import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.image import pixels
from functional_sd3.recipes import shapes
from functional_sd3.recipes.shapes import prompts, spread, world


def images_of(scenes):
    return pixels.from_pil([shapes.draw(scene) for scene in scenes])


def measure(drawn, asked):
    return spread.measure(images_of(drawn), asked, prng.key(1), reader=prompts.read)


@pytest.mark.parametrize("things", [1, 2])
def test_other_places_keep_the_words_and_stay_inside(things):
    (scene,) = shapes.scenes(prng.key(3), 1, two=things - 1.0)
    other = world.placed(prng.key(4), scene)
    assert shapes.caption(other) == shapes.caption(scene) and other != scene
    assert world.placed(prng.key(4), scene) == other
    for thing in other.things:
        radius = shapes.RADII[thing.size]
        assert radius <= thing.x <= shapes.SIDE - radius and radius <= thing.y <= shapes.SIDE - radius


def test_images_of_the_world_are_as_spread_as_the_world():
    scenes = shapes.scenes(prng.key(5), 120)
    found = measure(scenes, scenes)
    assert found.images == 120
    assert found.place == pytest.approx(found.data_place, rel=0.15)
    assert found.side == pytest.approx(found.data_side, rel=0.3)
    assert found.distance == pytest.approx(found.data_distance, abs=0.1)


def test_one_place_for_every_caption_is_seen():
    asked = shapes.scenes(prng.key(5), 80, two=0.0)
    middle = [replace(scene, things=(replace(scene.things[0], x=32.0, y=30.0),)) for scene in asked]
    found = measure(middle, asked)
    assert found.place < 0.1 * found.data_place and found.distance > found.data_distance + 0.2


def test_wrong_images_are_left_out():
    asked = shapes.scenes(prng.key(6), 30)
    images = images_of(asked)
    images[:10] = 0.0
    assert spread.measure(images, asked, prng.key(1), reader=prompts.read).images == 20
    with pytest.raises(ValueError, match="none of 3 images is right"):
        spread.measure(torch.zeros(3, 3, 64, 64), asked[:3], prng.key(1), reader=prompts.read)
