"""A model of an eighth of SD3.5-large's size draws an image under an eighth of the memory of a small machine.

    python -m bench.generation_memory FOLDER

FOLDER gets the model: random weights of all three encoders, the transformer (38 blocks) and the VAE in 16 bits, widths
divided by the root of eight, as shards of safetensors under diffusers' names; and the same under ours, in which nothing
has to be joined, and in int8. Each way is a process of its own, drawing 608 x 608 pixels (an eighth of the activations
of 1024 x 1024) with guidance, and is killed when it passes its limit.

The limit is on anonymous memory (RssAnon in /proc): what the system cannot drop. Pages of mapped files are none of it,
as they are read from the file again when they are needed; so a machine of 16 GB can compute with 28 GB of mapped
weights. RLIMIT_AS would count the mappings, and RLIMIT_DATA too, since they are private and writable. A cgroup's
memory.max kills at the same point (its page cache is dropped first); where one may be made,
`systemd-run --scope -p MemoryMax=2G` before a command does that. Anonymous memory is read every 10 ms.

"2 GB" is an eighth of a machine of 16 GB, the program itself counted. "1 GB more than the program" is an eighth of a
device of 8 GB: with our names nothing but what is copied to the device, and what is computed there, is anonymous.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from functional_sd3 import weights
from functional_sd3.core import spec as specs
from functional_sd3.image import vae
from functional_sd3.pipeline import estimate
from functional_sd3.text import clip, t5
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config, Model, quantize, shipped

GB = 1e9
PROMPT = "a red circle left of a blue star"
LAYOUTS = ("diffusers", "native", "int8")


class Way(NamedTuple):
    """layout: of the weights; options: of `generate`; limit: GB; beyond: whether the program itself is not counted."""

    layout: str
    options: str
    limit: float
    beyond: bool = False

    @property
    def name(self) -> str:
        where = {"diffusers": "diffusers' names", "native": "our names", "int8": "our names, int8"}[self.layout]
        return f"{where}, `{self.options}`"


WAYS = (
    Way("diffusers", "--dtype float32", 2.0),
    Way("diffusers", "--offload --dtype float32", 2.0),
    Way("diffusers", "--offload --dtype bfloat16", 2.0),
    Way("diffusers", "--block-swap 38 --dtype float32", 2.0),
    Way("native", "--offload --dtype float32", 1.0, True),
    Way("native", "--block-swap 38 --dtype float32", 1.0, True),
    Way("int8", "--offload --dtype bfloat16", 1.0, True),
)


def eighth() -> Config:
    """SD3.5-large with an eighth of the parameters."""
    tables = weights.outline(shipped.folder()).tokenizers
    assert tables.clip_l is not None and tables.clip_g is not None
    length = tables.clip_l.model_max_length
    small = replace(clip.CLIP_L, width=256, heads=4, mlp_width=1024, projection_width=256, vocab=49408, length=length)
    large = replace(clip.CLIP_G, width=448, heads=7, mlp_width=1792, projection_width=448, vocab=49408, length=length)
    return Config(
        clip_l=replace(small, eos_id=tables.clip_l.eos_id),
        clip_g=replace(large, eos_id=tables.clip_g.eos_id),
        t5=t5.Config(width=1472, heads=23, mlp_width=3584),
        transformer=mmdit.Config(depth=38, heads=13, context_width=1472, pooled_width=704, qk_norm=True),
        vae=vae.Config(channels=(48, 96, 192, 192), groups=16),
        schedule=weights.outline(shipped.folder()).config.schedule,
    )


def write(folder: Path) -> None:
    """The model in all layouts, where they are not there yet."""
    if all((folder / name).exists() for name in LAYOUTS):
        return
    generator = torch.Generator().manual_seed(0)

    def leaf(path: str, param: specs.Param) -> torch.Tensor:
        if not param.trainable:
            return param.init(torch.zeros(2, dtype=torch.int64), param.shape).to(torch.bfloat16)
        if len(param.shape) == 1:
            return torch.full(param.shape, float(path.endswith("weight")), dtype=torch.bfloat16)
        scale = 0.5 / math.sqrt(math.prod(param.shape[1:]))
        return torch.empty(param.shape, dtype=torch.bfloat16).normal_(0, scale, generator=generator)

    config = eighth()
    tables = weights.outline(shipped.folder()).tokenizers
    model = Model(specs.map_params(leaf, weights.spec(config)), config, tables)
    shard = 500_000_000
    weights.save(folder / "diffusers", model, layout="diffusers", shard_bytes=shard)
    weights.save(folder / "native", model, layout="native", shard_bytes=shard)
    small = {name: params if name == "vae" else quantize.quantize(params) for name, params in model.params.items()}
    weights.save(folder / "int8", model._replace(params=small), layout="native", shard_bytes=shard)


class Outcome(NamedTuple):
    """anonymous: most bytes that were seen; resident: with pages of files; seconds: of the processor; status: of the
    process, negative where it was killed."""

    anonymous: int
    resident: int
    seconds: float
    status: int


def watch(command: list[str], limit: float | None) -> Outcome:
    """Run a process and kill it when its anonymous memory passes `limit` bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = resident = 0
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            process.returncode = os.waitstatus_to_exitcode(status)
            break
        fields = memory(process.pid)
        most, resident = max(most, fields.get("RssAnon", 0)), fields.get("VmHWM", resident)
        if limit is not None and most > limit:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    return Outcome(most, resident, usage.ru_utime + usage.ru_stime, process.returncode)


def memory(process: int | str) -> dict[str, int]:
    """Bytes of the fields in kB of /proc/PID/status; process: its number, or "self"."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.split() for line in lines if line.endswith(" kB")]
    return {name.removesuffix(":"): 1024 * int(value) for name, value, _ in pairs}


def program() -> int:
    """Anonymous bytes of the program before it reads a model."""
    code = "import time; from functional_sd3.cli import generate, session, writer; time.sleep(0.5)"
    return watch([sys.executable, "-c", code], None).anonymous


def command(folder: Path, way: Way, side: int, steps: int) -> list[str]:
    out = ["--size", f"{side}x{side}", "--steps", str(steps), "--out", str(folder / "image.png")]
    return [sys.executable, "-m", "functional_sd3", "generate", PROMPT, "--params", str(folder / way.layout),
            "--device", "cpu", *way.options.split(), *out]  # fmt: skip


def estimated(way: Way, side: int, steps: int) -> int:
    """Anonymous bytes by `generate --estimate`, the program not counted."""
    choice = estimate.Choice(
        side // 8, side // 8, steps=steps, on_device=False,
        computed=torch.bfloat16 if "bfloat16" in way.options else torch.float32,
        offload="--offload" in way.options, swapped=38 if "--block-swap" in way.options else None,
        quantized=way.layout == "int8", fused=way.layout != "diffusers",
    )  # fmt: skip
    return estimate.peak(estimate.stages(eighth(), choice), on_device=False)[1]


def main(arguments: list[str] | None = None) -> int:
    """Print a row for each way; status 1 where one that should have drawn did not, or the other way round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gets 8 GB")
    parser.add_argument("--side", type=int, default=608)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("-k", default="", help="the ways whose names contain this")
    parsed = parser.parse_args(arguments)
    write(parsed.folder)
    before = program()
    print(f"the program alone: {before / GB:.2f} GB anonymous", flush=True)
    print("| weights, options | limit | estimate, GB | anonymous, GB | resident, GB | processor, s | |", flush=True)
    print("|---" * 7 + "|", flush=True)
    failed = False
    for way in WAYS:
        if parsed.k not in way.name:
            continue
        limit = way.limit * GB + (before if way.beyond else 0)
        result = watch(command(parsed.folder, way, parsed.side, parsed.steps), limit)
        ended = "drawn" if result.status == 0 else "killed" if result.status == -signal.SIGKILL else "failed"
        counted = result.anonymous - (before if way.beyond else 0)
        failed |= ended == "failed"
        said = f"{way.limit:.0f} GB" + (" more than the program" if way.beyond else "")
        expected = estimated(way, parsed.side, parsed.steps) + (0 if way.beyond else before)
        sizes = f"{expected / GB:.2f} | {counted / GB:.2f} | {result.resident / GB:.2f} | {result.seconds:.0f}"
        print(f"| {way.name} | {said} | {sizes} | {ended} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
