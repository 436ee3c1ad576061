"""One evaluation of a transformer that stays in its files, beside diffusers' ways of offloading, each a process.

    python -m bench.generation_memory FOLDER -k none     # writes the model, an eighth of SD3.5-large
    python -m bench.offload_peers FOLDER

Processor seconds of an evaluation of two rows in bfloat16 after one that is not counted, and anonymous memory beyond
the program's: ours with all blocks mapped and swapped; diffusers' group offload by blocks, with weights in memory and
on disk; and accelerate's sequential offload from disk, which `enable_sequential_cpu_offload` is built of but refuses on
a CPU.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import generation_memory, timing
from functional_sd3 import weights
from functional_sd3.core import prng
from functional_sd3.pipeline import swap_blocks
from functional_sd3.transformer import mmdit

BF16 = torch.bfloat16
CPU = torch.device("cpu")


def inputs(config: mmdit.Config, side: int) -> tuple[Tensor, ...]:
    """latents, context, pooled, t of two rows."""
    shapes = (2, 16, side // 8, side // 8), (2, 154, config.context_width), (2, config.pooled_width)
    drawn = [prng.normal(key, shape).to(BF16) for key, shape in zip(prng.split(prng.key(0), 3), shapes, strict=True)]
    return (*drawn, torch.full((2,), 0.7))


def ours(folder: Path, given: tuple[Tensor, ...], work: str) -> Callable[[], Tensor]:
    path = folder / "native"
    mapped = weights.fetcher(path, dtype="stored", finite=False)
    fetch, config = swap_blocks(mapped, weights.outline(path).config, 38, CPU, dtype=BF16)
    params = fetch("transformer") if callable(fetch) else fetch["transformer"]
    latents, context, pooled, t = given
    options = config.computations["transformer"].options
    return partial(mmdit.apply, params, config.transformer, latents, t, context, pooled, **options)


def theirs(offload: Callable[[Any, str], Any], folder: Path, given: tuple[Tensor, ...], work: str) -> Callable:
    from diffusers import SD3Transformer2DModel

    loaded = SD3Transformer2DModel.from_pretrained(folder / "diffusers" / "transformer", torch_dtype=BF16)
    module, (latents, context, pooled, t) = offload(loaded, work), given
    return lambda: module(latents, context, pooled, 1000 * t, return_dict=False)[0]


def group(module: Any, work: str, *, disk: bool = False) -> Any:
    from diffusers.hooks import apply_group_offloading

    place = {"offload_to_disk_path": work} if disk else {}
    apply_group_offloading(module, CPU, CPU, offload_type="block_level", num_blocks_per_group=1, **place)
    return module


def sequential(module: Any, work: str) -> Any:
    from accelerate import disk_offload

    return disk_offload(module, work, execution_device=CPU)


WAYS = {
    "ours, `--block-swap 38`": ours,
    "group offload": partial(theirs, group),
    "group offload to disk": partial(theirs, partial(group, disk=True)),
    "sequential offload from disk": partial(theirs, sequential),
}


def measure(folder: Path, way: str, side: int) -> dict[str, Any]:
    """seconds: of the processor; anonymous, start: bytes; result: the velocity's values."""
    from diffusers import SD3Transformer2DModel  # noqa: F401, so that the program holds the same for all

    start = generation_memory.memory("self")["RssAnon"]
    with tempfile.TemporaryDirectory(dir=folder) as work, torch.no_grad():
        run = WAYS[way](folder, inputs(generation_memory.eighth().transformer, side), work)
        result = run()
        held = generation_memory.memory("self")["RssAnon"]
        before = time.process_time()
        run()
        return {"seconds": time.process_time() - before, "held": held - start, "result": result.flatten().tolist()}


def main(arguments: list[str] | None = None) -> int:
    """Prints a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--way", choices=WAYS, help="this one, in this process, as JSON")
    parsed = parser.parse_args(arguments)
    if parsed.way:
        print(json.dumps(measure(parsed.folder, parsed.way, parsed.side)))
        return 0
    import subprocess

    print("| way | processor, s | anonymous after it, GB | relative difference |\n|---|---|---|---|", flush=True)
    reference = None
    for way in WAYS:
        command = [sys.executable, "-m", "bench.offload_peers", str(parsed.folder), "--side", str(parsed.side)]
        out = subprocess.run([*command, "--way", way], capture_output=True, text=True, check=True).stdout
        found = json.loads(out.splitlines()[-1])
        result = torch.tensor(found["result"], dtype=torch.float64)
        reference = result if reference is None else reference
        difference = timing.relative_difference(reference, result)
        print(f"| {way} | {found['seconds']:.1f} | {found['held'] / 1e9:.2f} | {difference:.0e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
