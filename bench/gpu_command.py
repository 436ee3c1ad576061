"""The command of a table that is measured on a GPU, part by part, or in small size anywhere."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu

Parts = Mapping[str, Callable[[gpu.Place, Any], Iterator[str]]]
"""Name of a part -> its rows of Markdown, each as it is measured."""


def run(
    module: Any,
    parts: Parts,
    *,
    says: str,
    columns: Sequence[str],
    rounds: int,
    arguments: Sequence[str] | None,
    title: str = "",
) -> int:
    """Prints the table of `module`, whose `SIZES` it takes; status 1 where there is no CUDA device and none other was
    named, or where a part failed. says: what stands behind the machine and PyTorch's version, above the table.
    title: of the file."""
    name = f"bench.{module.__file__.rpartition('/')[2].removesuffix('.py')}"
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=module.__doc__)
    parser.add_argument("--size", choices=module.SIZES, default="true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        print(f"{name} needs a CUDA device and finds none; --device cpu --size small runs", file=sys.stderr)
        return 1
    place = gpu.Place(torch.device(parsed.device), parsed.rounds, {}, [])
    machine = torch.cuda.get_device_name() if place.cuda else str(place.device)
    lines = [
        f"{machine}, torch {torch.__version__}{says}",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    print("\n".join(lines), flush=True)
    failed = False
    for part, rows in parts.items():
        try:
            for row in rows(place, module.SIZES[parsed.size]):
                lines.append(row)
                print(row, flush=True)
                if parsed.out:
                    parsed.out.write_text(title + "\n".join(lines) + "\n", encoding="utf-8")
        except (RuntimeError, ValueError) as error:
            failed = True
            print(f"{part} failed: {type(error).__name__}: {str(error)[:800]}", flush=True)
    return int(failed)
