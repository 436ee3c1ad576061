"""Training of the autoencoder on images, as a task."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from functional_sd3.core import computation, prng, tree
from functional_sd3.core.types import Key, Params
from functional_sd3.image import pixels, vae
from functional_sd3.layouts.components import SPECS, require
from functional_sd3.parallel import sharding
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh, own_rows
from functional_sd3.training import flow_learners, loop, objectives, step, tasks
from functional_sd3.training.training_images import TrainingImages
from functional_sd3.weights.model import Model


def vae_task(
    key: Key, model: Model, images: TrainingImages, settings: tasks.Settings, *, mesh: Mesh = ONE_PROCESS
) -> tasks.TrainingTask:
    """Training of the autoencoder on images; from scratch, scaling and shift are measured by `TrainingTask.model`.

    A transformer needs the latents of the encoder it was trained with: `settings.decoder_only` freezes the encoder.
    mesh: the processes that share every batch, over which `model` is divided; the autoencoder, which is small, is
    gathered at once.
    """
    config, sizes = model.config, require(model.config, "vae")
    init_key, run_key, order_key = prng.split(key, 3)
    params = flow_learners.initial_params(init_key, model, ["vae"], settings.scratch, mesh)["vae"]
    layout = computation.of(config, "vae").layout
    whole: Callable[[Params], Params] = lambda params: params  # noqa: E731
    if layout is not None:
        whole = lambda params: sharding.whole(params, layout, mesh)  # noqa: E731
    # Without the parameters at the start, which a run would hold beside its own.
    rest = model._replace(params={name: part for name, part in model.params.items() if name != "vae"})
    device = tree.leaves(params)[0].device
    order = loop.order(order_key, settings.batch, len(images.captions))

    def load(rows: Sequence[int] | Tensor) -> Tensor:
        return pixels.to_signed(pixels.from_bytes(images.load(rows))).to(device)

    def averaged_model(state: step.TrainState) -> Model:
        vae_config = _with_measured_scaling(state.ema) if settings.scratch else sizes
        params = flow_learners.in_order({**rest.params, "vae": state.ema})
        return rest._replace(config=replace(config, vae=vae_config), params=params)

    def _with_measured_scaling(params: Params) -> vae.Config:
        with torch.no_grad():
            rows = range(min(len(images.captions), 256))
            means = torch.cat([vae.encode(params, sizes, load([row])).mean for row in rows])
        scaling, shift = float(1.0 / means.std().clamp_min(1e-6)), float(means.mean())
        return replace(sizes, scaling=round(scaling, 4), shift=round(shift, 4))

    def sample(state: step.TrainState) -> Tensor:
        originals = load(range(min(len(images.captions), 4)))
        with torch.no_grad():
            params = whole(state.ema)
            decoded = vae.decode(params, sizes, vae.encode(params, sizes, originals).mean)
        return pixels.from_signed(torch.cat([originals, decoded]))

    trainable = step.trainable(SPECS["vae"](sizes), "decoder.*" if settings.decoder_only else "*")
    of_whole = objectives.vae_loss(sizes, edges=settings.edges, noise=settings.latent_noise, dtype=settings.dtype)
    loss = lambda params, batch, keys: of_whole(whole(params), batch, keys)  # noqa: E731
    batch = lambda number: {"images": load(own_rows(order(number), mesh))}  # noqa: E731
    return tasks.make_task(
        run_key, params, loss, settings, trainable, batch, averaged_model, sample, ("vae",), mesh, layout
    )
