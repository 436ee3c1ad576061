"""Does a model draw what captions of the shapes world ask for? `python -m bench.prompt_following [--params DIR]`

Draws held-out captions (never trained on) at the model's default settings and reads the pictures back.
"""

import argparse
from pathlib import Path

import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng
from functional_sd3.metrics import prompts
from functional_sd3.training import shapes
from functional_sd3.weights import shipped


def measure(
    model: weights.Model, things: int, count: int, seed: int, *, batch: int = 25, **options
) -> dict[str, float]:
    """`prompts.table` over `count` held-out captions of one or two things, spread evenly over all of them."""
    listed = shapes.held_out_captions(things)
    chosen = [listed[index * len(listed) // count] for index in range(count)] if count < len(listed) else listed
    pictures = []
    with torch.no_grad():
        for start in range(0, len(chosen), batch):
            captions = [caption for caption, _ in chosen[start : start + batch]]
            keys = prng.fold_in(prng.key(seed), torch.arange(start, start + len(captions)))
            pictures.append(pipeline.generate(model.params, model.config, model.tokenizers, captions, keys, **options))
    return prompts.table(torch.cat(pictures), [scene for _, scene in chosen]) | {"captions": len(chosen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=None)
    parser.add_argument("--count", type=int, default=200, help="captions of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, default=5.0)
    parsed = parser.parse_args()
    model = weights.load(parsed.params or shipped.folder(), dtype=torch.float32)
    print("| things | captions | right | count | shape | colour | size | background | relation |")
    print("|---|---|---|---|---|---|---|---|---|")
    for things in (1, 2):
        found = measure(model, things, parsed.count, parsed.seed, steps=parsed.steps, cfg=parsed.cfg)
        names = ("right", "count", "shape", "colour", "size", "background", "relation")
        shares = " | ".join(f"{100 * found[name]:.1f} %" for name in names)
        print(f"| {things} | {found['captions']} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
