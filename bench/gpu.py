"""`python -m bench.gpu`: the MMDiT at its true sizes on a CUDA machine, bfloat16, beside diffusers; prints one table.

SD3.5-medium and large with random weights at 512 and 1024 pixels, batch 2 (guidance), 333 context tokens: eager,
compiled, and compiled into CUDA graphs. It has not run where this was written, for want of such a machine.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch

from bench import peers, timing
from functional_sd3.core import prng, transform
from functional_sd3.transformer import mmdit

CONFIGS = {"SD3.5-medium": mmdit.SD35_MEDIUM, "SD3.5-large": mmdit.SD35_LARGE}
WAYS = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}
TOKENS = 333


def milliseconds(run: Callable[[], object], others: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Medians of two functions on the device, interleaved, after three warm calls of each."""
    for each in (run, others):
        for _ in range(3):
            each()
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for each, kept in zip((run, others), samples, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            each()
            end.record()
            end.synchronize()
            kept.append(start.elapsed_time(end))
    return statistics.median(samples[0]), statistics.median(samples[1])


def compiled(run: Callable, mode: str | None) -> Callable:
    """The function as it is, or compiled in one of torch.compile's modes."""
    torch._dynamo.reset()
    return run if mode is None else transform.compile(run, mode=mode, dynamic=False)


def print_rows(names: list[str], sides: list[int], rounds: int) -> None:
    """The lines of the table, each as soon as it is measured."""
    for name in names:
        with torch.device("cuda"):
            pair = peers.transformer(CONFIGS[name], torch.bfloat16)
        for side in sides:
            keys = prng.split(prng.key(0), 3)
            shapes = ((2, 16, side // 8, side // 8), (2, TOKENS, 4096), (2, 2048))
            drawn = [prng.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
            latents, context, pooled = (each.to("cuda", torch.bfloat16) for each in drawn)
            t = torch.full((2,), 0.7, device="cuda")
            for way, mode in WAYS.items():
                ours = compiled(partial(mmdit.apply, config=pair.config), mode)
                theirs = compiled(pair.module, mode)
                arguments = {"latents": latents, "t": t, "context": context, "pooled": pooled}
                run = partial(ours, pair.params, **arguments)
                other = partial(theirs, latents, context, pooled, 1000 * t, return_dict=False)
                difference = timing.relative_difference(run().clone(), other()[0].clone())
                torch.cuda.reset_peak_memory_stats()
                mine, peer = milliseconds(run, other, rounds)
                peak = torch.cuda.max_memory_allocated() / 2**30
                times = f"{mine:.2f} ms | {peer:.2f} ms | **{mine / peer:.2f}**"
                print(f"| {name}, {side} px, {way} | {times} | {difference:.0e} | {peak:.1f} GiB |", flush=True)
        del pair
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; status 1 where there is no CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--model", nargs="*", choices=sorted(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--side", nargs="*", type=int, default=[512, 1024])
    parser.add_argument("--rounds", type=int, default=20)
    parsed = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device and finds none; `python -m bench` runs anywhere", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, batch 2, {TOKENS} context tokens\n")
    print("| what | ours | diffusers | ratio | relative difference | peak of both |\n|---|---|---|---|---|---|")
    with torch.no_grad():
        print_rows(parsed.model, parsed.side, parsed.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
