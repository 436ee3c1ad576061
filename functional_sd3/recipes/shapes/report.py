"""Prompt following of a model of the shapes world, and the model card of params/tiny."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sd3 import pipeline
from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key
from functional_sd3.image import pixels, vae
from functional_sd3.layouts.components import require
from functional_sd3.recipes import model_card
from functional_sd3.recipes.shapes import outlines, prompts, spread, world
from functional_sd3.weights.model import Model

RESPECTS = ("right", "count", "shape", "colour", "size", "background", "relation")
READERS: dict[str, prompts.Reader] = {"prompts": prompts.read, "outlines": outlines.read}
"""Readers of images by the module they are of."""


def held_out_images(
    model: Model, things: int, count: int, key: Key, *, noises: int = 1, batch: int = 25, **options
) -> tuple[Tensor, list[world.Scene]]:
    """Images (captions * noises, 3, height, width) of `count` held-out captions of one or two things, and their scenes.

    The captions are spread evenly over all held-out ones, of which there may be fewer, and drawn from `noises` noises
    each; `options` go to `pipeline.generate`.
    """
    listed = world.held_out_captions(things)
    count = min(count, len(listed))
    chosen = [listed[index * len(listed) // count] for index in range(count)] * noises
    images = []
    with torch.no_grad():
        for start in range(0, len(chosen), batch):
            captions = [caption for caption, _ in chosen[start : start + batch]]
            keys = prng.fold_in(key, torch.arange(start, start + len(captions), dtype=torch.int64, device="cpu"))
            images.append(pipeline.generate(model.params, model.config, model.tokenizers, captions, keys, **options))
    return torch.cat(images), [scene for _, scene in chosen]


def prompt_following(
    model: Model, things: int, count: int, key: Key, *, noises: int = 1, batch: int = 25, **options
) -> dict[str, float]:
    """Shares of images that are right (see `prompts.table`), of those of `held_out_images`."""
    images, scenes = held_out_images(model, things, count, key, noises=noises, batch=batch, **options)
    return prompts.table(images, scenes) | {"captions": len(scenes) // noises}


def decoded_originals(model: Model, count: int, key: Key) -> tuple[Tensor, list[world.Scene]]:
    """Images of `count` scenes, held-out ones among them, encoded and decoded by the model's autoencoder."""
    scenes, config = world.scenes(key, count, hold_out=False), require(model.config, "vae")
    decoded = []
    with torch.no_grad():
        for start in range(0, count, 50):
            originals = pixels.to_signed(pixels.from_pil([world.draw(scene) for scene in scenes[start : start + 50]]))
            latents = vae.encode(model.params["vae"], config, originals).mean
            decoded.append(pixels.from_signed(vae.decode(model.params["vae"], config, latents)))
    return torch.cat(decoded), scenes


def describe(
    out: Path,
    model: Model,
    curves: Sequence[model_card.Curve],
    *,
    command: str,
    history: str,
) -> None:
    """Write the model card: README.md, curves and samples.png with the run, its logs and its prompt following."""
    captions, images = samples(model)
    sizes = ", ".join(f"{name} {tree.count(part):,}" for name, part in model.params.items())
    text = f"""
A whole SD3.5 pipeline in miniature, in diffusers' folder layout, trained from scratch on the world of
`functional_sd3/recipes/shapes/world.py` by

    {command}

{history}.
Parameters: {sizes}. MIT licence, as the code.

{following(model, {"default settings": {}}, decoded=300)}"""
    model_card.write(out, title="params/tiny", text=text, curves=curves, samples=images, captions=captions)


def samples(model: Model, **options: Any) -> tuple[list[str], Tensor]:
    """Sixteen held-out captions, eight of one thing and eight of two, and their images; `options` as above."""
    captions = [
        text for things in (1, 2) for text, _ in world.held_out_captions(things)[:: 8 + 1550 * (things - 1)][:8]
    ]
    with torch.no_grad():
        images = pipeline.generate(model.params, model.config, model.tokenizers, captions, prng.key(0), **options)
    return captions, images


def following(
    model: Model, settings: Mapping[str, Mapping[str, Any]], *, captions: int = 300, noises: int = 2, decoded: int = 0
) -> str:
    """The sections of a model card on what is drawn right, and how diverse it is.

    settings: options of `pipeline.generate` by what to call them. captions: of two things; those of one are all.
    decoded: number of the world's images that are encoded and decoded too, 0 for none.
    """
    head = ["| images | drawn | of | reader |", "|---|---|---|---|"]
    table = [
        each + rest for each, rest in zip(head, (f" {' | '.join(RESPECTS)} |", "---|" * len(RESPECTS)), strict=True)
    ]
    spreads = [
        "| images | drawn | right | place, px | the world's | side, px | the world's | distance | of two draws |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_setting = {
        (name, how): held_out_images(model, things, captions, prng.key(0), noises=noises, **options)
        for how, options in settings.items()
        for things, name in ((1, "one thing"), (2, "two things"))
    }
    if decoded:
        by_setting["decoded originals", ""] = decoded_originals(model, decoded, prng.key(1))
    for (name, how), (images, scenes) in by_setting.items():
        for reader, read in READERS.items():
            shares = prompts.table(images, scenes, reader=read)
            row = " | ".join(f"{100 * shares[each]:.1f} %" for each in RESPECTS)
            table.append(f"| {name} | {how} | {len(scenes)} | {reader} | {row} |")
        measured = spread.measure(images, scenes, prng.key(2), reader=prompts.read)
        values = " | ".join(f"{value:.2f}" for value in measured[1:])
        spreads.append(f"| {name} | {how} | {measured.images} | {values} |")
    lines = "\n".join
    return f"""## Prompt following

Held-out captions (never trained on), {noises} noises each, read back by `functional_sd3/recipes/shapes/prompts.py`, by
which the model was rewarded, and by `outlines.py` there, by which it was not; `python -m bench.prompt_following`
measures it again.

{lines(table)}

## Diversity

Right images against as many of the world with the same captions (`functional_sd3/recipes/shapes/spread.py`): standard
deviations of the things' coordinates and of their sides, the square roots of their areas, and the Kolmogorov-Smirnov
distance of the coordinates from the world's.

{lines(spreads)}"""
