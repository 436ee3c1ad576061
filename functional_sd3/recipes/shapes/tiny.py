"""The recipe of `params/tiny`: a whole SD3.5 pipeline in miniature, trained from scratch on scenes of `world`.

    python -m functional_sd3.recipes.shapes.tiny params/tiny --work out/tiny

or further training of a finished model, such as that of its decoder, or by rewards:

    python -m functional_sd3.recipes.shapes.tiny OUT --start params/tiny --bfloat16 --refine-steps 0

Stages, each a pure function of the seed: tokenizers from the world's captions; the autoencoder on new images; a
pool of images encoded once; the transformer and the three text encoders together; then the transformer alone, which
is what takes time; the decoder alone, which leaves the latents as they are; the transformer once more, on its own
images, by rewards (`architecture`, `stages`, `rewarded`). After an interruption the same command continues.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Params
from functional_sd3.formats import files
from functional_sd3.image import pixels
from functional_sd3.layouts.components import SPECS, Config
from functional_sd3.recipes import model_card
from functional_sd3.recipes.shapes import architecture, report, rewarded, stages, world
from functional_sd3.recipes.shapes.stages import Stage
from functional_sd3.text import conditioning
from functional_sd3.weights.model import Model, Tokenizers

VAE_STEPS = 1200
FLOW_STEPS = 2200
"""Steps of the transformer and the text encoders together."""
REFINE_STEPS = 12000
"""Steps of the transformer alone."""
DECODER_STEPS = 4000
"""Steps of the decoder alone."""
REWARD_STEPS, REWARD_SHARE = 80, 0.6
"""Rounds of rewards for images without guidance, and the share of their change of the transformer that is taken."""
GUIDED_STEPS, GUIDED_SHARE = 34, 0.5
"""The same of rewards for images with guidance, from the same start."""
CURVES = (
    ("flow", "loss", "flow_loss", "Loss of transformer and text encoders", True),
    ("refine", "loss", "loss", "Loss of the transformer alone", True),
    ("decoder", "psnr", "psnr", "Decoded images against their originals, PSNR in dB", False),
    ("rewards", "right", "right", "Share of the images right that were drawn without guidance for rewards", False),
    ("guided", "right", "right_guided", "Share of the images right that were drawn with guidance for rewards", False),
)
"""Stage, column of its log, name, title, and whether it is drawn logarithmically."""


def train(
    out: Path,
    work: Path,
    *,
    seed: int,
    vae_steps: int,
    flow_steps: int,
    refine_steps: int = 0,
    decoder_steps: int = 0,
    reward_steps: int = 0,
    guided_steps: int = 0,
    start: Model | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    progress: bool = True,
) -> Model | None:
    """The whole recipe: the model, saved in `out`; None when it was stopped. `work` holds logs and checkpoints.

    `flow_steps` of transformer and text encoders, then `refine_steps` of the transformer and `decoder_steps` of the
    decoder, each with its own rise and fall of the learning rate, then `reward_steps` and `guided_steps` of the
    transformer on its own images, without guidance and with it, each from the same start; shares of both changes are
    added. `start`: a finished model whose transformer and decoder are trained further; its tokenizers, encoders and the
    autoencoder's encoder stay as they are.
    """
    root = prng.key(seed)
    tokens_key, decoder_key, pool_key, flow_key = prng.split(root, 4)
    reward_key, guided_key = prng.fold_in(root, 2), prng.fold_in(root, 7)
    if start is None:
        tables = architecture.tokenizers(tokens_key)
        sizes = architecture.config(tables)
        trained = stages.run(work / "vae", stages.vae_stage(root, sizes, vae_steps), vae_steps, progress)
        if trained is None:
            return None
        autoencoder = trained.ema
    else:
        tables, sizes, autoencoder = start.tokenizers, start.config, start.params["vae"]
    data: dict = {}
    if start is None or refine_steps:
        data = _load_or_encode_pool(work / "pool.safetensors", pool_key, autoencoder, sizes, tables)
    if start is None:
        sizes = stages.with_measured_scaling(sizes, data["latents"])

    @functools.cache
    def captions() -> list[str]:
        listed = [world.held_out_captions(things) for things in (1, 2)]
        return [pairs[index * len(pairs) // 8][0] for pairs in listed for index in range(8)]

    def draw(state: Any, done: int) -> None:
        whole = {**(params or {}), **state.ema, "vae": autoencoder}
        with torch.no_grad():
            images = pipeline.generate(whole, sizes, tables, captions(), prng.key(seed))
        (work / "samples").mkdir(exist_ok=True)
        pixels.to_pil(pixels.grid(images, 4))[0].save(work / "samples" / f"{done:06d}.png")

    def stage(steps: int, initial: Params | None) -> Stage:
        return stages.flow_stage(flow_key, sizes, tables, data, steps, start=initial, dtype=dtype, compile=compile)

    params: Params | None = None if start is None else start.params
    for name, steps in (("flow", 0 if start else flow_steps), ("refine", refine_steps)):
        if steps:
            state = stages.run(work / name, stage(steps, params), steps, progress, draw)
            if state is None:
                return None
            params = state.ema
    if decoder_steps:
        decoder = stages.decoder_stage(decoder_key, sizes, autoencoder, decoder_steps, dtype=dtype)
        state = stages.run(work / "decoder", decoder, decoder_steps, progress)
        if state is None:
            return None
        autoencoder = state.ema
    params = {**(params or {}), "vae": autoencoder}
    model = Model({name: params[name] for name in SPECS if name in params}, sizes, tables)
    ends = []
    for name, steps, key, policy, share in (
        ("rewards", reward_steps, reward_key, rewarded.UNGUIDED, REWARD_SHARE),
        ("guided", guided_steps, guided_key, rewarded.GUIDED, GUIDED_SHARE),
    ):
        if steps:
            task = rewarded.reward_stage(key, model, steps, policy, dtype=dtype)
            rounds = Stage(task.state, task.train_step, task.batch, task.rollout)
            # A round is some twenty steps of the flow.
            state = stages.run(work / name, rounds, steps, progress, draw, every=10)
            if state is None:
                return None
            ends.append((share, task.model(state)))
    model = rewarded.add_changes(model, ends)
    weights.save(out, model, dtype=torch.float16)
    return weights.load(out, dtype=torch.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of the recipe; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m functional_sd3.recipes.shapes.tiny", description="Train params/tiny."
    )
    parser.add_argument("out", type=Path, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("out/tiny"), help="folder of logs and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--flow-steps", type=int, default=FLOW_STEPS, help="of transformer and text encoders")
    parser.add_argument("--refine-steps", type=int, default=REFINE_STEPS, help="of the transformer alone, after those")
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS, help="of the decoder alone, after those")
    parser.add_argument("--reward-steps", type=int, default=REWARD_STEPS, help="of the transformer on its own images")
    parser.add_argument("--guided-steps", type=int, default=GUIDED_STEPS, help="of the same with guidance")
    parser.add_argument("--start", type=Path, help="folder of a finished model, which learns on")
    parser.add_argument("--bfloat16", action="store_true", help="compute flow and decoder in bfloat16")
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
        decoder_steps=parsed.decoder_steps,
        reward_steps=parsed.reward_steps,
        guided_steps=parsed.guided_steps,
        start=weights.load(parsed.start, dtype=torch.float32) if parsed.start else None,
        dtype=torch.bfloat16 if parsed.bfloat16 else None,
        compile=parsed.compile,
    )
    if model is None:
        print("stopped; the same command continues from here", file=sys.stderr)
        return 130
    typed = sys.argv[1:] if arguments is None else arguments
    done = {
        "autoencoder": 0 if parsed.start else parsed.vae_steps,
        "transformer and text encoders": 0 if parsed.start else parsed.flow_steps,
        "transformer alone": parsed.refine_steps,
        "decoder alone": parsed.decoder_steps,
        "transformer on its own images, rewarded where they are right": parsed.reward_steps,
        "same with guidance, from the same start": parsed.guided_steps,
    }
    history = ", ".join(f"{steps} of the {name}" for name, steps in done.items() if steps)
    report.describe(
        parsed.out,
        model,
        model_card.read_curves(parsed.work, CURVES),
        command=" ".join(["python -m functional_sd3.recipes.shapes.tiny", *typed]),
        history=f"Steps: {history}" + (", after those of the model at --start" if parsed.start else ""),
    )
    print(parsed.out)
    return 0


def _load_or_encode_pool(path: Path, key: Key, params: Params, config: Config, tables: Tokenizers) -> dict:
    """The pool of latents and ids in a file, which is written first where it is missing."""
    if not path.exists():
        data = stages.pool(key, params, config, tables, stages.POOL)
        files.write_atomic(path, tree.flatten_paths({"latents": data["latents"], "ids": data["ids"]._asdict()}))
    mapped = files.open_mapped(path)
    ids = conditioning.Ids(*(files.tensor(mapped, f"ids.{name}") for name in conditioning.Ids._fields))
    return {"latents": files.tensor(mapped, "latents"), "ids": ids}


if __name__ == "__main__":
    sys.exit(main())
