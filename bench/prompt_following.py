"""Does a model draw what captions of the shapes world ask for? `python -m bench.prompt_following [--params DIR]`

Draws held-out captions (never trained on) at the model's default settings and reads the pictures back.
"""

import argparse
from pathlib import Path

import torch

from functional_sd3 import weights
from functional_sd3.core import prng
from functional_sd3.recipes.shapes import report as shapes_report
from functional_sd3.weights import shipped


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
        found = shapes_report.prompt_following(
            model, things, parsed.count, prng.key(parsed.seed), steps=parsed.steps, cfg=parsed.cfg
        )
        names = ("right", "count", "shape", "colour", "size", "background", "relation")
        shares = " | ".join(f"{100 * found[name]:.1f} %" for name in names)
        print(f"| {things} | {found['captions']} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
