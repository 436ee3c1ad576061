"""`train --estimate`: a table of the memory of a run and of the choices that change it, before anything is loaded."""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch

from functional_sd3 import weights
from functional_sd3.cli import report, runtime
from functional_sd3.formats import default_dtype
from functional_sd3.formats.printable import shorten
from functional_sd3.image import vae
from functional_sd3.layouts.components import Config, require
from functional_sd3.text import clip, t5
from functional_sd3.training import cache, estimate
from functional_sd3.training.estimate import Choice
from functional_sd3.training.update_rule import UpdateRule
from functional_sd3.transformer import mmdit
from functional_sd3.weights import shipped

TRANSFORMERS = {"sd3-medium": mmdit.SD3_MEDIUM, "sd3.5-medium": mmdit.SD35_MEDIUM, "sd3.5-large": mmdit.SD35_LARGE}
"""Released models by the names that --params takes with --estimate alone."""
MIB = 2**20


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Raises ValueError for what no estimate is made of, and sizes that do not fit."""
    if arguments.part == "vae":
        raise ValueError("--estimate is of --part transformer")
    for name in ("control", "inversion", "prior_data", "prior_prompt", "mesh"):
        if getattr(arguments, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--estimate is of the transformer or a LoRA of it, on one process: leave out {flag}")
    config, stored = _model(arguments)
    base = _choice(arguments, config, stored)
    depth = require(config, "transformer").depth
    if base.swapped > depth:
        raise ValueError(
            f"--block-swap {base.swapped} is more than the {depth} blocks of this transformer: give 1 to {depth}"
        )
    rows = [("this command", base), *_others(base, depth)]
    named = " ".join(arguments.params or [shipped.NAME])
    side = base.side * vae.factor(require(config, "vae"))
    report.say(f"{named}: {base.batch} images of {side} x {side} a step, in MiB")
    columns = ("learned", "frozen", "average", "optimizer", "gradients", "activations", "total")
    width = max(len(name) for name, _ in rows)
    report.say(" ".join([" " * width, *(f"{name:>11}" for name in columns)]))
    measured: estimate.Measured = {}
    for name, choice in rows:
        needed = estimate.memory(config, choice, measured)
        numbers = [*needed, needed.total]
        report.say(" ".join([f"{name:<{width}}", *(f"{number / MIB:>11,.0f}" for number in numbers)]))
    sizes = require(config, "transformer")
    latents = sizes.in_channels * base.side**2 * 4
    text = (base.tokens * sizes.context_width + sizes.pooled_width) * 4
    report.say(
        f"for every 1,000 images: latents {1000 * latents / MIB:,.0f} MiB, mapped from a cache or on the host; text of "
        f"every 1,000 captions {1000 * text / MIB:,.0f} MiB"
    )
    return 0


def _model(arguments: argparse.Namespace) -> tuple[Config, torch.dtype]:
    """The config of --params, and the dtype that its frozen components have."""
    device = runtime.device(arguments.device)
    paths = arguments.params or [shipped.NAME]
    if len(paths) == 1 and paths[0] in TRANSFORMERS:
        config = Config(clip.CLIP_L, clip.CLIP_G, t5.T5_XXL, TRANSFORMERS[paths[0]], vae.SD3_VAE)
        return config, torch.bfloat16
    model = weights.load([shipped.resolve(path) for path in paths], dtype="stored", variant=arguments.variant)
    runtime.require(model, ("transformer", "vae"), shorten(" and ".join(map(str, paths)), 200))
    some = model.params["vae"]["decoder"]["conv_in"]["weight"].dtype
    return model.config, default_dtype.choose(None, {some}, device) or some


def _choice(arguments: argparse.Namespace, config: Config, stored: torch.dtype) -> Choice:
    factor = vae.factor(require(config, "vae"))
    sizes = require(config, "transformer")
    pixels = arguments.size or sizes.sample_size * factor
    if pixels % (factor * sizes.patch_size):
        raise ValueError(f"--size {pixels} must be a multiple of {factor * sizes.patch_size} pixels")
    length = config.clip_l.length if config.clip_l else config.clip_g.length if config.clip_g else 0
    text = 256 if config.t5 is not None else 0
    if config.t5 is not None and (arguments.params or [shipped.NAME])[0] not in TRANSFORMERS:
        tokenizers = weights.outline([shipped.resolve(path) for path in arguments.params or [shipped.NAME]]).tokenizers
        text = min(256, tokenizers.t5.model_max_length) if tokenizers.t5 else 256
    learned = getattr(torch, arguments.weights)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if dtype is None and arguments.lora:
        dtype = torch.bfloat16 if stored.itemsize == 2 else torch.float32
    return Choice(
        batch=arguments.batch_size,
        side=pixels // factor,
        tokens=length + text,
        accumulate=arguments.accumulate,
        rule=UpdateRule(arguments.optimizer, learned, arguments.fused_update),
        dtype=dtype or (learned if learned != torch.float32 else None),
        stored=stored,
        lora=arguments.lora or 0,
        text_encoders=arguments.text_encoders == "train" or (arguments.scratch and arguments.text_encoders is None),
        remat=arguments.remat,
        base=arguments.base is not None,
        swapped=arguments.block_swap or 0,
        encoders=arguments.data is None or arguments.data == "shapes" or not cache.is_cache(arguments.data),
    )


def _others(base: Choice, depth: int) -> Iterator[tuple[str, Choice]]:
    """The choices from most to least memory, by their options; each line has those above it too."""
    whole = replace(
        base, rule=UpdateRule(), dtype=None, remat=False, lora=0, base=False, swapped=0, text_encoders=False
    )
    yield "float32, adamw", whole
    yield "  --dtype bfloat16", (whole := replace(whole, dtype=torch.bfloat16))
    yield "  --remat", (whole := replace(whole, remat=True))
    yield "  --optimizer adamw8bit", (whole := replace(whole, rule=UpdateRule("adamw8bit")))
    yield "  --weights bfloat16", (whole := replace(whole, rule=UpdateRule("adamw8bit", torch.bfloat16)))
    yield (
        "  --fused-update",
        (whole := replace(whole, accumulate=1, rule=UpdateRule("adamw8bit", torch.bfloat16, True))),
    )
    lora = replace(whole, rule=UpdateRule(), accumulate=base.accumulate, lora=base.lora or 16, remat=False)
    yield f"--lora {lora.lora} --dtype bfloat16", lora
    yield "  --remat", (lora := replace(lora, remat=True))
    yield "  --base int8 or float8", replace(lora, base=True)
    half = depth // 2
    yield f"  --block-swap {half}, no --base", replace(lora, swapped=half)
    if base.encoders:
        yield "  --base int8, --data a cache", replace(lora, base=True, encoders=False)
