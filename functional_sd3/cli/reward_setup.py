"""A run of `reward` put together from its command line: model, prompts, rewards, sampler and settings."""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from functional_sd3 import pipeline
from functional_sd3.cli import (
    distilled,
    inputs,
    memory_options,
    prompt_words,
    reward_checks,
    reward_options,
    runtime,
    train_data,
    train_model,
    training_run,
)
from functional_sd3.cli.training_run import Setup, steps_note
from functional_sd3.core import prng, tree
from functional_sd3.core.types import Key, Params
from functional_sd3.flow import schedule
from functional_sd3.image import pixels, vae
from functional_sd3.layouts.components import require
from functional_sd3.parallel.mesh import describe
from functional_sd3.parallel.processes import ALONE, Processes
from functional_sd3.recipes.shapes import rewards as shapes_rewards
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import continuing, digests, reward_methods, reward_settings, reward_task, rewards
from functional_sd3.training import pairs as pair_files
from functional_sd3.training.reward_methods import Sampler
from functional_sd3.training.rewards import Reward
from functional_sd3.training.rollouts import PromptSource
from functional_sd3.weights import shipped
from functional_sd3.weights.model import Model

_RECORDED = (
    "batch_size", "beta", "cfg", "clip", "draw_dtype", "draws", "ema", "eps", "form", "group", "kl", "last", "lora",
    "lr", "method", "noise", "pairs", "prompts", "reward", "sampler", "sampling_steps", "seed", "size", "steps",
    "things", "times", "updates", "warmup", "weight", "window", *memory_options.NAMES,
)  # fmt: skip
"""The options that a checkpoint keeps."""


def prepare(arguments: argparse.Namespace, processes: Processes = ALONE) -> Setup:
    """Model, rewards and prompts read, and compared with those of the run that is resumed. processes: of the run.

    Raises ValueError where they, or the options, may not be used together or with that run.
    """
    source = [shipped.resolve(path) for path in arguments.params or [shipped.NAME]]
    loading = argparse.Namespace(**vars(arguments), part="transformer", dtype=None)
    mesh = processes.mesh
    stored, model, dtype = train_model.load(loading, source, mesh=mesh)
    arguments = distilled.reward_defaults(arguments, stored.config)
    reward_checks.check_sampling(arguments)
    divided = train_model.divided(loading, model)
    model = memory_options.with_computations(arguments, model, ("transformer",), mesh, divided)
    entries = [] if arguments.pairs is None else pair_files.read(arguments.pairs)
    prompts = [entry.prompt for entry in entries] or _prompts(arguments)
    settings = _settings(arguments, source, stored, prompts) | {"mesh": describe(processes.mesh.sizes)}
    if entries:
        settings[continuing.CONTENTS + "the pairs"] = pair_files.digest(entries)
    differences = lambda saved: _differences(saved, settings)  # noqa: E731
    if arguments.resume:
        training_run.check_continuing(arguments, differences)
    given = reward_checks.weights(arguments)
    options = reward_methods.Options(
        group=arguments.group,
        times=arguments.times,
        kl=arguments.kl,
        beta=arguments.beta,
        form=arguments.form or "flow",
        noise=arguments.noise,
        window=arguments.window,
        eps=arguments.eps,
        last=arguments.last or 1,
        updates=arguments.updates,
        rows=arguments.at_once,
        dtype=dtype,
    )
    task = reward_task.reward_task(
        prng.fold_in(prng.key(arguments.seed), 2),
        model,
        reward_settings.Settings(
            method=arguments.method,
            steps=arguments.steps,
            # Readings of the parts of an image are logged, and count only where they are given a weight.
            weights=given or ({"partial": 0.0} if "shapes" in arguments.reward else {}),
            default_weight=0.0 if given else 1.0,
            batch=arguments.batch_size,
            group=arguments.group,
            draws=arguments.draws,
            rate=arguments.lr,
            warmup=arguments.warmup,
            ema=arguments.ema,
            updates=arguments.updates,
            lora=arguments.lora or 0,
            draw_dtype=torch.bfloat16 if arguments.draw_dtype == "bfloat16" else None,
            at_once=arguments.at_once,
            rows=arguments.at_once,
            options=options,
            rule=memory_options.update_rule(arguments),
        ),
        reward=_rewards(arguments, model),
        source=_source(arguments, prompts),
        sampler=_sampler(arguments, model),
        decode=lambda params, latents: pipeline.decode(params, model.config, latents),
        pairs=pair_files.encode(model.params, model.config, entries, _side(arguments, model)) if entries else None,
        t5_length=_t5_length(model),
        processes=processes,
    )
    if not entries:
        task = task._replace(model=partial(_with_sampling_steps, task.model, arguments.sampling_steps))
    return Setup(task, stored, settings, differences, bool(arguments.lora), partial(steps_note, arguments.steps))


def _with_sampling_steps(model: Callable[[Any], Model], steps: int, state: Any) -> Model:
    """The model of a state; `steps` are added to the trained steps of a student's scheduler config."""
    rewarded = model(state)
    levels = rewarded.config.schedule
    if levels is None:
        return rewarded
    return rewarded._replace(config=replace(rewarded.config, schedule=schedule.with_trained_steps(levels, steps)))


def _sampler(arguments: argparse.Namespace, model: Model) -> Sampler:
    """Images as `generate` draws them, with the sampler, steps and guidance of the command line."""
    config, cfg, size = model.config, max(arguments.cfg, 1.0), (arguments.size, arguments.size)
    device = tree.leaves(model.params["transformer"])[0].device
    with torch.no_grad():
        empty = pipeline.encode(model.params, config, model.tokenizers, [""], t5_length=_t5_length(model)).negative
    empty = Conditioning(*tree.cast(list(empty), torch.float32))

    def noise(keys: Key) -> torch.Tensor:
        return pipeline.initial_noise(keys, config, len(keys), *size, device=device)

    def draw(params: Params, conditioning: Conditioning, start: torch.Tensor, keys: Key) -> dict[str, torch.Tensor]:
        negative = Conditioning(*(part.expand(len(keys), *part.shape[1:]) for part in empty))
        latents = pipeline.sample(
            params, config, pipeline.Conditions(conditioning, negative), start, steps=arguments.sampling_steps, cfg=cfg,
            method=arguments.sampler, key=keys,
        )  # fmt: skip
        return {"latents": latents}

    times = pipeline.sigmas(config, noise(prng.key(0, device=device)[None]), arguments.sampling_steps)
    return Sampler(draw, noise, times, empty, cfg)


def _prompts(arguments: argparse.Namespace) -> list[str] | None:
    """The lines of --prompts; None for captions of the shapes."""
    return None if arguments.prompts is None else prompt_words.listed([], arguments.prompts)


def _source(arguments: argparse.Namespace, prompts: list[str] | None) -> PromptSource:
    if prompts is None:
        return shapes_rewards.source(arguments.things)

    def draw(key: Key, count: int) -> tuple[list[str], list[Any]]:
        # Without one twice, as long as there are enough.
        order = [int(row) for part in range(-(-count // len(prompts))) for row in _shuffled(key, part, len(prompts))]
        return [prompts[row] for row in order[:count]], [None] * count

    return draw


def _shuffled(key: Key, part: int, count: int) -> list[int]:
    return prng.permutation(prng.fold_in(key, part), count).tolist()


def _rewards(arguments: argparse.Namespace, model: Model) -> Reward:
    """All rewards of the command line as one."""
    return rewards.combined({name: _reward(name, arguments, model) for name in arguments.reward})


def _reward(name: str, arguments: argparse.Namespace, model: Model) -> Reward:
    if name in ("shapes", "colours"):
        return getattr(shapes_rewards, name)
    if name == "clip":
        return _clip_reward(arguments)
    if name.startswith("psnr:"):
        return _psnr_reward(name.partition(":")[2], arguments, model)
    return rewards.from_name(name)


def _side(arguments: argparse.Namespace, model: Model) -> int:
    """The side in pixels of the images that are drawn."""
    return train_data.latent_side(arguments, model.config) * vae.factor(require(model.config, "vae"))


def _clip_reward(arguments: argparse.Namespace) -> Reward:
    from functional_sd3.metrics import clip_images

    clip = runtime.clip(arguments.clip, arguments.device)
    if clip.tokenizer is None:
        raise ValueError(f"--clip {arguments.clip} has no tokenizer, so it reads no prompts")
    scores = clip_images.differentiable_scores if arguments.method == "draft" else clip_images.scores
    return lambda images, prompts, facts: {"clip": scores(*clip, images, prompts)}


def _psnr_reward(path: str, arguments: argparse.Namespace, model: Model) -> Reward:
    side = _side(arguments, model)
    target = pixels.from_pil([inputs.read(path)])[0]
    if tuple(target.shape[1:]) != (side, side):
        height, width = target.shape[1:]
        raise ValueError(f"--reward psnr:{path} is {width}x{height}; the images that are drawn are {side}x{side}")
    return rewards.psnr(target)


def _settings(
    arguments: argparse.Namespace, source: list[Path], stored: Model, prompts: list[str] | None
) -> dict[str, Any]:
    """The settings in a checkpoint: the options of a run, and digests of its model and data."""
    options = {name.replace("_", "-"): getattr(arguments, name) for name in _RECORDED}
    contents = digests.model_digests(stored.params)
    if prompts is not None:
        contents["the prompts"] = digests.fingerprint(prompts)
    for name in arguments.reward:
        if name.startswith("psnr:"):
            contents[f"the target of {name}"] = digests.file_digests([Path(name.partition(":")[2])])[0]
    return {
        **options,
        "params": os.pathsep.join(str(path.resolve()) for path in source),
        **{continuing.CONTENTS + name: digest for name, digest in contents.items()},
    }


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[continuing.Difference]:
    parser = argparse.ArgumentParser()
    reward_options.add_arguments(parser)
    # Options whose default now depends on the model had these defaults before.
    before = {"sampling-steps": 8, "sampler": "euler"}
    defaults = {name.replace("_", "-"): parser.get_default(name) for name in _RECORDED} | before
    return continuing.differences(saved, now, defaults)


def _t5_length(model: Model) -> int:
    t5 = model.tokenizers.t5
    return 256 if t5 is None else min(256, t5.model_max_length)
