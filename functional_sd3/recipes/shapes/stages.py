"""Training stages of `params/tiny`: the autoencoder, a pool of latents, the transformer on that pool, the decoder.

Hidden matrices are trained by Muon, which at this size needs several times fewer steps than AdamW.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Params
from functional_sd3.image import pixels, vae
from functional_sd3.layouts.components import SPECS, Config, require
from functional_sd3.recipes.shapes import world
from functional_sd3.recipes.shapes.architecture import LENGTH
from functional_sd3.text import clip, conditioning, t5
from functional_sd3.training import checkpoint, loop, muon, objectives, optim, step
from functional_sd3.transformer import mmdit
from functional_sd3.weights.model import Tokenizers

POOL = 131072
"""Number of images in the pool."""
VAE_BATCH = 32
FLOW_BATCH = 64
DECODER_EDGES = 0.3
DECODER_NOISE = 0.15
DROPOUT = 0.1
ADAMW_ONLY = (
    "embedding",
    "relative_bias",
    "position",
    "modulation",
    "time",
    "pooled",
    "patch",
    "final",
    "conv_in",
    "conv_out",
)
"""Names of tables, inputs and outputs, which are not hidden matrices."""


class Stage(NamedTuple):
    """Arguments of `loop.run`: `train_step(state, batch)` on `batch(step)` from `state`, or on `rollout` of both."""

    state: Any
    train_step: Callable
    batch: Callable[[int], Any]
    rollout: Callable[[Any, Any], Any] | None = None


def run(
    out: Path,
    stage: Stage,
    steps: int,
    progress: bool,
    on_sample: Callable[[Any, int], None] | None = None,
    *,
    every: int = 250,
) -> Any:
    """The stage's last state, resumed from its newest checkpoint; None when it was interrupted.

    It is saved `every` so many steps, logged five times as often and sampled half as often.
    """
    saved = checkpoint.paths(out / "checkpoints")
    state = checkpoint.load(saved[-1], like=stage.state) if saved else stage.state
    if int(state.step) >= steps:
        return state
    outcome = loop.run(
        state,
        stage.train_step,
        stage.batch,
        steps=steps,
        out=out,
        save_every=every,
        log_every=every // 5,
        sample_every=2 * every,
        on_sample=on_sample,
        rollout=stage.rollout,
        progress=progress,
    )
    return outcome.state if outcome.reason == "done" else None


def vae_stage(key: Key, config: Config, steps: int) -> Stage:
    """The autoencoder, on new images in every step."""
    params_key, run_key, data_key = (prng.fold_in(key, place) for place in (1, 2, 3))
    params = tree.map_with_path(_narrow_posterior, vae.init(params_key, require(config, "vae")))
    rate = optim.trapezoid(3e-3, min(30, steps // 4), steps, int(0.6 * steps))
    optimizer = muon_optimizer(rate, rate, b2=0.99)
    train_step = step.make_train_step(
        objectives.vae_loss(require(config, "vae"), divergence=6e-3), optimizer, ema_decay=0.995, donate=True, rate=rate
    )

    def batch(index: int) -> dict[str, Tensor]:
        images, _ = world.images(prng.fold_in(data_key, index), VAE_BATCH)
        return {"images": pixels.to_signed(pixels.from_bytes(images))}

    return Stage(step.init(run_key, params, optimizer), train_step, batch)


def decoder_stage(
    key: Key, config: Config, params: Params, steps: int, *, peak: float = 3e-3, dtype: torch.dtype | None = None
) -> Stage:
    """The decoder alone, from the autoencoder `params`: the encoder is frozen, so all latents stay as they are.

    The posterior's mean is decoded, with little noise: a draw of the posterior no longer determines where corners are,
    and the transformer's latents are nearer to the mean than a draw is. Errors are squared, as the few pixels of
    rounded corners are large ones that an absolute error counts like the many small ones of plain ground, and half of
    the images have small things only. `dtype`: as in `flow_stage`.
    """
    sizes = require(config, "vae")
    run_key, data_key = prng.split(key)
    rate = optim.trapezoid(peak, min(100, steps // 4), steps, int(0.6 * steps))
    optimizer = muon_optimizer(rate, rate, dtype=dtype)
    learned = step.trainable(SPECS["vae"](sizes), "decoder.*")
    loss = objectives.vae_loss(
        sizes,
        distance=lambda decoded, images: 4.0 * (decoded - images).square(),
        divergence=0.0,
        edges=DECODER_EDGES,
        noise=DECODER_NOISE,
        dtype=dtype,
    )
    train_step = step.make_train_step(loss, optimizer, trainable=learned, ema_decay=0.998, donate=True, rate=rate)

    def batch(index: int) -> dict[str, Tensor]:
        scenes = world.scenes(prng.fold_in(data_key, index), VAE_BATCH, two=0.85)
        scenes = [_shrunk(scene) if row % 2 else scene for row, scene in enumerate(scenes)]
        return {"images": pixels.to_signed(pixels.from_pil([world.draw(scene) for scene in scenes]))}

    return Stage(step.init(run_key, params, optimizer, trainable=learned), train_step, batch)


def _shrunk(scene: world.Scene) -> world.Scene:
    """The scene with small things in the same places."""
    return replace(scene, things=tuple(replace(thing, size="small") for thing in scene.things))


def pool(key: Key, params: Params, config: Config, tables: Tokenizers, count: int) -> dict:
    """Latents of `count` images, not normalised, and the ids of their captions: the training set of `flow_stage`."""
    latents, captions = [], []
    with torch.no_grad():
        for index in range(0, count, 256):
            images, texts = world.images(prng.fold_in(key, index), min(256, count - index))
            signed = pixels.to_signed(pixels.from_bytes(images))
            latents.append(vae.encode(params, require(config, "vae"), signed).mean)
            captions += texts
    ids = conditioning.tokenize(config, tables, captions, t5_length=LENGTH)
    return {"latents": torch.cat(latents), "ids": ids}


def with_measured_scaling(config: Config, latents: Tensor) -> Config:
    """The config whose scaling and shift give these latents mean 0 and variance 1."""
    scaling, shift = round(float(1.0 / latents.std()), 4), round(float(latents.mean()), 4)
    return replace(config, vae=replace(require(config, "vae"), scaling=scaling, shift=shift))


def flow_stage(
    key: Key,
    config: Config,
    tables: Tokenizers,
    data: dict,
    steps: int,
    *,
    peak: float = 2e-3,
    start: Params | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> Stage:
    """The transformer and the text encoders together, from fresh parameters; or the transformer alone, from `start`.

    `dtype`: of the computation, beside float32 parameters; bfloat16 pays where the processor has instructions for it.
    """
    params_key, run_key, data_key = prng.split(key, 3)
    makers: dict[str, Callable[..., Params]] = {
        "clip_l": clip.init, "clip_g": clip.init, "t5": t5.init, "transformer": mmdit.init
    }  # fmt: skip
    keys = prng.split(params_key, len(makers))
    if start is None:
        parts = zip(keys, makers.items(), strict=True)
        params = {name: make(name_key, getattr(config, name)) for name_key, (name, make) in parts}
    else:
        params = {name: start[name] for name in makers}
    rate = optim.trapezoid(peak, min(100, steps // 4), steps, int(0.4 * steps))
    optimizer = muon_optimizer(rate, lambda count: 0.5 * rate(count), dtype=dtype)
    specs = {name: SPECS[name](getattr(config, name)) for name in params}
    learned = step.trainable(specs, "*" if start is None else "transformer.*")
    empty = {"ids": conditioning.tokenize(config, tables, [""], t5_length=LENGTH)}
    train_step = step.make_train_step(
        objectives.flow_loss(config, dropout=DROPOUT, empty=empty, dtype=dtype),
        optimizer,
        trainable=learned,
        ema_decay=0.999,
        # Inductor's C++ code for a graph with its gradient in bfloat16 does not compile (PyTorch 2.13).
        gradient="autograd",
        compile=compile,
        donate=True,
        rate=rate,
    )
    latents = vae.normalize(require(config, "vae"), data["latents"])
    order = loop.order(data_key, FLOW_BATCH, len(latents))

    def batch(index: int) -> dict:
        rows = order(index)
        return {"latents": latents[rows], "ids": tree.map(lambda ids: ids[rows], data["ids"])}

    return Stage(step.init(run_key, params, optimizer, trainable=learned), train_step, batch)


def _narrow_posterior(path: str, leaf: Tensor) -> Tensor:
    """Encoder output with a small initial variance: starting from a variance of 1 takes most of a short run."""
    if path == "encoder.conv_out.bias":
        mean, logvar = leaf.chunk(2)
        return torch.cat([mean, logvar - 4.0])
    if path == "encoder.conv_out.weight":
        mean, logvar = leaf.chunk(2)
        return torch.cat([4.0 * mean, logvar])
    return leaf


def muon_optimizer(
    matrices: optim.Schedule, others: optim.Schedule, *, b2: float = 0.99, dtype: torch.dtype | None = None
) -> optim.Optimizer:
    """Muon for hidden matrices, computed in `dtype`, and AdamW for all else, each at a learning rate of its own."""

    def label(path: str, leaf: Tensor) -> str:
        hidden = leaf.ndim >= 2 and not any(name in part for part in path.split(".") for name in ADAMW_ONLY)
        return "muon" if hidden else "adamw"

    rules = {"muon": muon.muon(matrices, dtype=dtype), "adamw": optim.adamw(others, b2=b2, decay=0.0)}
    return optim.chain(optim.clip_by_global_norm(1.0), optim.partitioned(rules, label))
