"""Which options fit on which cards: the table of docs/guides/scale.md, by `train --estimate`.

    python -m bench.cards

A cell is the first choice of a list, from the fastest to the leanest, of which one process needs at most nine tenths of
its card, and what it needs. One image of 1024 x 1024 a process and step, training from a cache.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch

from functional_sd3.cli.train_estimate import TRANSFORMERS
from functional_sd3.image import vae
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.text import clip, t5
from functional_sd3.training import estimate
from functional_sd3.training.memory_choice import Choice
from functional_sd3.training.update_rule import UpdateRule
from functional_sd3.weights import Config

CARDS = (24, 48, 80, 141)
"""Memory of a card in GB."""
COUNTS = (1, 8, 64)
SHARE = 0.9
BF16 = torch.bfloat16
MESHES = {1: {"data": "", "fsdp": ""}, 8: {"data": "data=8", "fsdp": "fsdp=8"},
          64: {"data": "data=64", "fsdp": "data=8,fsdp=8"}}  # fmt: skip
"""Number of cards -> --mesh of whole and of divided parameters."""


class Way(NamedTuple):
    """Options of the command line, which say the same as `choice`, and whether parameters are divided."""

    options: str
    choice: dict
    axis: str = "data"


_LEAN = {"rule": UpdateRule("adamw8bit", BF16), "remat": True}
_LORA = {"lora": 16, "dtype": BF16}
WAYS = {
    "all parameters": {
        "A": Way("--dtype bfloat16 --remat", {"dtype": BF16, "remat": True}),
        "B": Way("--dtype bfloat16 --remat --optimizer adamw8bit",
                 {"dtype": BF16, "remat": True, "rule": UpdateRule("adamw8bit")}),
        "C": Way("--dtype bfloat16 --remat", {"dtype": BF16, "remat": True}, "fsdp"),
        "D": Way("--weights bfloat16 --remat --optimizer adamw8bit", _LEAN),
        "E": Way("--weights bfloat16 --remat --optimizer adamw8bit", _LEAN, "fsdp"),
    },
    "LoRA of rank 16": {
        "F": Way("--lora 16 --dtype bfloat16", _LORA),
        "G": Way("--lora 16 --dtype bfloat16 --remat", {**_LORA, "remat": True}),
        "H": Way("--lora 16 --dtype bfloat16 --base int8", {**_LORA, "base": True}),
        "I": Way("--lora 16 --dtype bfloat16 --remat", {**_LORA, "remat": True}, "fsdp"),
    },
}  # fmt: skip
"""What learns -> letter -> way, from the fastest to the leanest."""


def choice(way: Way, count: int) -> Choice:
    """Of a run on `count` cards, with an image for each."""
    given = meshes.parse(text) if (text := MESHES[count][way.axis]) else {}
    mesh = Mesh({axis: given.get(axis, 1) for axis in meshes.AXES})
    return Choice(batch=count, side=128, tokens=333, encoders=False, mesh=mesh, **way.choice)


def needed(model: str, way: Way, count: int, measured: estimate.Measured) -> int:
    """Bytes of one process of `count`."""
    config = Config(clip.CLIP_L, clip.CLIP_G, t5.T5_XXL, TRANSFORMERS[model], vae.SD3_VAE)
    return estimate.memory(config, choice(way, count), measured).total


def rows() -> Iterator[str]:
    """Lines of the table."""
    yield "| model | what learns | cards | " + " | ".join(f"{card} GB" for card in CARDS) + " |"
    yield "|---|---|---|" + "---|" * len(CARDS)
    measured: estimate.Measured = {}
    for model in ("sd3.5-medium", "sd3.5-large"):
        for learns, ways in WAYS.items():
            for count in COUNTS:
                sizes = {letter: needed(model, way, count, measured) for letter, way in ways.items()
                         if count > 1 or way.axis == "data"}  # fmt: skip
                cells = []
                for card in CARDS:
                    fitting = [letter for letter, size in sizes.items() if size <= SHARE * card * 1e9]
                    cells.append(f"{fitting[0]}, {sizes[fitting[0]] / 1e9:.1f} GB" if fitting else "-")
                yield f"| {model} | {learns} | {count} | " + " | ".join(cells) + " |"


def ways() -> Iterator[str]:
    """Lines of the list of choices."""
    yield "| choice | options | `--mesh` on 8 cards | on 64 |"
    yield "|---|---|---|---|"
    for learns, named in WAYS.items():
        for letter, way in named.items():
            yield (f"| {letter}: {learns} | `{way.options}` | `{MESHES[8][way.axis]}` | `{MESHES[64][way.axis]}` |")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("\n".join([*rows(), "", *ways()]))  # noqa: T201


if __name__ == "__main__":
    main()
