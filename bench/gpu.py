"""`python -m bench.gpu`: the true sizes on a CUDA machine, beside diffusers; prints one table.

SD3.5-medium and large with random weights in bfloat16: the transformer's forward (eager, compiled, captured in a CUDA
graph), whole sampling, the VAE's decoder, and a training step. `--out FILE` keeps the table; `--device cpu --size
small` runs the same lines without such a machine, to see that they run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import peers, timing
from functional_sd3.core import prng, transform, tree
from functional_sd3.flow import ode, schedule
from functional_sd3.flow.guidance import combine as combining
from functional_sd3.image import vae
from functional_sd3.training import objectives, optim, step
from functional_sd3.transformer import joint_block, mmdit
from functional_sd3.weights import Config

MODELS = {"SD3.5-medium": mmdit.SD35_MEDIUM, "SD3.5-large": mmdit.SD35_LARGE}
SMALL = {"small": mmdit.Config(depth=3, heads=2, position_size=96, qk_norm=True, dual_attention_layers=(0,))}
SECTIONS = ("product", "forward", "whole", "sampling", "decode", "training")
TOKENS = 333


class Row(NamedTuple):
    """Milliseconds of both sides; `difference`: of their outputs, relative; `more`: remarks."""

    what: str
    ours: float
    theirs: float | None = None
    difference: float | None = None
    more: str = ""

    def line(self) -> str:
        theirs = "" if self.theirs is None else f"{self.theirs:.2f} ms"
        ratio = "" if self.theirs is None else f"**{self.ours / self.theirs:.2f}**"
        difference = "" if self.difference is None else f"{self.difference:.0e}"
        return f"| {self.what} | {self.ours:.2f} ms | {theirs} | {ratio} | {difference} | {self.more} |"


class Place(NamedTuple):
    """Where and how: a device, the rounds of a row, the models, the sides of their images in pixels, the steps."""

    device: torch.device
    rounds: int
    models: dict[str, mmdit.Config]
    sides: list[int]
    steps: int = 28
    autoencoder: vae.Config = vae.SD3_VAE

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def milliseconds(place: Place, *runs: Callable[[], object], rounds: int | None = None) -> list[float]:
    """The median of each function, interleaved, after two warm calls."""
    samples: list[list[float]] = [[] for _ in runs]
    for round in range((rounds or place.rounds) + 2):
        for run, kept in zip(runs, samples, strict=True):
            start = time.perf_counter()
            run()
            if place.cuda:
                torch.cuda.synchronize()
            if round >= 2:
                kept.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(each) for each in samples]


def captured(place: Place, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The run as one CUDA graph, which a pure function allows."""
    if not place.cuda:
        return run
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def drawn(place: Place, *shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    keys = prng.split(prng.key(0, device=place.device), len(shapes))
    return [prng.normal(key, shape).to(dtype) for key, shape in zip(keys, shapes, strict=True)]


def inputs(place: Place, config: mmdit.Config, side: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """latents, context, pooled, t."""
    shapes = (batch, 16, side // 8, side // 8), (batch, TOKENS, config.context_width), (batch, config.pooled_width)
    return (*drawn(place, *shapes), torch.full((batch,), 0.7, device=place.device))


def compiled_blocks(module: torch.nn.Module) -> None:
    """diffusers' transformer with every block compiled: it has no list of repeated blocks for this model."""
    for block in module.transformer_blocks:
        block.compile(fullgraph=True, dynamic=False)


def uncompiled_blocks(module: torch.nn.Module) -> None:
    for block in module.transformer_blocks:
        block._compiled_call_impl = None


def peak(place: Place, run: Callable[[], object]) -> str:
    """The most memory that a call takes beyond what is held before it."""
    if not place.cuda:
        return ""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB"


def product(place: Place) -> Iterator[Row]:
    """The rate that everything else is held against."""
    size = 8192 if place.cuda else 512
    a, b = drawn(place, (size, size), (size, size))
    (duration,) = milliseconds(place, lambda: a @ b)
    yield Row(f"{size} x {size} x {size} product", duration, more=f"{2 * size**3 / duration / 1e9:.0f} TFLOP/s")


def forward(place: Place) -> Iterator[Row]:
    """One evaluation for an image with guidance."""
    from torch.utils.flop_counter import FlopCounterMode

    block = transform.compile(joint_block.apply, dynamic=False)
    for name, config in place.models.items():
        pair = peers.transformer(config, torch.bfloat16, place.device)
        for side in place.sides:
            latents, context, pooled, t = inputs(place, config, side)
            ours = partial(mmdit.apply, pair.params, config, latents, t, context, pooled)
            theirs = partial(_peer, pair.module, latents, context, pooled, 1000 * t)
            # Of the other side, whose layers are all of a kind that the counter knows.
            with FlopCounterMode(display=False) as counter:
                reference = theirs()
            operations = counter.get_total_flops()
            difference = timing.relative_difference(ours(), reference)
            by_block = partial(ours, block_transform=lambda _: block)
            for way, run in (("eager", ours), ("compiled blocks", by_block)):
                if way == "compiled blocks":
                    compiled_blocks(pair.module)
                    difference = timing.relative_difference(run(), theirs())
                mine, other = milliseconds(place, run, theirs)
                more = f"{operations / mine / 1e9:.0f} TFLOP/s; beyond the weights {peak(place, run)} / "
                yield Row(f"{name}, {side} px, {way}", mine, other, difference, more + peak(place, theirs))
            mine, other = captured(place, by_block), captured(place, theirs)
            difference = timing.relative_difference(mine().clone(), other().clone())
            durations = milliseconds(place, mine, other)
            yield Row(f"{name}, {side} px, compiled blocks in a CUDA graph", *durations, difference)
            uncompiled_blocks(pair.module)
            del mine, other
        del pair, ours, theirs, by_block, run
        _collect(place)


def whole(place: Place) -> Iterator[Row]:
    """The first model compiled whole, as one graph each."""
    name, config = next(iter(place.models.items()))
    pair = peers.transformer(config, torch.bfloat16, place.device)
    latents, context, pooled, t = inputs(place, config, place.sides[-1])
    torch._dynamo.reset()
    start = time.perf_counter()
    ours = transform.compile(partial(mmdit.apply, config=config), dynamic=False)
    run = partial(ours, pair.params, latents=latents, t=t, context=context, pooled=pooled)
    first = run()
    middle = time.perf_counter()
    module = torch.compile(pair.module, fullgraph=True, dynamic=False)
    other = partial(_peer, module, latents, context, pooled, 1000 * t)
    difference = timing.relative_difference(first, other())
    seconds = middle - start, time.perf_counter() - middle
    durations = milliseconds(place, run, other)
    more = f"first call {seconds[0]:.0f} s / {seconds[1]:.0f} s"
    yield Row(f"{name}, {place.sides[-1]} px, compiled whole", *durations, difference, more)


def sampling(place: Place) -> Iterator[Row]:
    """A whole run with guidance from noise to latents."""
    name, config = next(iter(place.models.items()))
    pair, side = peers.transformer(config, torch.bfloat16, place.device), place.sides[-1]
    latents, context, pooled, _ = inputs(place, config, side)
    noise = latents[:1].float()
    times = schedule.sigmas(place.steps, device=place.device)
    block = transform.compile(joint_block.apply, dynamic=False)

    def field(block_transform):
        rows = mmdit.modulations(pair.params, config, times[:-1, None], pooled)

        def guided(x, t):
            index = schedule.position(times[:-1], t).reshape(1)
            row = tree.map(lambda leaf: leaf.index_select(0, index).squeeze(0), rows)
            inputs = torch.cat([x, x]).to(context.dtype), None, context, None
            both = mmdit.apply(pair.params, config, *inputs, modulations=row, block_transform=block_transform)
            return combining.extrapolate(*both.chunk(2), 5.0)

        return guided

    def ours(block_transform=None):
        return ode.integrate(ode.EULER, field(block_transform), noise, times)

    def theirs():
        x = noise
        for t, later in zip(times, times[1:], strict=False):
            inputs = torch.cat([x, x]).to(context.dtype), context, pooled, 1000 * t.repeat(2)
            uncond, cond = _peer(pair.module, *inputs).float().chunk(2)
            x = x + (later - t) * (uncond + 5.0 * (cond - uncond))
        return x

    for way in ("eager", "compiled blocks"):
        run = ours if way == "eager" else partial(ours, lambda _: block)
        if way != "eager":
            compiled_blocks(pair.module)
        difference = timing.relative_difference(run(), theirs())
        durations = milliseconds(place, run, theirs, rounds=3)
        yield Row(f"{name}, {side} px, {place.steps} steps with guidance, {way}", *durations, difference)


def decode(place: Place) -> Iterator[Row]:
    """From latents to pixels."""
    pair, side = peers.autoencoder(place.autoencoder, torch.bfloat16, place.device), place.sides[-1]
    (latents,) = drawn(place, (1, 16, side // 8, side // 8))
    runs = (
        lambda: vae.decode(pair.params, pair.config, latents),
        lambda: pair.module.decode(latents, return_dict=False)[0],
    )
    difference = timing.relative_difference(*(run() for run in runs))
    memory = "beyond the weights " + " / ".join(peak(place, run) for run in runs)
    yield Row(f"VAE decode, {side} px, bfloat16", *milliseconds(place, *runs), difference, memory)


def training(place: Place) -> Iterator[Row]:
    """A step of the flow loss in bfloat16 with float32 weights, clipping, AdamW and a moving average."""
    from diffusers.training_utils import EMAModel

    name, config = next(iter(place.models.items()))
    config, batch = replace(config, depth=min(config.depth, 6)), 4
    pair = peers.transformer(config, torch.float32, place.device)
    latents, context, pooled, _ = inputs(place, config, place.sides[0], batch)
    data = {"latents": latents.float(), "context": context.float(), "pooled": pooled.float()}
    rule = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-5, decay=0.01))
    learned = step.trainable({"transformer": mmdit.spec(config)})
    module = pair.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    average = EMAModel(module.parameters(), decay=0.999, foreach=True)
    for compiled in (False, True):
        loss = objectives.flow_loss(Config(transformer=config), dtype=torch.bfloat16)
        options: dict[str, Any] = {"ema_decay": 0.999, "donate": True, "compile": compiled, "trainable": learned}
        train = step.make_train_step(loss, rule, **options)
        held = [step.init(prng.key(0, device=place.device), {"transformer": pair.params}, rule, trainable=learned)]
        run = torch.compile(module, dynamic=False) if compiled else module

        def ours(train=train, held=held):
            held[0], metrics = train(held[0], data)
            return metrics["loss"]

        def theirs(run=run):
            noise, t = torch.randn_like(data["latents"]), torch.sigmoid(torch.randn(batch, device=place.device))
            mixed = (1 - t.view(-1, 1, 1, 1)) * data["latents"] + t.view(-1, 1, 1, 1) * noise
            with torch.autocast(place.device.type, torch.bfloat16):
                actual = run(mixed, data["context"], data["pooled"], 1000 * t, return_dict=False)[0]
            value = (actual.float() - (noise - data["latents"])).square().mean()
            value.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.step(module.parameters())
            return value.detach()

        with torch.enable_grad():
            difference = timing.relative_difference(ours(), theirs())
            durations = milliseconds(place, ours, theirs, rounds=8)
            memory = f"beyond weights and state {peak(place, ours)} / {peak(place, theirs)}"
        way = "compiled" if compiled else "eager"
        what = f"training step, {config.depth} blocks of {name}, {place.sides[0]} px, batch {batch}, {way}"
        yield Row(what, *durations, difference, memory)
        del held, ours


def _peer(module, latents, context, pooled, timestep) -> torch.Tensor:
    return module(latents, context, pooled, timestep, return_dict=False)[0]


def _collect(place: Place) -> None:
    torch._dynamo.reset()
    if place.cuda:
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; status 1 where there is no CUDA device and none other was named."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--model", nargs="*", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--side", nargs="*", type=int, default=[512, 1024])
    parser.add_argument("--size", choices=("true", "small"), default="true")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=28, help="of the row that samples")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no further part after this long")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device and finds none; `python -m bench` runs anywhere", file=sys.stderr)
        return 1
    import diffusers

    small = parsed.size == "small"
    models = SMALL if small else {name: MODELS[name] for name in parsed.model}
    device = torch.device(parsed.device)
    tiny = replace(vae.SD3_VAE, channels=(32, 32, 64, 64)) if small else vae.SD3_VAE
    place = Place(device, parsed.rounds, models, [64, 128] if small else parsed.side, parsed.steps, tiny)
    machine = torch.cuda.get_device_name() if place.cuda else str(device)
    lines = [
        f"{machine}, torch {torch.__version__}, diffusers {diffusers.__version__}; bfloat16, {TOKENS} context tokens, "
        "batch 2 where nothing else is said; medians, interleaved.",
        "",
        "| what | ours | diffusers | ratio | relative difference | more |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    began = time.monotonic()
    with torch.no_grad():
        for name in parsed.only:
            if time.monotonic() - began > parsed.seconds:
                print(f"no time was left for: {name}", flush=True)
                continue
            try:
                for row in globals()[name](place):
                    lines.append(row.line())
                    print(lines[-1], flush=True)
                    if parsed.out:
                        parsed.out.write_text("# On a GPU\n\n" + "\n".join(lines) + "\n")
            except (RuntimeError, ValueError) as error:
                print(f"{name} failed: {type(error).__name__}: {str(error)[:800]}", flush=True)
            _collect(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
