"""Steps of training, divided over processes or not, two ways side by side: what bench_mesh measures.

    torchrun --nproc-per-node 2 -m bench.sharded fsdp=2+remat diffusers+remat --rounds 5

A way is a mesh, or "one" for all of the work in every process, with "remat", "lora", "int8" (the base of the LoRA) or
"swap" (half of its blocks stay in their file); or "diffusers", with "remat": its transformer under `fully_shard` of
PyTorch's FSDP2, each block and the whole, or in one process alone. All train one network on one batch, noise and times
too, with AdamW after clipping to the global norm, one thread a process, gloo. Prints a line of JSON: for both ways the
loss of the first step, and of each process the bytes at the peak of a step and the seconds of each round, of the
processor and of the wall.
"""

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bench import peers
from functional_sd3 import lora, weights
from functional_sd3.core import prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.computation import Computation
from functional_sd3.core.types import Params
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel import offload, sharding, tensor
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh
from functional_sd3.training import objectives, optim, step
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config, quantize
from functional_sd3.weights.model import Model

SIZES = mmdit.Config(
    depth=6, heads=4, position_size=32, sample_size=32, context_width=256, pooled_width=256, qk_norm=True
)
BATCH, TOKENS, RANK = 4, 77, 8
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's mallopt."""


class Run(NamedTuple):
    """A step of training, which returns its loss, and the bytes that stay in memory between steps."""

    step: Callable[[], Tensor]
    stays: int


def batch() -> dict[str, Tensor]:
    keys = prng.split(prng.key(0), 5)
    side = SIZES.sample_size
    image = (SIZES.in_channels, side, side)
    shapes = {"latents": image, "noise": image, "context": (TOKENS, SIZES.context_width), "pooled": (256,)}
    drawn = {name: prng.normal(key, (BATCH, *shape)) for key, (name, shape) in zip(keys, shapes.items(), strict=False)}
    return {**drawn, "t": prng.uniform(keys[4], (BATCH,))}


def ours(params: Params, mesh: Mesh, options: Collection[str], folder: Path) -> Run:
    """This project's step."""
    spec = {"transformer": mmdit.spec(SIZES)}
    layout = None
    computed = Computation(block_transform=transform.remat if "remat" in options else None)
    learned: Params = {"transformer": params}
    whole: Callable[[Params], Params] = lambda learned: learned  # noqa: E731
    frozen = 0
    if mesh.size("tensor", "sequence") > 1:
        computed = replace(computed, mesh=mesh)
    if mesh.size("tensor") > 1:
        learned = {"transformer": tensor.cut(params, spec["transformer"], mesh, heads=SIZES.heads)}
        spec = {"transformer": tensor.part_spec(spec["transformer"], mesh, heads=SIZES.heads)}
        layout = sharding.layout(spec, mesh)
    if mesh.size("fsdp") > 1:
        layout = sharding.layout(spec, mesh)
        computed = replace(computed, materialize=sharding.materialize(layout["transformer"], mesh))
        learned = sharding.shard(learned, layout, mesh)
    if "lora" in options:
        base, frozen, materialize = _base(params, options, folder)
        computed = replace(computed, materialize=materialize)
        spec = lora.spec(spec, RANK, "transformer.blocks.*attention*")
        learned = specs.init(prng.key(1), spec)
        whole = lambda learned: lora.apply({"transformer": base}, learned, lazy=True)  # noqa: E731
    loss = objectives.flow_loss(Config(transformer=SIZES, computations={"transformer": computed}))
    rule = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-5, decay=0.01))
    chosen = step.trainable(spec)
    train = step.make_train_step(
        lambda learned, batch, keys: loss(whole(learned), batch, keys),
        rule, trainable=chosen, ema_decay=None, donate=True, mesh=mesh, layout=layout,
    )  # fmt: skip
    held = [step.init(prng.key(0), learned, rule, trainable=chosen, average=False)]
    del learned
    data = batch()

    def run() -> Tensor:
        held[0], metrics = train(held[0], data)
        return metrics["loss"]

    return Run(run, tree.nbytes(held[0]) + frozen)


def _base(params: Params, options: Collection[str], folder: Path) -> tuple[Params, int, Any]:
    """The frozen base of a LoRA, its bytes that are not in a file, and what materialises its blocks."""
    if "int8" in options:
        base = quantize.quantize(params)
        return base, tree.nbytes(base), None
    if "swap" not in options:
        return params, tree.nbytes(params), None
    weights.save(folder, Model({"transformer": params}, Config(transformer=SIZES)))
    mapped = weights.load(folder, dtype="stored").params["transformer"]
    first = SIZES.depth // 2
    base = {**params, "blocks": [*params["blocks"][:first], *mapped["blocks"][first:]]}
    copied = offload.materialize(base["blocks"], "cpu", dtype=torch.float32)
    # A copy of what is float32 already: on a CPU a mapped tensor would be computed with as it is.
    held = {leaf.data_ptr() for block in base["blocks"][first:] for leaf in tree.leaves(block)}
    copy = lambda part: tree.map(lambda leaf: leaf.clone() if leaf.data_ptr() in held else leaf, copied(part))  # noqa: E731
    return base, tree.nbytes({**base, "blocks": base["blocks"][:first]}), copy


def diffusers(module: torch.nn.Module, mesh: Mesh, options: Collection[str]) -> Run:
    """diffusers' module, sharded as users of FSDP2 do."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if "remat" in options:
        module.enable_gradient_checkpointing()
    module.train()
    if dist.is_initialized():
        devices = init_device_mesh("cpu", (mesh.size(),))
        for block in module.transformer_blocks:
            fully_shard(block, mesh=devices)
        fully_shard(module, mesh=devices)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    own = {name: meshes.own_rows(value, mesh) for name, value in batch().items()}
    latents, noise, t = own["latents"], own["noise"], own["t"]

    def run() -> Tensor:
        mixed = (1 - t.view(-1, 1, 1, 1)) * latents + t.view(-1, 1, 1, 1) * noise
        velocity = module(mixed, own["context"], own["pooled"], 1000 * t, return_dict=False)[0]
        loss = (velocity - (noise - latents)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sharding.mean(loss.detach(), mesh)

    local = [getattr(leaf, "to_local", lambda leaf=leaf: leaf)() for leaf in module.parameters()]
    return Run(run, 3 * sum(leaf.nbytes for leaf in local))


def made(way: str, pair: peers.Pair, folder: Path) -> Run:
    """The run of a way. Each has parameters of its own."""
    name, *options = way.split("+")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if name == "diffusers":
        module = peers.transformer_module(SIZES)
        module.load_state_dict(pair.module.state_dict())
        return diffusers(module, meshes.init({"fsdp": count}), options)
    mesh = ONE_PROCESS if name == "one" else meshes.init(meshes.parse(name))
    return ours(tree.map(torch.clone, pair.params), mesh, options, folder)


def peak(run: Run) -> int:
    """Bytes that stay, and the most resident memory that a step adds, gloo's included."""
    run.step()
    _barrier()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run.step()
    return run.stays + resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of a field of Linux's /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def seconds(run: Run) -> tuple[float, float]:
    """Of this process's processor, and of the wall."""
    _barrier()
    start = time.process_time(), time.perf_counter()
    run.step()
    return time.process_time() - start[0], time.perf_counter() - start[1]


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def measured(ways: Sequence[str], rounds: int) -> dict[str, Any]:
    """The line of JSON of this process."""
    allocator: Any = ctypes.CDLL(None)
    # What is freed is given back at once, so that resident memory is that of the tensors that are alive.
    allocator.mallopt(_MMAP_THRESHOLD, 1 << 16)
    # Of biases, which the module draws itself.
    torch.manual_seed(0)
    pair = peers.transformer(SIZES)
    with tempfile.TemporaryDirectory() as folder:
        runs = [made(way, pair, Path(folder)) for way in ways]
        del pair
        losses = [float(run.step()) for run in runs]
        bytes_of = [peak(run) for run in runs]
        # As long runs have it, which the allocator adapts to.
        allocator.mallopt(_MMAP_THRESHOLD, 1 << 25)
        allocator.mallopt(_TRIM_THRESHOLD, 1 << 29)
        times: list[list[tuple[float, float]]] = [[] for _ in runs]
        for number in range(rounds + 1):
            for run, own in zip(runs, times, strict=True):
                spent = seconds(run)
                if number:
                    own.append(spent)
    return {"losses": losses, "bytes": bytes_of, "seconds": times}


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs=2, metavar="WAY")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    own = measured(arguments.ways, arguments.rounds)
    everyone: list[Any] = [own]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps(everyone))  # noqa: T201
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
