"""The frozen base of a LoRA in less memory: `--base`, stored in one byte a weight, and `--block-swap`, blocks that stay
on the host."""

import argparse

import torch

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.parallel import offload
from functional_sd3.weights import quantize

DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


def place(arguments: argparse.Namespace, name: str, stored: Params, dtype: torch.dtype, device: torch.device) -> Params:
    """Parameters of a component of the base on the device, in `dtype` or --base; --block-swap blocks stay on the host.

    Blocks are converted one at a time. Those that stay are as they are stored, mapped from their file, or in --base.
    Raises ValueError for more blocks than there are, and for a device that has no such dtype.
    """
    count, depth = 0, len(stored["blocks"])
    if name == "transformer":
        count = getattr(arguments, "block_swap", None) or 0
    base = getattr(arguments, "base", None)
    if count > depth:
        raise ValueError(f"--block-swap {count} is more than the {depth} blocks of this transformer: give 1 to {depth}")
    if count and base and device.type == "cpu":
        raise ValueError(
            "--block-swap has no effect with --base on a CPU, where all blocks are in one memory: leave out one"
        )
    if base == "float8" and device.type == "mps":
        raise ValueError("--base float8: this device has no float8; --base int8 takes as much memory")

    def converted(block: Params) -> Params:
        block = tree.cast(block, dtype)
        if base is None:
            return block
        return quantize.quantize({"blocks": [block]}, DTYPES[base])["blocks"][0]

    rest = {name: [] if name == "blocks" else tree.cast(part, dtype) for name, part in stored.items()}
    first = depth - count
    blocks = [tree.to(converted(block), device) for block in stored["blocks"][:first]]
    held = stored["blocks"][first:] if base is None else [converted(block) for block in stored["blocks"][first:]]
    return offload.keep({**rest, "blocks": [*blocks, *held]}, count, device)
