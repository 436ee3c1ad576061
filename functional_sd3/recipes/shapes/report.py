"""Prompt following of a model of the shapes world, and the model card of params/tiny."""

from pathlib import Path

import torch

from functional_sd3 import pipeline
from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key
from functional_sd3.recipes import model_card
from functional_sd3.recipes.shapes import prompts, world
from functional_sd3.training import log
from functional_sd3.weights.model import Model


def prompt_following(
    model: Model, things: int, count: int, key: Key, *, batch: int = 25, **options
) -> dict[str, float]:
    """Shares of images that are right (see `prompts.table`), of `count` held-out captions of one or two things.

    The captions are spread evenly over all held-out ones; `options` go to `pipeline.generate`.
    """
    listed = world.held_out_captions(things)
    count = min(count, len(listed))
    chosen = [listed[index * len(listed) // count] for index in range(count)]
    images = []
    with torch.no_grad():
        for start in range(0, count, batch):
            captions = [caption for caption, _ in chosen[start : start + batch]]
            keys = prng.fold_in(key, torch.arange(start, start + len(captions), dtype=torch.int64, device="cpu"))
            images.append(pipeline.generate(model.params, model.config, model.tokenizers, captions, keys, **options))
    return prompts.table(torch.cat(images), [scene for _, scene in chosen]) | {"captions": count}


def describe(out: Path, model: Model, log_path: Path, *, command: str, history: str, captions: int = 200) -> None:
    """Write the model card: README.md, loss.png and samples.png with the run, its loss and its prompt following."""
    rows = [(int(row["step"]), float(row["loss"])) for row in log.read(log_path)]
    tables = [prompt_following(model, things, captions, prng.key(0)) for things in (1, 2)]
    names = ("right", "count", "shape", "colour", "size", "background", "relation")
    lines = [f"| things | captions | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for things, table in enumerate(tables, 1):
        shares = " | ".join(f"{100 * table[name]:.1f} %" for name in names)
        lines.append(f"| {things} | {table['captions']} | {shares} |")
    shown = [text for things in (1, 2) for text, _ in world.held_out_captions(things)[:: 8 + 1550 * (things - 1)][:8]]
    with torch.no_grad():
        samples = pipeline.generate(model.params, model.config, model.tokenizers, shown, prng.key(0))
    sizes = ", ".join(f"{name} {tree.count(part):,}" for name, part in model.params.items())
    text = f"""
A whole SD3.5 pipeline in miniature, in diffusers' folder layout, trained from scratch on the world of
`functional_sd3/recipes/shapes/world.py` by

    {command}

{history}.
Parameters: {sizes}. MIT licence, as the code.

## Prompt following

Held-out captions (never trained on) drawn at the default settings and read back by
`functional_sd3/recipes/shapes/prompts.py`; `python -m bench.prompt_following` measures it again.

{chr(10).join(lines)}"""
    model_card.write(out, title="params/tiny", text=text, log=rows, samples=samples, captions=shown)
