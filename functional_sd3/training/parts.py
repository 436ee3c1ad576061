"""The two parts of a model that are trained, each as what the loop needs: a first state, a step, its batches.

`flow_part` trains the transformer, with or without the text encoders, on latents; `vae_part` the autoencoder.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functional_sd3 import pipeline
from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.image import pixels, vae
from functional_sd3.text import conditioning
from functional_sd3.text.completeness import check_encoders
from functional_sd3.training import datasets, digests, loop, lora, losses, optim, shapes, step
from functional_sd3.weights.model import SPECS, Config, Model

ENCODERS = ("clip_l", "clip_g", "t5")


class Pictures(NamedTuple):
    """A set to learn from: captions, `load(rows) -> uint8 (len(rows), 3, side, side)`, and digests of names and
    captions (`fingerprint`) and of these, the images' bytes and `side` (`contents`)."""

    captions: tuple[str, ...]
    load: Callable[[Sequence[int]], Tensor]
    fingerprint: str
    contents: str


class Part(NamedTuple):
    """What the loop runs; `model(state)` has the averaged parameters, `sample(state)` are images (batch, 3, h, w).

    learned: the names of the components that are trained, none for a LoRA.
    """

    state: step.TrainState
    train_step: Callable[[step.TrainState, Tree], tuple[step.TrainState, losses.Metrics]]
    batch: Callable[[int], Tree]
    model: Callable[[step.TrainState], Model]
    sample: Callable[[step.TrainState], Tensor]
    learned: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """How to train. `scratch`: fresh parameters; `dtype` that of the computation, None for the parameters' float32.

    lora: rank of a LoRA that is trained instead of the parameters, 0 for none. schedule: "cosine", from `rate` to a
    tenth of it at `steps`, or "constant", which does not depend on `steps`.
    """

    steps: int
    batch: int
    rate: float
    warmup: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    ema: float = 0.999
    decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    dropout: float = 0.1
    scratch: bool = False
    text_encoders: bool = False
    decoder_only: bool = False
    lora: int = 0
    dtype: torch.dtype | None = None
    compile: bool = False


def shapes_pictures(key: Key, count: int, side: int) -> Pictures:
    """`count` scenes of the world of `shapes`, drawn when they are asked for."""
    scene_key, wording_key = prng.split(key)
    scenes = shapes.scenes(scene_key, count)
    picks = prng.uniform(wording_key, (count,)).tolist()
    # Six of ten canonical, as in the recipe of the shipped model.
    captions = tuple(
        shapes.caption(scene, 0 if pick < 0.6 else 1 + int((pick - 0.6) * 150))
        for scene, pick in zip(scenes, picks, strict=True)
    )

    def load(rows: Sequence[int]) -> Tensor:
        drawn = pixels.from_pil([shapes.draw(scenes[int(row)], side) for row in rows])
        return pixels.to_bytes(drawn)

    return Pictures(captions, load, _fingerprint(captions), digests.combined([str(side), *captions]))


def folder_pictures(index: datasets.Index, side: int) -> Pictures:
    """The images of a folder, read when they are asked for. Raises WeightsError where one cannot be read any more."""
    captions = tuple(sample.caption for sample in index.samples)
    load = lambda rows: datasets.load_batch(index, rows, side)  # noqa: E731
    names = [f"{sample.path}\n{sample.caption}" for sample in index.samples]
    contents = digests.file_digests(index.folder / sample.path for sample in index.samples)
    return Pictures(captions, load, _fingerprint(names), digests.combined([str(side), *names, *contents]))


def flow_part(key: Key, model: Model, pictures: Pictures, data: Tree, settings: Settings) -> Part:
    """The transformer, and with `settings.text_encoders` these too, on `datasets.encode_all` of the pictures.

    What is trained of `model.params` is float32, the rest of any dtype: it is used as it is. A LoRA's base is in
    `settings.dtype`, where that is given, and float32 otherwise. Text of encoders that do not learn is
    encoded for each batch, without gradients.
    """
    config, tokenizers = model.config, model.tokenizers
    check_encoders([name for name in ENCODERS if name in model.params], tokenizers)
    init_key, run_key, order_key, sample_key = prng.split(key, 4)
    names = [name for name in ENCODERS if name in model.params and settings.text_encoders] + ["transformer"]
    described = {name: SPECS[name](getattr(config, name)) for name in names}
    if settings.lora:
        described = lora.spec(described, settings.lora, [f"{name}.blocks.*attention*" for name in names])
        names = []
    device = tree.leaves(model.params)[0].device
    params = (
        specs.init(init_key, described, device=device)
        if settings.lora
        else _start(init_key, model, names, settings.scratch)
    )
    fixed = {name: tensors for name, tensors in model.params.items() if name not in names}
    blank = conditioning.tokenize(config, tokenizers, [""], t5_length=data["ids"].t5.shape[1])

    def text(ids: conditioning.Ids) -> Tree:
        ids = conditioning.Ids(*(part.to(device) for part in ids))
        if settings.text_encoders:
            return {"ids": ids}
        with torch.no_grad():
            encoded = conditioning.encode(fixed, config, ids)._asdict()
            # The encoders may be stored in another dtype than what learns from them is computed in.
            return tree.cast(encoded, settings.dtype or torch.float32)

    loss = losses.flow_loss(
        config,
        shift=config.schedule.shift if config.schedule else 1.0,
        dropout=settings.dropout,
        empty=text(blank),
        dtype=settings.dtype,
    )
    if settings.lora:
        # The base is not learned, so it is no part of the state and has no average, no copy in checkpoints.
        whole_loss = loss
        loss = lambda learned, batch, keys: whole_loss(lora.apply(fixed, learned, lazy=True), batch, keys)  # noqa: E731
    order = loop.order(order_key, settings.batch, len(data["latents"]))

    def batch(number: int) -> Tree:
        rows = order(number)
        return {"latents": data["latents"][rows].to(device)} | text(tree.map(lambda ids: ids[rows], data["ids"]))

    def whole(state: step.TrainState) -> Model:
        params = lora.apply(fixed, state.ema) if settings.lora else _ordered({**fixed, **state.ema})
        return model._replace(params=params)

    def sample(state: step.TrainState) -> Tensor:
        prompts = [pictures.captions[index * len(pictures.captions) // 4] for index in range(4)]
        side = data["latents"].shape[-1] * vae.factor(config.vae)
        with torch.no_grad():
            return pipeline.generate(
                whole(state).params, config, tokenizers, prompts, sample_key, height=side, width=side,
                t5_length=data["ids"].t5.shape[1],
            )  # fmt: skip

    return _part(run_key, params, loss, settings, step.trainable(described), batch, whole, sample, tuple(names))


def vae_part(key: Key, model: Model, pictures: Pictures, settings: Settings) -> Part:
    """The autoencoder on pictures. Fresh ones measure their own scaling and shift when they are done.

    A transformer reads the latents of the encoder it was trained with: `settings.decoder_only` leaves that one alone.
    """
    config = model.config
    init_key, run_key, order_key = prng.split(key, 3)
    params = _start(init_key, model, ["vae"], settings.scratch)["vae"]
    device = tree.leaves(params)[0].device
    order = loop.order(order_key, settings.batch, len(pictures.captions))

    def images(rows: Iterable[int]) -> Tensor:
        return pixels.to_signed(pixels.from_bytes(pictures.load(rows))).to(device)

    def whole(state: step.TrainState) -> Model:
        sizes = _measured(state.ema, config, images) if settings.scratch else config.vae
        changed = replace(config, vae=sizes)
        return model._replace(config=changed, params=_ordered({**model.params, "vae": state.ema}))

    def _measured(ema: Params, config: Config, images: Callable[[Iterable[int]], Tensor]) -> vae.Config:
        with torch.no_grad():
            rows = range(min(len(pictures.captions), 256))
            means = torch.cat([vae.encode(ema, config.vae, images([row])).mean for row in rows])
        scaling, shift = float(1.0 / means.std().clamp_min(1e-6)), float(means.mean())
        return replace(config.vae, scaling=round(scaling, 4), shift=round(shift, 4))

    def sample(state: step.TrainState) -> Tensor:
        given = images(range(min(len(pictures.captions), 4)))
        with torch.no_grad():
            decoded = vae.decode(state.ema, config.vae, vae.encode(state.ema, config.vae, given).mean)
        return pixels.from_signed(torch.cat([given, decoded]))

    learned = step.trainable(SPECS["vae"](config.vae), "decoder.*" if settings.decoder_only else "*")
    loss = losses.vae_loss(config.vae, dtype=settings.dtype)
    batch = lambda number: {"images": images(order(number))}  # noqa: E731
    return _part(run_key, params, loss, settings, learned, batch, whole, sample, ("vae",))


def learning_rate(settings: Settings) -> optim.Schedule:
    """The learning rate of a run as a function of the steps done."""
    if settings.schedule == "constant":
        return optim.warmup_constant(settings.rate, settings.warmup)
    warmup = min(settings.warmup, settings.steps - 1)
    return optim.warmup_cosine(settings.rate, warmup, settings.steps, 0.1 * settings.rate)


def _part(
    key: Key,
    params: Params,
    loss: losses.Loss,
    settings: Settings,
    learned: Callable[[str, Any], bool],
    batch: Callable[[int], Tree],
    whole: Callable[[step.TrainState], Model],
    sample: Callable[[step.TrainState], Tensor],
    names: tuple[str, ...],
) -> Part:
    rate = learning_rate(settings)
    # Biases, norms and other vectors have no scale to shrink to.
    decayed = lambda path, leaf: leaf.ndim >= 2  # noqa: E731
    optimizer = optim.chain(
        optim.clip_by_global_norm(settings.clip), optim.adamw(rate, b2=0.99, decay=settings.decay, mask=decayed)
    )
    train_step = step.make_train_step(
        loss,
        optimizer,
        trainable=learned,
        ema_decay=settings.ema,
        accumulate=settings.accumulate,
        compile=settings.compile,
        donate=True,
        rate=rate,
    )
    return Part(step.init(key, params, optimizer, trainable=learned), train_step, batch, whole, sample, names)


def _start(key: Key, model: Model, names: Sequence[str], scratch: bool) -> dict[str, Params]:
    if not scratch:
        return {name: model.params[name] for name in names}
    device = tree.leaves(model.params)[0].device
    keys = prng.split(key, len(names))
    return {
        name: specs.init(own, SPECS[name](getattr(model.config, name)), device=device)
        for own, name in zip(keys, names, strict=True)
    }


def _ordered(params: dict[str, Params]) -> dict[str, Params]:
    return {name: params[name] for name in SPECS if name in params}


def _fingerprint(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]
