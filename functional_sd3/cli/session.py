"""The model that a command draws with, opened by its options, and its requests drawn stage by stage."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3 import pipeline, weights
from functional_sd3.cli import caching, controls, distilled, guidance, lora_options, precision, report, runtime
from functional_sd3.cli.opened_model import Session
from functional_sd3.cli.timing import Timer
from functional_sd3.core import prng, transform, tree
from functional_sd3.core.types import Params
from functional_sd3.flow import ode
from functional_sd3.formats.default_dtype import Default
from functional_sd3.image import vae
from functional_sd3.kernels import allocator
from functional_sd3.layouts.components import Config, require
from functional_sd3.parallel import tensor
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.pipeline import Components, Prepared, Request, SamplingOptions, TextOptions, swapping
from functional_sd3.text.completeness import check_encoders
from functional_sd3.transformer import mmdit
from functional_sd3.transformer.control import Control
from functional_sd3.weights import shipped
from functional_sd3.weights.model import Model, Tokenizers


class ReadModel(NamedTuple):
    """A model as --params, --dtype, --device and --offload read it, before a run adds LoRAs, words and guidance to it.

    components: its parameters, or with --offload a function that reads them. place: the device of what is read.
    dtype_word: of --dtype, as images record it.
    """

    model: Model
    components: Components
    device: torch.device
    place: torch.device
    dtype: torch.dtype | Default
    dtype_word: str


def open_session(arguments: argparse.Namespace, timer: Timer, mesh: Mesh | None = None) -> Session:
    """The model of the options; mesh: of the processes that draw with it together.

    Raises ValueError for options that make no sense, WeightsError for weights that cannot be read.
    """
    timer.done("import")
    device = runtime.device(arguments.device)
    runtime.method(arguments.method or "euler", prng.key(0), rtol=arguments.rtol, atol=arguments.atol)
    for text in arguments.guidance:
        guidance.parse(text)
    # `likelihood` has no ControlNets.
    for text in getattr(arguments, "control", ()):
        controls.parse(text)
    lora_options.check(arguments.lora)
    if arguments.compile:
        transform.check_compiler()
    return adapted_session(arguments, timer, read_model(arguments, device, mesh), mesh)


def read_model(arguments: argparse.Namespace, device: torch.device, mesh: Mesh | None = None) -> ReadModel:
    """The model of --params on a device; over a mesh, and with --offload, a function that reads its components.

    Raises WeightsError for weights that cannot be read, ValueError where the model cannot draw.
    """
    source = arguments.params or shipped.folder()
    dtype, word = precision.choose(arguments, source, device)
    if device.type == "cpu" and mesh is None and not arguments.offload and arguments.block_swap is None:
        allocator.keep_freed_memory()
    options = {"dtype": dtype, "device": device, "quantized": True, "variant": arguments.variant}
    only = [name for name in weights.SPECS if name not in arguments.without]
    components: Components
    exact = precision.solves(arguments)
    place = torch.device("cpu") if mesh is not None and mesh.size("tensor") > 1 else device
    if arguments.offload or mesh is not None:
        options["device"] = place
        model = weights.outline(source, only=only, variant=arguments.variant)
        components = precision.fetcher(device, source, computed=dtype, exact=exact, **options)
    else:
        model = weights.load(source, only=only, **options)
        components = {
            name: precision.with_products_of(part, device, dtype, exact=exact) for name, part in model.params.items()
        }
    remedy = ": give the file or folder that holds it with another --params"
    runtime.require(model, ("transformer", "vae"), " and ".join(arguments.params or [str(source)]), remedy)
    if arguments.block_swap is not None:
        swapping.check_count(model.config, arguments.block_swap, "--block-swap")
        stored = {**options, "dtype": "stored", "device": "cpu"}
        mapped = precision.fetcher(device, source, computed=dtype, exact=exact, **stored)
        components, config = pipeline.swap_blocks(mapped, model.config, arguments.block_swap, device, dtype=dtype)
        model = model._replace(config=config)
    # Before images are read and the first prompt is encoded, which checks it again.
    check_encoders([name for name in Tokenizers._fields if getattr(model.config, name) is not None], model.tokenizers)
    return ReadModel(model, components, device, place, dtype, word)


def adapted_session(arguments: argparse.Namespace, timer: Timer, read: ReadModel, mesh: Mesh | None = None) -> Session:
    """The model with the LoRAs, words and guidance of the options, and the defaults of distilled models in them."""
    model, components, device, place, dtype, word = read
    # Images record it, so that another machine makes them alike.
    arguments.dtype = word
    if mesh is not None:
        _check_mesh(arguments, model.config, mesh)
    model = model._replace(config=lora_options.student_config(arguments.lora, model.config))
    components = lora_options.with_interval(components, model.config)
    distilled.apply_defaults(arguments, model.config)
    is_student = bool(model.config.schedule and model.config.schedule.distillation)
    caching.check_steps(arguments, arguments.method or pipeline.default_method(model.config), is_student=is_student)
    loras, words = lora_options.load(arguments.lora, model.config, place), runtime.words(arguments.embedding)
    components, config, tokenizers = pipeline.adapted(components, model.config, model.tokenizers, loras, words)
    # A tree is adapted once for the run, not for each batch.
    fetch = components if callable(components) else dict(components).__getitem__
    if mesh is not None:
        config = pipeline.with_mesh(config, mesh)
        fetch = _own_parts(fetch, config, mesh, device, keep=not arguments.offload)
    opened = Session(config, tokenizers, fetch, device, dtype, timer, loras=loras, words=words)
    return opened._replace(guidance=guidance.prepare(arguments, opened))


def _check_mesh(arguments: argparse.Namespace, config: Config, mesh: Mesh) -> None:
    """Raises ValueError for a mesh over which this run cannot be divided."""
    tensor.check_heads(require(config, "transformer").heads, mesh.size("tensor"))
    guided = 1 if arguments.cfg <= 1 and not arguments.guidance else 2
    rows = guided * min(arguments.batch, arguments.count * max(1, len(arguments.prompt)))
    if not arguments.prompts and rows < mesh.size("guidance"):
        raise ValueError(
            f"--mesh guidance={mesh.size('guidance')} divides the conditionings of all images drawn at once, here "
            f"{rows}: one for each image and, with --cfg above 1, its negative prompt"
        )
    if arguments.compile and mesh.size("sequence") > 1:
        raise ValueError(
            "--compile makes one graph of a block, in which parts of different lengths are not exchanged, as those of "
            "--mesh sequence are: use guidance or tensor, or leave out --compile"
        )


def _own_parts(
    fetch: Callable[[str], Params], config: Config, mesh: Mesh, device: torch.device, *, keep: bool
) -> Callable[[str], Params]:
    """Components of which a process computes a part: of the transformer's heads its own, on the device.

    keep: each is read once, when it is first needed; a process that never needs a text encoder never reads it.
    """
    read: dict[str, Params] = {}

    def own(name: str) -> Params:
        if name in read:
            return read[name]
        params = fetch(name)
        if name == "transformer":
            network = require(config, "transformer")
            params = tensor.cut(params, mmdit.spec(network), mesh, heads=network.heads)
        params = tree.to(params, device)
        if keep:
            read[name] = params
        return params

    return own


def image_size(session: Session, size: tuple[int, int] | None, *, bounded: bool = True) -> tuple[int, int]:
    """Width and height of images in pixels. Raises ValueError where the model cannot draw them (`bounded`: at once)."""
    height, width = pipeline.latent_size(session.config, *(size[::-1] if size else ()), bounded=bounded)
    factor = vae.factor(require(session.config, "vae"))
    return width * factor, height * factor


def text_options(arguments: argparse.Namespace) -> TextOptions:
    """The `TextOptions` of the command line."""
    return TextOptions(arguments.negative, weighted=arguments.weighted, long_prompts=arguments.long)


def sampling_options(
    session: Session,
    arguments: argparse.Namespace,
    on_step: Callable[[Any], Any],
    control: Sequence[Control] = (),
    default: str | None = None,
) -> SamplingOptions:
    """The `SamplingOptions` of the command line.

    default: the method where --method names none, instead of that of the model's scheduler config.
    """
    method = arguments.method or default
    if method in ode.ADAPTIVE:
        method = runtime.method(method, rtol=arguments.rtol, atol=arguments.atol)
    return SamplingOptions(
        arguments.steps,
        guidance.scale(arguments.cfg),
        session.guidance,
        method,
        on_step,
        control=control,
        block_transform=transform.compile if arguments.compile else None,
        cache=arguments.cache,
    )


def without_adapters(request: Request) -> Request:
    """The request for components that have its LoRAs and words already, as those of a session do."""
    return replace(request, loras=(), words=())


@torch.no_grad()
def prepare(session: Session, request: Request) -> Prepared:
    """`pipeline.prepare`, with its time taken."""
    session.timer.stage = "reading the prompts"
    prepared = pipeline.prepare(session.fetch, session.config, session.tokenizers, without_adapters(request))
    session.timer.done("text", session.device)
    return prepared


@torch.no_grad()
def draw(session: Session, requests: Iterable[Request], batch: int, *, offload: bool) -> Iterator[Tensor]:
    """The images (count, 3, height, width) of each batch as soon as they are drawn, on the CPU.

    offload: one component in memory at a time, each for all batches; else batch by batch, and request by request.
    """
    if offload:
        parts = [part for request in requests for part in pipeline.split_batches(prepare(session, request), batch)]
        yield from _draw_parts(session, parts)
        return
    for request in requests:
        for part in pipeline.split_batches(prepare(session, request), batch):
            yield from _draw_parts(session, [part])


def _draw_parts(session: Session, parts: Sequence[Prepared]) -> Iterator[Tensor]:
    """`pipeline.draw` of each, with the time of its stages taken."""
    params = {"transformer": session.fetch("transformer")}
    session.timer.done("load", session.device)
    latents = []
    for part in parts:
        session.timer.stage = "sampling"
        latents.append(pipeline.sample_latents(params, session.config, part))
        session.timer.done("sampling", session.device)
    # Dropped before the next is read.
    params = {}
    mesh = pipeline.mesh_of(session.config)
    if mesh is not None and mesh.rank:
        return  # The first process decodes the images, which it writes.
    params = {"vae": session.fetch("vae")}
    session.timer.done("load", session.device)
    for part, each in zip(parts, latents, strict=True):
        session.timer.stage = "decoding"
        images = pipeline.decode_latents(params, session.config, part, each).cpu()
        session.timer.done("decoding", session.device)
        yield images


def note_truncated(session: Session, texts: Sequence[str], arguments: argparse.Namespace) -> None:
    """Says on standard error which prompts the encoders do not read to their end."""
    from functional_sd3.text import bpe, unigram, weighting

    texts = [weighting.parse(text).text for text in texts] if arguments.weighted else texts
    tokenizers = session.tokenizers
    for name, tables, module in (("CLIP", tokenizers.clip_l, bpe), ("T5", tokenizers.t5, unigram)):
        if tables is None or (name == "CLIP" and arguments.long):
            continue
        length = min(tables.model_max_length, 256)
        for text in dict.fromkeys(texts):
            tokens = len(module.apply(tables, [text], length=None)[0])
            if tokens > length:
                start = text if len(text) <= 40 else text[:40] + "..."
                report.note(f"{name} reads {length} of the {tokens} tokens of {start!r}")
