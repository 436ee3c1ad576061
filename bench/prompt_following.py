"""Prompt following of a model in the shapes world: `python -m bench.prompt_following [--params DIR]`

Draws held-out captions (never trained on) at the model's default settings and reads the images back with both readers;
says too how spread the things are, and how originals of the world are read that its autoencoder encodes and decodes.
"""

import argparse
from pathlib import Path

import torch

from functional_sd3 import weights
from functional_sd3.core import prng
from functional_sd3.recipes.shapes import prompts, spread
from functional_sd3.recipes.shapes import report as shapes_report
from functional_sd3.weights import shipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=None)
    parser.add_argument("--count", type=int, default=200, help="captions of each kind")
    parser.add_argument("--noises", type=int, default=1, help="images of each caption")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, default=5.0)
    parsed = parser.parse_args()
    model = weights.load(parsed.params or shipped.folder(), dtype=torch.float32)
    options = {"noises": parsed.noises, "steps": parsed.steps, "cfg": parsed.cfg}
    print(f"| images | of | reader | {' | '.join(shapes_report.RESPECTS)} |")
    print("|---" * (len(shapes_report.RESPECTS) + 3) + "|")
    for things in (1, 2):
        images, scenes = shapes_report.held_out_images(model, things, parsed.count, prng.key(parsed.seed), **options)
        _print(f"{things} thing{'s' * (things > 1)}", images, scenes)
        print(f"{spread.measure(images, scenes, prng.key(parsed.seed), reader=prompts.read)}")
    _print("decoded originals", *shapes_report.decoded_originals(model, parsed.count, prng.key(parsed.seed)))


def _print(name: str, images: torch.Tensor, scenes: list) -> None:
    for reader, read in shapes_report.READERS.items():
        shares_right = prompts.table(images, scenes, reader=read)
        shares = " | ".join(f"{100 * shares_right[respect]:.1f} %" for respect in shapes_report.RESPECTS)
        print(f"| {name} | {len(scenes)} | {reader} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
