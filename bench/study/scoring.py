"""Accuracy, proxy reward and diversity of a model's images of held-out captions, from noise that is always the same."""

from typing import NamedTuple

from functional_sd3.core import prng
from functional_sd3.recipes.shapes import outlines, prompts, report, rewards, spread
from functional_sd3.weights import Model

KEY = 16
"""Seed of the noise, and of the world's images that the spread is compared with."""


class Drawing(NamedTuple):
    """How images are drawn: of how many captions of one or two things, in how many steps, at which guidance scale."""

    things: int
    steps: int
    cfg: float
    captions: int


def scores(model: Model, drawing: Drawing) -> dict[str, float | None]:
    """Fields of `results.Row` that are measured; those of the spread are None where no image is right."""
    images, scenes = report.held_out_images(
        model, drawing.things, drawing.captions, prng.key(KEY), steps=drawing.steps, cfg=drawing.cfg
    )
    measured: dict[str, float | None] = {
        "images": len(scenes),
        "right": prompts.table(images, scenes)["right"],
        "outlines": prompts.table(images, scenes, reader=outlines.read)["right"],
        "colours": float(rewards.colours(images, [""] * len(scenes), scenes)["colours"].mean()),
        "place": None,
        "side": None,
        "distance": None,
    }
    if measured["right"]:
        seen = spread.measure(images, scenes, prng.key(KEY), reader=prompts.read)
        # Of a few images the world's own spread may be 0: one image a group.
        measured["place"] = seen.place / seen.data_place if seen.data_place else None
        measured["side"] = seen.side / seen.data_side if seen.data_side else None
        measured["distance"] = seen.distance
    return measured
