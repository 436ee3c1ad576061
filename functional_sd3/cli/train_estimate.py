"""`train --estimate`: a table of the memory of a run and of the choices that change it, before anything is loaded."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from functional_sd3 import weights
from functional_sd3.cli import mesh_options, report, runtime, train_subjects, view_options
from functional_sd3.formats import default_dtype
from functional_sd3.formats.printable import shorten
from functional_sd3.image import vae
from functional_sd3.layouts.components import Config, require
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel import offload, tensor
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh
from functional_sd3.parallel.processes import Processes
from functional_sd3.text import clip, t5
from functional_sd3.training import cache, estimate, flow_learners
from functional_sd3.training.memory_choice import Choice
from functional_sd3.training.update_rule import UpdateRule
from functional_sd3.transformer import mmdit
from functional_sd3.weights import shipped

TRANSFORMERS = {"sd3-medium": mmdit.SD3_MEDIUM, "sd3.5-medium": mmdit.SD35_MEDIUM, "sd3.5-large": mmdit.SD35_LARGE}
"""Released models by the names that --params takes with --estimate alone."""
MIB = 2**20


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Raises ValueError for a mesh and sizes that do not fit."""
    config, stored = _model(arguments)
    base = _choice(arguments, config, stored)
    depth = require(config, "transformer").depth
    offload.check_count(base.swapped, {"transformer": depth}, "--block-swap")
    rows = [("this command", base)]
    if not (base.autoencoder or base.control or base.word):
        rows += _others(base, depth)
    named = " ".join(arguments.params or [shipped.NAME])
    side = base.side * (1 if base.autoencoder else vae.factor(require(config, "vae")))
    processes = f", on one process of {base.mesh.size()}" if base.mesh.size() > 1 else ""
    report.say(f"{named}: {base.batch} images of {side} x {side} a step, in MiB{processes}")
    columns = ("learned", "frozen", "average", "optimizer", "gradients", "activations", "total")
    width = max(len(name) for name, _ in rows)
    report.say(" ".join([" " * width, *(f"{name:>11}" for name in columns)]))
    measured: estimate.Measured = {}
    for name, choice in rows:
        needed = estimate.memory(config, choice, measured)
        numbers = [*needed, needed.total]
        report.say(" ".join([f"{name:<{width}}", *(f"{number / MIB:>11,.0f}" for number in numbers)]))
    if base.autoencoder:
        return 0
    sizes = require(config, "transformer")
    latents = sizes.in_channels * base.side**2 * 4
    text = (base.tokens * sizes.context_width + sizes.pooled_width) * 4
    report.say(
        f"for every 1,000 images: latents {1000 * latents / MIB:,.0f} MiB, mapped from a cache or on the host; text of "
        f"every 1,000 captions {1000 * text / MIB:,.0f} MiB"
    )
    return 0


def released_config(paths: Sequence[str]) -> Config | None:
    """The config of a released model of which --params is the name; None for files."""
    if len(paths) != 1 or paths[0] not in TRANSFORMERS:
        return None
    return Config(clip.CLIP_L, clip.CLIP_G, t5.T5_XXL, TRANSFORMERS[paths[0]], vae.SD3_VAE)


def choice_of(arguments: argparse.Namespace) -> Choice:
    """The `Choice` of a command line, by which the memory of its run is estimated."""
    return _choice(arguments, *_model(arguments))


def _model(arguments: argparse.Namespace) -> tuple[Config, torch.dtype]:
    """The config of --params, and the dtype that its frozen components have."""
    device = runtime.device(arguments.device)
    paths = arguments.params or [shipped.NAME]
    if (released := released_config(paths)) is not None:
        return released, torch.bfloat16
    model = weights.load([shipped.resolve(path) for path in paths], dtype="stored", variant=arguments.variant)
    runtime.require(model, ("transformer", "vae"), shorten(" and ".join(map(str, paths)), 200))
    some = model.params["vae"]["decoder"]["conv_in"]["weight"].dtype
    return model.config, default_dtype.choose(None, {some}, device) or some


def _choice(arguments: argparse.Namespace, config: Config, stored: torch.dtype) -> Choice:
    factor = vae.factor(require(config, "vae"))
    sizes = require(config, "transformer")
    multiple = factor * (1 if arguments.part == "vae" else sizes.patch_size)
    # The images of the largest area need most.
    largest = max(view_options.areas(arguments), default=0) // multiple * multiple
    pixels = arguments.size or largest or sizes.sample_size * factor
    if pixels % multiple:
        raise ValueError(f"--size {pixels} must be a multiple of {multiple} pixels")
    length = config.clip_l.length if config.clip_l else config.clip_g.length if config.clip_g else 0
    text = 256 if config.t5 is not None else 0
    if config.t5 is not None and (arguments.params or [shipped.NAME])[0] not in TRANSFORMERS:
        tokenizers = weights.outline([shipped.resolve(path) for path in arguments.params or [shipped.NAME]]).tokenizers
        text = min(256, tokenizers.t5.model_max_length) if tokenizers.t5 else 256
    learned = getattr(torch, arguments.weights)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    word = train_subjects.inversion(arguments)
    if dtype is None and (arguments.lora or arguments.control or word):
        dtype = torch.bfloat16 if stored.itemsize == 2 else torch.float32
    prior = arguments.prior_data or arguments.prior_prompt
    control = None
    if arguments.control is not None:
        control = flow_learners.control_config(config, arguments.control, arguments.control_depth)
    return Choice(
        # As many images that preserve the prior are in every batch.
        batch=arguments.batch_size * (2 if prior else 1),
        side=pixels if arguments.part == "vae" else pixels // factor,
        tokens=length + text,
        accumulate=arguments.accumulate,
        rule=UpdateRule(arguments.optimizer, learned, arguments.fused_update),
        dtype=dtype or (learned if learned != torch.float32 else None),
        stored=stored,
        lora=arguments.lora or 0,
        text_encoders=arguments.text_encoders == "train" or (arguments.scratch and arguments.text_encoders is None),
        control=control,
        word=dict.fromkeys(word.encoders, word.vectors) if word else {},
        autoencoder=arguments.part == "vae",
        decoder_only=arguments.decoder_only,
        remat=arguments.remat,
        base=arguments.base is not None,
        swapped=arguments.block_swap or 0,
        encoders=arguments.data is None or arguments.data == "shapes" or not cache.is_cache(arguments.data),
        mesh=_mesh(arguments, sizes),
    )


def _mesh(arguments: argparse.Namespace, sizes: mmdit.Config) -> Mesh:
    """The sizes of --mesh, which need no processes here. Raises ValueError for those that do not fit."""
    if arguments.mesh is None:
        return ONE_PROCESS
    try:
        given = meshes.parse(arguments.mesh, (*mesh_options.AXES, *mesh_options.WITHIN))
    except ValueError as error:
        raise ValueError(f"--mesh: {error}") from None
    mesh = Mesh({axis: given.get(axis, 1) for axis in meshes.AXES})
    mesh_options.check_batch(arguments, Processes(mesh, torch.device("cpu")))
    tensor.check_heads(sizes.heads, mesh.size("tensor"))
    return mesh


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
