"""Log-likelihood of images under their caption against a shuffled one: `python -m bench.likelihood [--params DIR]`

Held-out scenes of the shapes world (whose captions were never trained on) are drawn and encoded, and compared under
their caption and under a caption of the same words in which two things, or a thing and the background, have exchanged
one attribute. Prints how often the true caption is likelier, by log-likelihood and by the training loss.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3 import pipeline, weights
from functional_sd3.cli import ranking
from functional_sd3.core import prng
from functional_sd3.core.types import Key
from functional_sd3.flow import ode
from functional_sd3.flow.analysis import likelihood
from functional_sd3.image import pixels
from functional_sd3.recipes import shapes
from functional_sd3.recipes.shapes import Scene
from functional_sd3.weights import Model, shipped

ATTRIBUTES = ("colour", "shape", "size")


class Pair(NamedTuple):
    """A scene, and its caption with one attribute exchanged."""

    scene: Scene
    shuffled: str
    attribute: str
    """"colour", "shape" or "size" of two things; "background": the thing's colour and that of the background."""


def pairs(key: Key, count: int) -> list[Pair]:
    """Held-out scenes as `shapes.scenes` draws them, seven of ten with two things."""
    held_out: list[Scene] = []
    while len(held_out) < count:
        key, drawn = prng.split(key)
        held_out += [scene for scene in shapes.scenes(drawn, 512, hold_out=False) if shapes.is_held_out(scene)]
    choices = prng.uniform(key, count).tolist()
    return [_pair(scene, choice) for scene, choice in zip(held_out[:count], choices, strict=True)]


def latents(model: Model, scenes: list[Scene]) -> Tensor:
    images = pixels.from_pil([shapes.draw(scene) for scene in scenes])
    return pipeline.encode_images(model.params, model.config, images)


def advantages(model: Model, pairs: list[Pair], key: Key, **run) -> tuple[Tensor, Tensor]:
    """Log-likelihood (nats) of each image under its caption less that under the shuffled one, with its standard error.

    run: options of `likelihood.estimate`.
    """
    x0 = latents(model, [pair.scene for pair in pairs])
    keys = prng.fold_in(key, torch.arange(len(pairs)))
    true, shuffled = (likelihood.estimate(field, x0, key=keys, **run) for field in _fields(model, pairs))
    gained = true.log_prior + true.volumes - shuffled.log_prior - shuffled.volumes
    return gained.mean(0), likelihood.standard_error(gained)


def loss_advantages(model: Model, pairs: list[Pair], key: Key, draws: int) -> tuple[Tensor, Tensor]:
    """Loss under the shuffled caption less that under the caption, with its standard error."""
    x0 = latents(model, [pair.scene for pair in pairs])
    keys = prng.fold_in(key, torch.arange(len(pairs)))
    true, shuffled = (likelihood.losses(field, x0, keys, draws=draws) for field in _fields(model, pairs))
    return (shuffled - true).mean(0), likelihood.standard_error(shuffled - true)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=None)
    parser.add_argument("--count", type=int, default=200, help="images")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--method", default="euler")
    parser.add_argument("--probes", type=int, default=2)
    parser.add_argument("--draws", type=int, default=4, help="of the loss")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    model = weights.load(parsed.params or shipped.folder(), dtype=torch.float32)
    scenes_key, probes_key = prng.split(prng.key(parsed.seed))
    chosen = pairs(scenes_key, parsed.count)
    parts = [chosen[start : start + parsed.batch] for start in range(0, len(chosen), parsed.batch)]
    run = {
        "method": ode.named(parsed.method),
        "times": ranking.times(parsed.steps),
        "divergence": "hutchinson",
        "probes": parsed.probes,
        "mode": "reverse",
    }
    how = f"likelihood, {parsed.steps} steps of {parsed.method}, {parsed.probes} probes"
    ways = {
        how: lambda part, key: advantages(model, part, key, **run),
        f"loss, {parsed.draws} draws": lambda part, key: loss_advantages(model, part, key, parsed.draws),
    }
    kinds = sorted({pair.attribute for pair in chosen})
    print("| by | seconds | true caption wins | median advantage | median error | " + " | ".join(kinds) + " |")
    print("|---" * (5 + len(kinds)) + "|")
    for name, way in ways.items():
        start = time.perf_counter()
        with torch.no_grad():
            estimates = [way(part, prng.fold_in(probes_key, index)) for index, part in enumerate(parts)]
        seconds = time.perf_counter() - start
        gained, error = (torch.cat(each) for each in zip(*estimates, strict=True))
        cells = [_share(gained, chosen, kind) for kind in (None, *kinds)]
        middle = f"{gained.median():.3g} | {error.median():.2g}"
        print(f"| {name} | {seconds:.0f} | {cells[0]} | {middle} | " + " | ".join(cells[1:]) + " |", flush=True)


def _pair(scene: Scene, choice: float) -> Pair:
    first = scene.things[0]
    if len(scene.things) == 1:
        shuffled = Scene((replace(first, colour=scene.background),), first.colour)
        return Pair(scene, shapes.caption(shuffled), "background")
    second = scene.things[1]
    differing = [name for name in ATTRIBUTES if getattr(first, name) != getattr(second, name)]
    name = differing[int(choice * len(differing))]
    things = (replace(first, **{name: getattr(second, name)}), replace(second, **{name: getattr(first, name)}))
    return Pair(scene, shapes.caption(replace(scene, things=things)), name)


def _fields(model: Model, pairs: list[Pair]):
    for captions in ([shapes.caption(pair.scene) for pair in pairs], [pair.shuffled for pair in pairs]):
        conditions = pipeline.encode(model.params, model.config, model.tokenizers, captions)
        yield pipeline.velocity(model.params, model.config, conditions, 1.0)


def _share(gained: Tensor, pairs: list[Pair], kind: str | None) -> str:
    chosen = gained[torch.tensor([kind in (None, pair.attribute) for pair in pairs])]
    return f"{int((chosen > 0).sum())} of {len(chosen)} ({100 * (chosen > 0).float().mean():.1f} %)"


if __name__ == "__main__":
    main()
