"""The world `params/tiny` is trained on: coloured shapes on plain backgrounds, with captions.

A scene is one object anywhere fully inside the image, or two objects of different colours that do not touch, one
"left of", "right of", "above" or "below" the other. Every scene is a pure function of a key. Captions whose canonical
form hashes into the first tenth are held out: `scenes` never yields them, `held_out_captions` lists them for tests.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from functional_sd3.core import prng
from functional_sd3.core.types import Key

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 60, 180),
    "orange": (245, 140, 40),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RADII = {"small": 7.0, "large": 13.0}
"""Half the extent in pixels of an image 64 pixels wide; every shape fits the square of this half side."""
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Direction from the second object to the first, x to the right and y down."""
SIDE = 64
GAP = 4.0
"""Least distance in pixels between the bounding squares of two objects along their relation's axis."""
HELD_OUT_BYTE = 26


@dataclass(frozen=True)
class Thing:
    """One object; the centre is in pixels of a 64-pixel image."""

    size: str
    colour: str
    shape: str
    x: float = SIDE / 2
    y: float = SIDE / 2


@dataclass(frozen=True)
class Scene:
    """Content of an image; `relation` is that of the first thing to the second, None for one thing."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None


def caption(scene: Scene, wording: int = 0) -> str:
    """The scene in words, lower case. Wording 0 is canonical; any other number picks one of the rewordings."""
    templates = _ONE if scene.relation is None else _TWO
    words = {"background": scene.background, "ground_article": _article(scene.background)}
    for name, thing in zip(("first", "second"), scene.things, strict=False):
        words[name] = f"{thing.size} {thing.colour} {thing.shape}"
        words[f"{name}_plain"] = f"{thing.colour} {thing.shape}"
        words[f"{name}_article"] = _article(thing.colour)
        words[f"{name}_size"] = thing.size
    if scene.relation is not None:
        words["relation"] = scene.relation
        words["long_relation"] = f"to the {scene.relation}" if scene.relation.endswith(" of") else scene.relation
    return templates[wording % len(templates)].format(**words)


def vocabulary() -> frozenset[str]:
    """Every word of every caption of this world, in lower case."""
    texts = [re.sub(r"\{\w+\}", " ", template) for template in (*_ONE, *_TWO)]
    texts += [*RADII, *COLOURS, *SHAPES, *RELATIONS, "to the", *(_article(colour) for colour in COLOURS)]
    return frozenset(word for text in texts for word in re.findall(r"\w+", text))


def is_held_out(scene: Scene) -> bool:
    """True if the canonical caption belongs to the tenth that is never trained on."""
    return _is_in_the_tenth(caption(scene))


def held_out_captions(things: int) -> list[tuple[str, Scene]]:
    """Every held-out canonical caption of one or two things with its scene (positions are placeholders)."""
    kinds = [Thing(size, colour, shape) for size in RADII for colour in COLOURS for shape in SHAPES]
    if things == 1:
        scenes = [Scene((thing,), ground) for thing in kinds for ground in COLOURS if ground != thing.colour]
        return [(caption(scene), scene) for scene in scenes if is_held_out(scene)]
    if things == 2:
        return list(_held_out_pairs(kinds))
    raise ValueError(f"things {things} must be 1 or 2")


def _held_out_pairs(kinds: Sequence[Thing]) -> Iterator[tuple[str, Scene]]:
    """Held-out pairs of nearly two hundred thousand captions; a scene is made of the tenth alone."""
    for first, second in itertools.product(kinds, kinds):
        if first.colour == second.colour:
            continue
        words = {name: f"{one.size} {one.colour} {one.shape}" for name, one in (("first", first), ("second", second))}
        for ground in COLOURS:
            if ground in (first.colour, second.colour):
                continue
            words |= {"background": ground, "ground_article": _article(ground)}
            for relation in RELATIONS:
                text = _TWO[0].format(relation=relation, **words)
                if _is_in_the_tenth(text):
                    yield text, Scene((first, second), ground, relation)


def _is_in_the_tenth(canonical: str) -> bool:
    """True if the hash of a caption is, or that of its other spelling: "a orange background" is common too."""
    if hashlib.sha256(canonical.encode()).digest()[0] < HELD_OUT_BYTE:
        return True
    other = canonical.replace(" an ", " a ")
    return other != canonical and hashlib.sha256(other.encode()).digest()[0] < HELD_OUT_BYTE


def scenes(key: Key, count: int, *, two: float = 0.7, hold_out: bool = True) -> list[Scene]:
    """`count` scenes drawn at random, a share `two` of them with two objects; held-out captions are drawn again."""
    chosen: list[Scene] = []
    for attempt in itertools.count():
        missing = count - len(chosen)
        if missing <= 0:
            return chosen[:count]
        rows = prng.uniform(prng.fold_in(key, attempt), (missing + 16, 16)).tolist()
        candidates = (_scene(row, two) for row in rows)
        chosen += [scene for scene in candidates if not (hold_out and is_held_out(scene))]
    raise AssertionError("unreachable")


def placed(key: Key, scene: Scene) -> Scene:
    """The scene with its things at other places, drawn at random as `scenes` does."""
    return _placed(scene, prng.uniform(key, (4,)).tolist())


def draw(scene: Scene, side: int = SIDE, *, supersample: int = 4) -> "Image":
    """The scene as an RGB image `side` pixels wide, drawn larger and reduced by averaging."""
    from PIL import Image, ImageDraw

    scale = side * supersample / SIDE
    image = Image.new("RGB", (side * supersample, side * supersample), COLOURS[scene.background])
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _PENS[thing.shape](
            pen, thing.x * scale, thing.y * scale, RADII[thing.size] * scale, COLOURS[thing.colour], scene.background
        )
    return image.reduce(supersample)


def images(key: Key, count: int, *, side: int = SIDE, two: float = 0.7) -> tuple[torch.Tensor, list[str]]:
    """uint8 images (count, 3, side, side) and captions, six of ten canonical and the rest reworded."""
    import numpy

    scene_key, wording_key = prng.split(key)
    sampled = scenes(scene_key, count, two=two)
    wordings = prng.uniform(wording_key, (count, 2)).tolist()
    captions = [
        caption(scene, 0 if canonical < 0.6 else 1 + int(pick * 60))
        for scene, (canonical, pick) in zip(sampled, wordings, strict=True)
    ]
    arrays = numpy.stack([numpy.asarray(draw(scene, side)) for scene in sampled])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous(), captions


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


_ONE = (
    "a {first} on {ground_article} {background} background",
    "{first} on {background}",
    "a {first}, {background} background",
    "a picture of a {first} on {ground_article} {background} background",
    "{ground_article} {background} background with a {first}",
    "{first_article} {first_plain}, {first_size}, on {background}",
)
_TWO = (
    "a {first} {relation} a {second} on {ground_article} {background} background",
    "{first} {relation} {second} on {background}",
    "a {first} {long_relation} a {second}, {background} background",
    "a picture of a {first} {relation} a {second} on {ground_article} {background} background",
    "{ground_article} {background} background with a {first} {relation} a {second}",
    "a {first} {long_relation} a {second} on {background}",
)


def _scene(row: list[float], two: float) -> Scene:
    """A scene from 16 uniforms."""
    draws = iter(row)

    def pick(options):
        options = tuple(options)
        return options[min(int(next(draws) * len(options)), len(options) - 1)]

    pair = next(draws) < two
    ground = pick(COLOURS)
    first_colour = pick(colour for colour in COLOURS if colour != ground)
    second_colour = pick(colour for colour in COLOURS if colour not in (ground, first_colour))
    sizes, shapes = (pick(RADII), pick(RADII)), (pick(SHAPES), pick(SHAPES))
    relation = pick(RELATIONS)
    places = [next(draws) for _ in range(4)]
    first = Thing(sizes[0], first_colour, shapes[0])
    if not pair:
        return _placed(Scene((first,), ground), places)
    return _placed(Scene((first, Thing(sizes[1], second_colour, shapes[1])), ground, relation), places)


def _placed(scene: Scene, places: list[float]) -> Scene:
    """The things of the scene at places from four uniforms."""
    radii = [RADII[thing.size] for thing in scene.things]
    centres: Sequence[tuple[float, float]]
    if scene.relation is None:
        low, high = radii[0], SIDE - radii[0]
        centres = [(_between(low, high, places[0]), _between(low, high, places[1]))]
    else:
        centres = _place(RELATIONS[scene.relation], radii[0], radii[1], places)
    things = (replace(thing, x=x, y=y) for thing, (x, y) in zip(scene.things, centres, strict=True))
    return replace(scene, things=tuple(things))


def _place(
    direction: tuple[int, int], first: float, second: float, places: list[float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Two centres apart along the relation's axis by more than across it, bounding squares apart by at least GAP."""
    sign = direction[0] or direction[1]
    least, most = first + second + GAP, SIDE - first - second
    apart = _between(least, most, places[0])
    # Both stay inside the image: the pair may be anywhere along the axis.
    low, high = (first, second) if sign < 0 else (second, first)
    start = _between(low, SIDE - high - apart, places[1])
    along = (start, start + apart) if sign < 0 else (start + apart, start)
    across_first = _between(first, SIDE - first, places[2])
    # The relation must be unambiguous: the distance across is at most nine tenths of that along the axis.
    reach = 0.9 * apart
    across_second = _between(max(second, across_first - reach), min(SIDE - second, across_first + reach), places[3])
    if direction[0]:
        return (along[0], across_first), (along[1], across_second)
    return (across_first, along[0]), (across_second, along[1])


def _between(low: float, high: float, place: float) -> float:
    return low + (high - low) * place


def _circle(pen, x, y, r, colour, ground) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _square(pen, x, y, r, colour, ground) -> None:
    pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)


def _triangle(pen, x, y, r, colour, ground) -> None:
    pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)


def _star(pen, x, y, r, colour, ground) -> None:
    points = []
    for corner in range(10):
        radius = r if corner % 2 == 0 else 0.45 * r
        angle = math.pi * corner / 5
        points.append((x + radius * math.sin(angle), y - radius * math.cos(angle)))
    pen.polygon(points, fill=colour)


def _ring(pen, x, y, r, colour, ground) -> None:
    inner = r - 0.38 * r
    pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=COLOURS[ground])


def _cross(pen, x, y, r, colour, ground) -> None:
    pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=colour)
    pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=colour)


_PENS = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
