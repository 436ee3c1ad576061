"""The recipe of `params/tiny`: a whole SD3.5 pipeline in miniature, trained from scratch on the world of `shapes`.

    python -m functional_sd3.training.tiny params/tiny --work out/tiny

or from a finished model, whose transformer learns on while all the rest of it stays:

    python -m functional_sd3.training.tiny OUT --start params/tiny --bfloat16 --compile --refine-steps 12000

Stages, each a pure function of the seed: tokenizers from the world's captions; the autoencoder on fresh pictures; a
pool of pictures encoded once; the transformer and the three text encoders together; then the transformer alone, which
is what takes time. Hidden matrices learn by Muon, which at this size needs several times fewer steps than AdamW.
Stopped at any moment, the same command goes on.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Params
from functional_sd3.flow import schedule
from functional_sd3.image import pixels, vae
from functional_sd3.text import bpe, bpe_train, clip, conditioning, t5, unigram, unigram_train
from functional_sd3.training import checkpoint, loop, losses, muon, optim, shapes, step, tiny_report
from functional_sd3.transformer import mmdit
from functional_sd3.weights import files
from functional_sd3.weights.model import SPECS, Config, Model, Tokenizers

LENGTH = 24
"""Tokens of each text encoder: the longest caption has 19."""
CONTEXT_WIDTH = 192
POOL = 131072
"""Pictures that are encoded once and drawn from."""
VAE_STEPS = 1200
VAE_BATCH = 32
FLOW_STEPS = 2200
"""Of the transformer and the text encoders together."""
REFINE_STEPS = 12000
"""Of the transformer alone."""
FLOW_BATCH = 64
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
    """What the loop runs: `train_step(state, batch)` on `batch(step)` from `state`."""

    state: step.TrainState
    train_step: Callable
    batch: Callable[[int], dict]


def tokenizers(key: Key) -> Tokenizers:
    """Two byte-pair tokenizers that differ in their padding, as SD3's do, and a unigram one."""
    scenes = shapes.scenes(key, 4096)
    captions = [shapes.caption(scene, wording) for wording, scene in enumerate(scenes)]
    vocab, merges = bpe_train.train(captions, 1024)
    # Every printable ASCII character gets a piece, so that no prompt typed in English is unknown.
    characters = " ".join(map(chr, range(33, 127)))
    pieces = unigram_train.train([*captions, characters], 192, charsmap=unigram_train.plain_charsmap())
    return Tokenizers(
        clip_l=bpe.init((vocab, merges), model_max_length=LENGTH),
        clip_g=bpe.init((vocab, merges), model_max_length=LENGTH, pad_token="!"),
        t5=unigram.from_pieces(pieces, charsmap=unigram_train.plain_charsmap(), model_max_length=LENGTH),
    )


def config(tables: Tokenizers) -> Config:
    """Sizes of the model; the autoencoder's scaling and shift are measured after its training."""
    encoder = clip.Config(
        vocab=len(tables.clip_l.vocab),
        length=LENGTH,
        width=96,
        layers=3,
        heads=3,
        mlp_width=384,
        projection_width=96,
        eos_id=tables.clip_l.eos_id,
    )
    return Config(
        clip_l=encoder,
        clip_g=replace(encoder, activation="gelu"),
        t5=t5.Config(vocab=len(tables.t5.pieces), width=CONTEXT_WIDTH, layers=2, heads=6, head_dim=32, mlp_width=384),
        transformer=mmdit.Config(
            depth=5,
            heads=5,
            head_dim=32,
            patch_size=1,
            context_width=CONTEXT_WIDTH,
            pooled_width=2 * 96,
            position_size=8,
            sample_size=8,
            qk_norm=True,
            dual_attention_layers=(0,),
        ),
        # Flat colours live in the mean over a group: one group keeps all but one of them.
        vae=vae.Config(
            channels=(16, 32, 64, 64), blocks_per_level=1, groups=1, scaling=1.0, shift=0.0, sample_size=shapes.SIDE
        ),
        schedule=schedule.Config(shift=1.0),
    )


def vae_stage(key: Key, config: Config, steps: int) -> Stage:
    """The autoencoder, on pictures drawn anew for every step."""
    params_key, run_key, data_key = (prng.fold_in(key, place) for place in (1, 2, 3))
    params = tree.map_with_path(_precise, vae.init(params_key, config.vae))
    rate = optim.trapezoid(3e-3, min(30, steps // 4), steps, int(0.6 * steps))
    optimizer = _optimizer(rate, rate, b2=0.99)
    train_step = step.make_train_step(
        losses.vae_loss(config.vae, divergence=6e-3), optimizer, ema_decay=0.995, donate=True, rate=rate
    )

    def batch(index: int) -> dict[str, Tensor]:
        pictures, _ = shapes.pictures(prng.fold_in(data_key, index), VAE_BATCH)
        return {"images": pixels.to_signed(pixels.from_bytes(pictures))}

    return Stage(step.init(run_key, params, optimizer), train_step, batch)


def pool(key: Key, params: Params, config: Config, tables: Tokenizers, count: int = POOL) -> dict:
    """`count` pictures as latents, not normalised, with the ids of their captions: what `flow_stage` draws from."""
    latents, captions = [], []
    with torch.no_grad():
        for index in range(0, count, 256):
            pictures, texts = shapes.pictures(prng.fold_in(key, index), min(256, count - index))
            images = pixels.to_signed(pixels.from_bytes(pictures))
            latents.append(vae.encode(params, config.vae, images).mean)
            captions += texts
    ids = conditioning.tokenize(config, tables, captions, t5_length=LENGTH)
    return {"latents": torch.cat(latents), "ids": ids}


def measured(config: Config, latents: Tensor) -> Config:
    """The config whose scaling and shift give these latents mean 0 and variance 1."""
    scaling, shift = round(float(1.0 / latents.std()), 4), round(float(latents.mean()), 4)
    return replace(config, vae=replace(config.vae, scaling=scaling, shift=shift))


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

    `dtype` is that of the computation, beside float32 parameters: bfloat16 where the machine multiplies it fast.
    """
    params_key, run_key, data_key = prng.split(key, 3)
    makers = {"clip_l": clip.init, "clip_g": clip.init, "t5": t5.init, "transformer": mmdit.init}
    keys = prng.split(params_key, len(makers))
    if start is None:
        parts = zip(keys, makers.items(), strict=True)
        params = {name: make(own, getattr(config, name)) for own, (name, make) in parts}
    else:
        params = {name: start[name] for name in makers}
    rate = optim.trapezoid(peak, min(100, steps // 4), steps, int(0.4 * steps))
    optimizer = _optimizer(rate, lambda count: 0.5 * rate(count), dtype=dtype)
    specs = {name: SPECS[name](getattr(config, name)) for name in params}
    learned = step.trainable(specs, "*" if start is None else "transformer.*")
    empty = {"ids": conditioning.tokenize(config, tables, [""], t5_length=LENGTH)}
    train_step = step.make_train_step(
        losses.flow_loss(config, dropout=DROPOUT, empty=empty, dtype=dtype),
        optimizer,
        trainable=learned,
        ema_decay=0.999,
        # As one graph with its gradient, bfloat16 does not get through inductor's C++ (PyTorch 2.13).
        gradient="autograd",
        compile=compile,
        donate=True,
        rate=rate,
    )
    latents = vae.normalize(config.vae, data["latents"])
    order = loop.order(data_key, FLOW_BATCH, len(latents))

    def batch(index: int) -> dict:
        rows = order(index)
        return {"latents": latents[rows], "ids": tree.map(lambda ids: ids[rows], data["ids"])}

    return Stage(step.init(run_key, params, optimizer, trainable=learned), train_step, batch)


def train(
    out: Path,
    work: Path,
    *,
    seed: int,
    vae_steps: int,
    flow_steps: int,
    refine_steps: int = 0,
    start: Model | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    progress: bool = True,
) -> Model | None:
    """The whole recipe: the model, saved in `out`; None when it was stopped. `work` holds logs and checkpoints.

    `flow_steps` of transformer and text encoders, then `refine_steps` of the transformer, each with its own rise and
    fall of the learning rate. `start`: a finished model whose transformer learns on; its tokenizers, encoders and
    autoencoder stay as they are.
    """
    root = prng.key(seed)
    tokens_key, _, pool_key, flow_key = prng.split(root, 4)
    if start is None:
        tables = tokenizers(tokens_key)
        sizes = config(tables)
        stage = _run(work / "vae", vae_stage(root, sizes, vae_steps), vae_steps, progress)
        if stage is None:
            return None
        autoencoder = stage.ema
    else:
        tables, sizes, autoencoder = start.tokenizers, start.config, start.params["vae"]
    data = _kept_pool(work / "pool.safetensors", pool_key, autoencoder, sizes, tables)
    if start is None:
        sizes = measured(sizes, data["latents"])

    def draw(state: step.TrainState, done: int) -> None:
        params = {**state.ema, "vae": autoencoder}
        listed = [shapes.held_out_captions(things) for things in (1, 2)]
        captions = [every[index * len(every) // 8][0] for every in listed for index in range(8)]
        with torch.no_grad():
            images = pipeline.generate(params, sizes, tables, captions, prng.key(seed))
        (work / "samples").mkdir(exist_ok=True)
        pixels.to_pil(pixels.grid(images, 4))[0].save(work / "samples" / f"{done:06d}.png")

    def stage(steps: int, given: Params | None) -> Stage:
        return flow_stage(flow_key, sizes, tables, data, steps, start=given, dtype=dtype, compile=compile)

    params = None if start is None else start.params
    for name, steps in (("flow", 0 if start else flow_steps), ("refine", refine_steps)):
        if steps:
            state = _run(work / name, stage(steps, params), steps, progress, draw)
            if state is None:
                return None
            params = state.ema
    params = {**params, "vae": autoencoder}
    model = Model(sizes, {name: params[name] for name in SPECS if name in params}, tables)
    weights.save(out, model, dtype=torch.float16)
    return weights.load(out, dtype=torch.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of the recipe; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m functional_sd3.training.tiny", description="Train params/tiny.")
    parser.add_argument("out", type=Path, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("out/tiny"), help="folder of logs and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--flow-steps", type=int, default=FLOW_STEPS, help="of transformer and text encoders")
    parser.add_argument("--refine-steps", type=int, default=REFINE_STEPS, help="of the transformer alone, after those")
    parser.add_argument("--start", type=Path, help="folder of a finished model, whose transformer is refined")
    parser.add_argument("--bfloat16", action="store_true", help="compute the flow in bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile the flow's gradient")
    parsed = parser.parse_args(arguments)
    parsed.work.mkdir(parents=True, exist_ok=True)
    model = train(
        parsed.out,
        parsed.work,
        seed=parsed.seed,
        vae_steps=parsed.vae_steps,
        flow_steps=parsed.flow_steps,
        refine_steps=parsed.refine_steps,
        start=weights.load(parsed.start, dtype=torch.float32) if parsed.start else None,
        dtype=torch.bfloat16 if parsed.bfloat16 else None,
        compile=parsed.compile,
    )
    if model is None:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    typed = sys.argv[1:] if arguments is None else arguments
    before = "those of the refined model" if parsed.start else f"{parsed.flow_steps} of transformer and text encoders"
    tiny_report.describe(
        parsed.out,
        model,
        parsed.work / ("refine" if parsed.refine_steps else "flow") / "log.csv",
        command=" ".join(["python -m functional_sd3.training.tiny", *typed]),
        history=f"{parsed.vae_steps} steps of the autoencoder, {before}, "
        f"{parsed.refine_steps} of the transformer alone, {FLOW_BATCH} pictures a step",
    )
    print(parsed.out)
    return 0


def _run(
    out: Path,
    stage: Stage,
    steps: int,
    progress: bool,
    on_sample: Callable[[step.TrainState, int], None] | None = None,
) -> step.TrainState | None:
    """The stage's last state, from wherever its checkpoints stand; None when it was interrupted."""
    saved = checkpoint.found(out / "checkpoints")
    state = checkpoint.load(saved[-1], like=stage.state) if saved else stage.state
    if int(state.step) >= steps:
        return state
    outcome = loop.run(
        state,
        stage.train_step,
        stage.batch,
        steps=steps,
        out=out,
        save_every=250,
        log_every=50,
        sample_every=500,
        on_sample=on_sample,
        progress=progress,
    )
    return outcome.state if outcome.reason == "done" else None


def _kept_pool(path: Path, key: Key, params: Params, config: Config, tables: Tokenizers) -> dict:
    if not path.exists():
        data = pool(key, params, config, tables)
        files.write_atomic(path, tree.flatten_paths({"latents": data["latents"], "ids": data["ids"]._asdict()}))
    mapped = files.open_mapped(path)
    ids = conditioning.Ids(*(files.tensor(mapped, f"ids.{name}") for name in conditioning.Ids._fields))
    return {"latents": files.tensor(mapped, "latents"), "ids": ids}


def _precise(path: str, leaf: Tensor) -> Tensor:
    """A posterior that starts narrow: learning to be precise from a variance of 1 takes most of a short run."""
    if path == "encoder.conv_out.bias":
        mean, logvar = leaf.chunk(2)
        return torch.cat([mean, logvar - 4.0])
    if path == "encoder.conv_out.weight":
        mean, logvar = leaf.chunk(2)
        return torch.cat([4.0 * mean, logvar])
    return leaf


def _optimizer(
    matrices: optim.Schedule, others: optim.Schedule, *, b2: float = 0.99, dtype: torch.dtype | None = None
) -> optim.Optimizer:
    def label(path: str, leaf: Tensor) -> str:
        hidden = leaf.ndim >= 2 and not any(name in part for part in path.split(".") for name in ADAMW_ONLY)
        return "muon" if hidden else "adamw"

    rules = {"muon": muon.muon(matrices, dtype=dtype), "adamw": optim.adamw(others, b2=b2, decay=0.0)}
    return optim.chain(optim.clip_by_global_norm(1.0), optim.partitioned(rules, label))


if __name__ == "__main__":
    sys.exit(main())
