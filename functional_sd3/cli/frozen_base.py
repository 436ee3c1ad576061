"""The frozen base of a LoRA in less memory: `--base`, stored in one byte a weight, and `--block-swap`, blocks that stay
on the host."""

import argparse

import torch

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.parallel import offload
from functional_sd3.training import division
from functional_sd3.weights import quantize

DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


def place(
    arguments: argparse.Namespace,
    name: str,
    stored: Params,
    dtype: torch.dtype,
    device: torch.device,
    part: division.Part | None = None,
) -> Params:
    """Parameters of a component of the base on the device, in `dtype` or --base; --block-swap blocks stay on the host.

    Blocks are converted one at a time. Those that stay are as they are stored, mapped from their file, or in --base.
    part: this process's part of the component, None for the whole; weights are cut after they are in --base.
    Raises ValueError for more blocks than there are, and for a device that has no such dtype.
    """
    count, depth = 0, len(stored["blocks"])
    if name == "transformer":
        count = getattr(arguments, "block_swap", None) or 0
    base = getattr(arguments, "base", None)
    offload.check_count(count, {name: depth}, "--block-swap")
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

    first = depth - count
    blocks = []
    for number, block in enumerate(stored["blocks"]):
        own = converted(block) if number < first or base is not None else block
        own = own if part is None else part.block(number, own)
        blocks.append(tree.to(own, device) if number < first else own)
    rest = {name: leaves for name, leaves in stored.items() if name != "blocks"}
    rest = tree.cast(rest if part is None else part.rest(rest), dtype)
    return offload.keep({name: blocks if name == "blocks" else rest[name] for name in stored}, count, device)
