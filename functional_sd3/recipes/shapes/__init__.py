"""Coloured shapes on plain backgrounds: a procedural world with captions, and the recipe of `params/tiny` on it.

`world` draws scenes, `prompts` reads images back, `architecture` and `stages` define the model and its training,
`tiny` runs it.
"""

from functional_sd3.recipes.shapes.world import (
    COLOURS,
    GAP,
    RADII,
    RELATIONS,
    SHAPES,
    SIDE,
    Scene,
    Thing,
    caption,
    draw,
    held_out_captions,
    images,
    is_held_out,
    scenes,
    vocabulary,
)

__all__ = [
    "COLOURS",
    "GAP",
    "RADII",
    "RELATIONS",
    "SHAPES",
    "SIDE",
    "Scene",
    "Thing",
    "caption",
    "draw",
    "held_out_captions",
    "images",
    "is_held_out",
    "scenes",
    "vocabulary",
]
