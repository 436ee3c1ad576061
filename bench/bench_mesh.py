"""Training divided over processes, beside one process and FSDP2 of diffusers' transformer (`bench.sharded`)."""

import json
import os
import statistics
import subprocess
import sys

import pytest

from bench.sharded import BATCH, SIZES, TOKENS

FSDP2 = "diffusers' module, FSDP2, fused AdamW"
WORK = f"width {SIZES.width}, {SIZES.depth} blocks, {(SIZES.sample_size // 2) ** 2} + {TOKENS} tokens, batch {BATCH}"
ROWS = [
    (1, "one process", "one", "diffusers", "diffusers' module, fused AdamW"),
    (1, "one process, remat", "one+remat", "diffusers+remat", "diffusers' module, checkpointing, fused AdamW"),
    *[
        (count, f"FSDP, {count} process{'es' * (count > 1)}{', remat' * bool(remat)}", f"fsdp={count}{remat}",
         f"diffusers{remat}", FSDP2 + ", checkpointing" * bool(remat))
        for count in (1, 2, 4) for remat in ("", "+remat")
    ],
    (2, "sequence=2, remat", "sequence=2+remat", "one+remat", "all of the work in one process"),
    (2, "tensor=2, remat", "tensor=2+remat", "one+remat", "all of the work in one process"),
    (1, "LoRA, remat, base in int8", "one+lora+remat+int8", "one+lora+remat", "base in float32"),
    (1, "LoRA, remat, half of the blocks swapped", "one+lora+remat+swap", "one+lora+remat", "base in float32"),
]  # fmt: skip


def processes(count: int, *words: str) -> list[dict]:
    """What the processes measured. FSDP2 wants a process group of one process too."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    words = ("-m", "bench.sharded", *words)
    command = [*launch, *words] if count > 1 or words[2].startswith("fsdp") else [sys.executable, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("count", "name", "ours", "theirs", "peer"), ROWS, ids=[row[1] for row in ROWS])
def test_step(versus, count, name, ours, theirs, peer):
    everyone = processes(count, ours, theirs, "--rounds", str(versus.most or 7))
    mine, other = everyone[0]["losses"]
    difference = abs(mine - other) / abs(other)
    assert difference < 0.01, (mine, other)
    peaks = [max(each["bytes"][side] for each in everyone) for side in (0, 1)]
    processor, wall = (
        [[statistics.mean(each["seconds"][side][number][clock] for each in everyone)
          for number in range(len(everyone[0]["seconds"][side]))] for side in (0, 1)]
        for clock in (0, 1)
    )  # fmt: skip
    ratio = statistics.median(wall[0]) / statistics.median(wall[1])
    versus.compare(
        f"training step, {WORK}: {name}",
        *processor,
        peer=peer,
        difference=difference,
        process_bytes=f"{peaks[0] / 2**20:.0f} MiB / {peaks[1] / 2**20:.0f} MiB, ratio {peaks[0] / peaks[1]:.2f}",
        wall_ratio=f"{ratio:.2f}",
    )
