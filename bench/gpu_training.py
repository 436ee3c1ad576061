"""`python -m bench.gpu_training`: training steps of the true sizes on a CUDA machine beside diffusers' scripts' way.

All of SD3.5-medium, and a LoRA of SD3.5-large's attentions, with random weights, one image of 1024 x 1024: peak memory
and milliseconds a step. diffusers' way is that of its `train_dreambooth_sd3.py` and `train_dreambooth_lora_sd3.py`: the
module in bfloat16 by autocast or, frozen under peft's LoRA, in bfloat16; gradient checkpointing; clipping; AdamW.
It has been run on a CPU in the small size only: `--device cpu --size small`.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench import gpu, gpu_command, peers
from functional_sd3 import lora
from functional_sd3.core import prng, transform
from functional_sd3.core import spec as specs
from functional_sd3.core.computation import Computation
from functional_sd3.core.types import Params
from functional_sd3.training import objectives, step, update_rule
from functional_sd3.training.update_rule import UpdateRule
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config

BF16 = torch.bfloat16
RANK = 16
TARGETS = ["attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out", "attn.to_k", "attn.to_out.0",
           "attn.to_q", "attn.to_v"]  # fmt: skip
"""The layers that diffusers' script adapts by default."""
SMALL = mmdit.Config(depth=3, heads=2, position_size=32, qk_norm=True, context_width=64, pooled_width=64)


class Size(NamedTuple):
    """The model of which all is trained, that of the LoRA, and the sides of latents."""

    full: tuple[str, mmdit.Config]
    adapted: tuple[str, mmdit.Config]
    side: int


SIZES = {
    "true": Size(("SD3.5-medium", mmdit.SD35_MEDIUM), ("SD3.5-large", mmdit.SD35_LARGE), 128),
    "small": Size(("small", SMALL), ("small", SMALL), 16),
}
FULL = {
    "--dtype bfloat16 --remat": UpdateRule(),
    "--dtype bfloat16 --remat --optimizer adamw8bit": UpdateRule("adamw8bit"),
    "--weights bfloat16 --remat --optimizer adamw8bit": UpdateRule("adamw8bit", BF16),
}
"""Options of our rows -> how parameters are updated."""


def batch(place: gpu.Place, config: mmdit.Config, side: int) -> dict[str, Tensor]:
    """One image, with its noise and time."""
    shapes = (1, 16, side, side), (1, 16, side, side), (1, gpu.TOKENS, config.context_width), (1, config.pooled_width)
    names = ("latents", "noise", "context", "pooled")
    drawn = gpu.drawn(place, *shapes, dtype=torch.float32)
    return {**dict(zip(names, drawn, strict=True)), "t": torch.full((1,), 0.5, device=place.device)}


def ours(
    place: gpu.Place, config: mmdit.Config, data: dict[str, Tensor], rule: UpdateRule, rank: int = 0
) -> Callable[[], Tensor]:
    """A step of all parameters, or with `rank` of a LoRA."""
    key = prng.key(0, device=place.device)
    spec = {"transformer": mmdit.spec(config)}
    whole: Callable[[Params], Params] = lambda learned: learned  # noqa: E731
    if rank:
        base = specs.init(key, spec, dtype=BF16, device=place.device)
        spec = lora.spec(spec, rank, "transformer.blocks.*attention*")
        whole = lambda learned: lora.apply(base, learned, lazy=True)  # noqa: E731
    learned = specs.init(key, spec, dtype=rule.weights, device=place.device)
    computations = {"transformer": Computation(block_transform=transform.remat)}
    loss = objectives.flow_loss(Config(transformer=config, computations=computations), dtype=BF16)
    optimizer = update_rule.optimizer(rule, 1e-5, clip=1.0, decay=0.01)
    chosen = step.trainable(spec)
    train = step.make_train_step(
        lambda learned, batch, keys: loss(whole(learned), batch, keys), optimizer, trainable=chosen, ema_decay=None,
        donate=True, rounding="stochastic" if rule.weights == BF16 else "nearest",
    )  # fmt: skip
    held = [step.init(key, learned, optimizer, trainable=chosen, average=False)]
    del learned

    def run() -> Tensor:
        held[0], metrics = train(held[0], data)
        return metrics["loss"]

    return run


def theirs(place: gpu.Place, config: mmdit.Config, data: dict[str, Tensor], rank: int = 0) -> Callable[[], Tensor]:
    """The loop of diffusers' scripts."""
    with torch.device(place.device):
        module = peers.transformer_module(config)
    if rank:
        from peft import LoraConfig

        module.requires_grad_(False).to(BF16)
        module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS))
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    module.train().enable_gradient_checkpointing()
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5, weight_decay=0.01, fused=True)

    def run() -> Tensor:
        t = data["t"].view(-1, 1, 1, 1)
        mixed = (1 - t) * data["latents"] + t * data["noise"]
        with torch.autocast(place.device.type, BF16):
            velocity = module(mixed, data["context"], data["pooled"], 1000 * data["t"], return_dict=False)[0]
        loss = (velocity.float() - (data["noise"] - data["latents"])).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def alone(place: gpu.Place, make: Callable[[], Callable[[], Tensor]]) -> tuple[float, float]:
    """Milliseconds of a step, and the most GB that it and its state take: one side at a time, as both would not fit.
    NaN GB without CUDA; NaN milliseconds where the memory is too small."""
    gc.collect()
    if place.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        run = make()
        (duration,) = gpu.milliseconds(place, run)
    except torch.OutOfMemoryError:
        return float("nan"), float("inf")
    return duration, torch.cuda.max_memory_allocated() / 1e9 if place.cuda else float("nan")


def rows(place: gpu.Place, size: Size) -> Iterator[str]:
    """Lines of the table."""
    name, config = size.full
    data = batch(place, config, size.side)
    other = alone(place, lambda: theirs(place, config, data))
    for options, rule in FULL.items():
        yield line(
            f"all of {name}, `{options}`", alone(place, lambda rule=rule: ours(place, config, data, rule)), other
        )
    name, config = size.adapted
    data = batch(place, config, size.side)
    other = alone(place, lambda: theirs(place, config, data, RANK))
    mine = alone(place, lambda: ours(place, config, data, UpdateRule(), RANK))
    yield line(f"LoRA of rank {RANK} of {name}, `--dtype bfloat16 --remat`", mine, other)


def line(what: str, ours: tuple[float, float], theirs: tuple[float, float]) -> str:
    times = f"{ours[0]:.1f} ms | {theirs[0]:.1f} ms | **{ours[0] / theirs[0]:.2f}**"
    return f"| {what} | {times} | {ours[1]:.1f} GB | {theirs[1]:.1f} GB | **{ours[1] / theirs[1]:.2f}** |"


def main(arguments: list[str] | None = None) -> int:
    """`gpu_command.run` of this table."""
    import diffusers

    columns = ("what", "ours", "diffusers", "ratio", "peak, ours", "diffusers", "ratio")
    says = f", diffusers {diffusers.__version__}; one image; medians; each alone."
    module, parts = sys.modules[__name__], {"training steps": rows}
    given = {"says": says, "columns": columns, "rounds": 10, "arguments": arguments}
    return gpu_command.run(module, parts, title="# Training on a GPU\n\n", **given)


if __name__ == "__main__":
    sys.exit(main())
