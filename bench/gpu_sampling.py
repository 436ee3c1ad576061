"""`python -m bench.gpu_sampling`: whole runs of the true sizes on a CUDA machine, beside compiled diffusers.

SD3.5-medium and large with random weights at 1024 px, 28 Euler steps with guidance: ours as one CUDA graph
(`pipeline.captured`, blocks compiled) in bfloat16 and with float8 products, beside diffusers' transformer compiled
whole with `max-autotune` in bfloat16. Beside every row what no way of writing the same can go below: its matrix
products and attentions alone, in a CUDA graph. Then attention's backends, the decoder of the VAE, and large on little
memory beside diffusers' group and sequential offload. A part begins only while `SECONDS` are not over; most of the
time is for compiling. It has been run on a CPU in the small size only: `--device cpu --size small`.
"""

import copy
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import gpu, gpu_command, peers, timing
from functional_sd3.core import dispatch, layers, transform
from functional_sd3.core.types import Params
from functional_sd3.flow import schedule
from functional_sd3.image import vae
from functional_sd3.pipeline import Conditions, captured, swap_blocks
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config, quantize

BF16 = torch.bfloat16
SCALE = 5.0
SECONDS = 780.0
"""No part begins later: 15 minutes hold the start of a machine too."""
_BEGAN = time.monotonic()


class Size(NamedTuple):
    """Models, side of the image in pixels, steps, the autoencoder, and how many blocks are swapped."""

    models: dict[str, mmdit.Config]
    side: int
    steps: int
    autoencoder: vae.Config
    swapped: int


_SMALL = mmdit.Config(depth=3, heads=2, position_size=32, qk_norm=True, context_width=64, pooled_width=64)
SIZES = {
    "true": Size({"SD3.5-medium": mmdit.SD35_MEDIUM, "SD3.5-large": mmdit.SD35_LARGE}, 1024, 28, vae.SD3_VAE, 24),
    "small": Size({"small": _SMALL}, 64, 2, vae.Config(channels=(32, 32, 64, 64)), 2),
}


class Inputs(NamedTuple):
    """Of one image with guidance: noise (1, ...), and context and pooled of (prompt, negative)."""

    noise: Tensor
    context: Tensor
    pooled: Tensor

    @property
    def conditions(self) -> Conditions:
        halves = zip(self.context.split(1), self.pooled.split(1), strict=True)
        return Conditions(*(Conditioning(*half) for half in halves))


def inputs(place: gpu.Place, config: mmdit.Config, size: Size) -> Inputs:
    side = size.side // 8
    shapes = (1, config.in_channels, side, side), (2, gpu.TOKENS, config.context_width), (2, config.pooled_width)
    noise, context, pooled = gpu.drawn(place, *shapes)
    return Inputs(noise.float(), context, pooled)


def ours(place: gpu.Place, params: Params, config: mmdit.Config, size: Size, given: Inputs) -> Callable[[], Tensor]:
    """A whole run as one graph."""
    compiled = partial(transform.compile, dynamic=False)
    options = {"block_transform": compiled} if place.cuda else {}
    run = captured.capture(
        {"transformer": params}, Config(transformer=config, schedule=schedule.Config()), given.conditions, given.noise,
        steps=size.steps, **options,
    )  # fmt: skip
    return lambda: run(given.conditions, given.noise, SCALE)


def theirs(place: gpu.Place, module: Any, size: Size, given: Inputs) -> Callable[[], Tensor]:
    """The loop of diffusers' pipeline with its transformer compiled whole."""
    times = schedule.sigmas(size.steps, device=place.device)
    if place.cuda:
        module = torch.compile(module, mode="max-autotune", fullgraph=True, dynamic=False)

    def run() -> Tensor:
        x = given.noise
        for t, later in zip(times, times[1:], strict=False):
            latents = torch.cat([x, x]).to(BF16)
            both = module(latents, given.context, given.pooled, (1000 * t).repeat(2), return_dict=False)[0]
            prompt, negative = both.float().chunk(2)
            x = x + (later - t) * (negative + SCALE * (prompt - negative))
        return x

    return run


def evaluation(params: Params, config: mmdit.Config, given: Inputs) -> Tensor:
    """One velocity of both rows."""
    t = torch.full((2,), 0.7, device=given.noise.device)
    return mmdit.apply(params, config, torch.cat([given.noise] * 2).to(BF16), t, given.context, given.pooled)


def alone(place: gpu.Place, run: Callable[[], Tensor], times: int) -> float:
    """Milliseconds of the products and attentions of a run alone, `times` over."""
    with dispatch.watched():
        products = timing.products(run)
    again = gpu.captured(place, products)
    return times * gpu.milliseconds(place, again)[0]


def peak(place: gpu.Place, run: Callable[[], Any]) -> str:
    """The most GB that a function takes, all that is held counted."""
    if not place.cuda:
        run()
        return ""
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"


def line(what: str, mine: float, other: float | None, difference: float | None, least: float | None, more: str) -> str:
    """A row of the table, all times in milliseconds."""
    cells = [what, f"{mine:.1f} ms", "" if other is None else f"{other:.1f} ms"]
    cells += ["" if other is None else f"**{mine / other:.2f}**", "" if difference is None else f"{difference:.0e}"]
    return f"| {' | '.join([*cells, '' if least is None else f'{least:.1f} ms', more])} |"


def sampling(place: gpu.Place, size: Size) -> Iterator[str]:
    """Whole runs in bfloat16 and float8, both beside the same compiled peer."""
    for name, config in size.models.items():
        if late(place):
            return
        pair, given = peers.transformer(config, BF16, place.device), inputs(place, config, size)
        what = f"{name}, {size.side} px, {size.steps} steps with guidance"
        velocity = evaluation(pair.params, config, given)
        other, run = theirs(place, pair.module, size, given), ours(place, pair.params, config, size, given)
        their_peak, reference = peak(place, other), other()
        memory, difference = peak(place, run), timing.relative_difference(run(), reference)
        durations = gpu.milliseconds(place, run, other, rounds=min(3, place.rounds))
        least = alone(place, partial(evaluation, pair.params, config, given), size.steps)
        yield line(f"{what}, bfloat16", *durations, difference, least, f"{memory} / {their_peak}")
        del run
        small = quantize.quantize(pair.params, torch.float8_e4m3fn, compute="float8")
        run = ours(place, small, config, size, given)
        error = timing.relative_difference(evaluation(small, config, given), velocity)
        memory, difference = peak(place, run), timing.relative_difference(run(), reference)
        durations = gpu.milliseconds(place, run, other, rounds=min(3, place.rounds))
        least = alone(place, partial(evaluation, small, config, given), size.steps)
        more = f"{memory} / {their_peak}; velocity {error:.0e}"
        yield line(f"{what}, float8 products", *durations, difference, least, more)
        del run, other, small, pair
        collect(place)


def attention(place: gpu.Place, size: Size) -> Iterator[str]:
    """PyTorch's backends of attention at the models' sizes: those that run there, beside its own choice."""
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for name, config in size.models.items():
        tokens = (size.side // 8 // config.patch_size) ** 2 + gpu.TOKENS
        query, key, value = gpu.drawn(place, *[(2, config.heads, tokens, config.head_dim)] * 3)
        chosen = partial(F.scaled_dot_product_attention, query, key, value)
        for backend, kind in backends.items():

            def run(kind: SDPBackend = kind, chosen: Callable[[], Tensor] = chosen) -> Tensor:
                with sdpa_kernel(kind):
                    return chosen()

            try:
                difference = timing.relative_difference(run(), chosen())
            except RuntimeError:
                continue
            durations = gpu.milliseconds(place, run, chosen)
            yield line(f"attention of {name}, {tokens:,} tokens, {backend}; its own choice", *durations, difference,
                       None, "")  # fmt: skip


def decoding(place: gpu.Place, size: Size) -> Iterator[str]:
    """The decoder in bfloat16, weights and images in channels_last, compiled; norms' statistics are float32."""
    pair = peers.autoencoder(size.autoencoder, BF16, place.device)
    (latents,) = gpu.drawn(place, (1, 16, size.side // 8, size.side // 8))
    last = latents.contiguous(memory_format=torch.channels_last)
    params, config = layers.channels_last(pair.params), size.autoencoder
    eager = partial(vae.decode, pair.params, config, latents)
    compile = partial(torch.compile, dynamic=False) if place.cuda else lambda fn: fn
    run = partial(compile(lambda params, x: vae.decode(params, config, x)), params, last)
    module = pair.module.to(memory_format=torch.channels_last)
    other = partial(compile(module.decode), last, return_dict=False)
    least = alone(place, eager, 1)
    for what, mine in (("eager", eager), ("compiled, channels_last", run)):
        difference = timing.relative_difference(mine(), other()[0])
        durations = gpu.milliseconds(place, mine, other)
        yield line(f"VAE decode, {size.side} px, bfloat16, {what}", *durations, difference, least, peak(place, mine))


def offloaded(place: gpu.Place, size: Size) -> Iterator[str]:
    """One evaluation of the largest model of which most blocks stay on the host, beside diffusers' two ways.

    On a GPU within 8 GB of device memory.
    """
    name, config = list(size.models.items())[-1]
    pair, given = peers.transformer(config, BF16, "cpu"), inputs(place, config, size)
    if place.cuda:
        torch.cuda.set_per_process_memory_fraction(8e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        whole = {"transformer": pair.params}
        fetch, changed = swap_blocks(whole, Config(transformer=config), size.swapped, place.device, dtype=BF16)
        params = fetch("transformer") if callable(fetch) else fetch["transformer"]
        options = changed.computations["transformer"].options
        t = torch.full((1,), 0.7, device=place.device)
        rows = mmdit.modulations(params, config, t, given.pooled, materialize=options["materialize"])
        x = torch.cat([given.noise] * 2).to(BF16)
        run = partial(mmdit.apply, params, config, x, None, given.context, None, modulations=rows, **options)
        memory, result = peak(place, run), run()
        (mine,) = gpu.milliseconds(place, run)
        del run, params, fetch, changed, options
        collect(place)
        for way, prepare in (("group", _group_offload), ("sequential", _sequential_offload)):
            try:
                module = prepare(copy.deepcopy(pair.module), place.device)
            except (RuntimeError, ValueError) as error:
                yield line(f"{name}, {size.swapped} blocks swapped; {way} offload", mine, None, None, None,
                           f"{memory}; {str(error)[:60]}")  # fmt: skip
                continue
            call = (x, given.context, given.pooled, (1000 * t).repeat(2))
            other = lambda module=module, call=call: module(*call, return_dict=False)[0]  # noqa: E731
            their_peak, difference = peak(place, other), timing.relative_difference(result, other())
            (their_time,) = gpu.milliseconds(place, other, rounds=min(3, place.rounds))
            more = f"{memory} / {their_peak}"
            yield line(
                f"{name}, {size.swapped} blocks swapped; {way} offload", mine, their_time, difference, None, more
            )
            del module, other
            collect(place)
    finally:
        if place.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)


def _group_offload(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """diffusers' group offload by blocks, the next copied by a stream while one is computed."""
    from diffusers.hooks import apply_group_offloading

    stream = device.type == "cuda"
    options = {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": stream}
    apply_group_offloading(module, onload_device=device, offload_device=torch.device("cpu"), **options)
    return module


def _sequential_offload(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """What `enable_sequential_cpu_offload` does with a component, which refuses a CPU."""
    from accelerate import cpu_offload

    return cpu_offload(module, device)


def late(place: gpu.Place) -> bool:
    """Whether there is no time for another part."""
    return place.cuda and time.monotonic() - _BEGAN > SECONDS


def collect(place: gpu.Place) -> None:
    torch._dynamo.reset()
    gc.collect()
    if place.cuda:
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """`gpu_command.run` of these tables."""
    import diffusers

    parts = {each.__name__: partial(_in_time, each) for each in (sampling, decoding, attention, offloaded)}
    columns = ("what", "ours", "diffusers", "ratio", "relative difference", "products and attention alone", "peak")
    says = f", diffusers {diffusers.__version__} compiled with max-autotune; medians, interleaved."
    given = {"says": says, "columns": columns, "rounds": 10, "arguments": arguments}
    with torch.no_grad():
        return gpu_command.run(sys.modules[__name__], parts, title="# Sampling on a GPU\n\n", **given)


def _in_time(part: Callable[..., Iterator[str]], place: gpu.Place, size: Size) -> Iterator[str]:
    if late(place):
        print(f"no time was left for: {part.__name__}", flush=True)
        return
    yield from part(place, size)
    collect(place)


if __name__ == "__main__":
    sys.exit(main())
