"""Traces of runs: `trace` draws as `generate` does and records tokens, states, attention and times."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Key, Params
from functional_sd3.flow.caches import Cache
from functional_sd3.flow.guidance import Guidance
from functional_sd3.image import vae
from functional_sd3.layouts.components import Config, require
from functional_sd3.look import markup, observe, run_page, tokens
from functional_sd3.look.clock import Clock, timed
from functional_sd3.look.record import Attention, Frames, Record
from functional_sd3.look.run import Run, follow
from functional_sd3.pipeline.adapters import adapted
from functional_sd3.pipeline.components import Components, encoder_names, fetch
from functional_sd3.pipeline.draw import decode_latents
from functional_sd3.pipeline.encoding import T5_LENGTH
from functional_sd3.pipeline.latents import tile_sizes
from functional_sd3.pipeline.prepare import Prepared, prepare
from functional_sd3.pipeline.preview import preview
from functional_sd3.pipeline.request import (
    AnyMethod,
    BlockTransform,
    Loras,
    OnStep,
    Request,
    SamplingOptions,
    TextOptions,
)
from functional_sd3.pipeline.sampling import chosen_method
from functional_sd3.transformer.control import Control
from functional_sd3.transformer.ip_adapter import ImagePrompt
from functional_sd3.transformer.mmdit import AttendBlocks
from functional_sd3.weights.model import Tokenizers

ATTENTION_STEPS = 8
"""Steps of which maps of attention are computed by default."""


class Trace(Record):
    """A `Record` that a notebook shows as its page."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return markup.frame(run_page.page(self))


def trace(
    params: Components,
    config: Config,
    tokenizers: Tokenizers,
    prompt: str,
    key: Key,
    *,
    attention_steps: int = ATTENTION_STEPS,
    attention_blocks: Collection[int] | None = None,
    image_steps: int | None = None,
    negative: str | None = None,
    steps: int = 28,
    cfg: float | Tensor = 5.0,
    guidance: Guidance | None = None,
    height: int | None = None,
    width: int | None = None,
    method: AnyMethod | None = None,
    noise: Tensor | None = None,
    on_step: OnStep | None = None,
    t5_length: int | None = None,
    weighted: bool = False,
    long_prompts: bool = False,
    skip_layers: Sequence[int] = (),
    control: Sequence[Control] = (),
    image_prompt: ImagePrompt | None = None,
    block_transform: BlockTransform | None = None,
    attend: AttendBlocks | None = None,
    implementation: Implementation = "sdpa",
    cache: Cache | str | None = None,
    loras: Loras = (),
) -> Trace:
    """`Record` of the run of one prompt: tokens, states, predictions, velocities, attention, times.

        record = sd3.look.trace(params, config, tokenizers, "a large red circle", sd3.prng.key(0))
        record.image        # (3, height, width), to the bit that of `generate` with the same arguments
        sd3.look.save("look/", record)    # look/index.html and its PNGs; a notebook shows a record as this page

    attention_steps: of how many steps, evenly spaced with both ends, the maps of attention are computed, 0 for none:
    each is one evaluation of the transformer more. attention_blocks: of which blocks, by default of all.
    image_steps: of how many steps the state and the predicted data are decoded, by default of all. The rest as in
    `pipeline.generate`, for one prompt; without gradients.
    """
    text = TextOptions(negative, t5_length, weighted, long_prompts)
    run = SamplingOptions(
        steps, cfg, guidance, method, on_step, skip_layers, control, image_prompt, block_transform, attend,
        implementation, cache,
    )  # fmt: skip
    request = Request(prompt, key, text, run, height=height, width=width, noise=noise, loras=loras)
    return trace_request(
        params,
        config,
        tokenizers,
        request,
        attention_steps=attention_steps,
        attention_blocks=attention_blocks,
        image_steps=image_steps,
    )


@torch.no_grad()
def trace_request(
    components: Components,
    config: Config,
    tokenizers: Tokenizers,
    request: Request,
    *,
    attention_steps: int = ATTENTION_STEPS,
    attention_blocks: Collection[int] | None = None,
    image_steps: int | None = None,
) -> Trace:
    """`trace` of a request: from start images, with a mask, regions, tiles, LoRAs and words too.

    components: name -> parameters, a tree or a function that reads one at a time. Raises ValueError for a request of
    several images, of frames or of an edit, and for one without a step.
    """
    _check(request, config, attention_steps, attention_blocks, image_steps)
    clock = Clock("tokens")
    components, config, tokenizers = adapted(components, config, tokenizers, request.loras, request.words)
    components, request = timed(components, clock), replace(request, loras=(), words=())
    encoders = tuple(encoder_names(components, config))
    prepared = prepare(components, config, tokenizers, request)
    prompt = tokens.read(
        config, tokenizers, request.prompts[0], request.text, encoders, _t5_length(request, tokenizers)
    )
    transformer = {"transformer": fetch(components, "transformer")}
    run = follow(transformer, config, prepared, clock)
    request, notes, attention = prepared.request, _notes(request), None
    chosen = evenly(attention_steps, len(run.denoised))
    if chosen and request.tiling is None:
        clock.begin("attention maps")
        depth = require(config, "transformer").depth
        blocks = range(depth) if attention_blocks is None else sorted(set(attention_blocks))
        attention = observe.attention_of(
            transformer, config, prepared, prompt, run.states, run.times, chosen, tuple(blocks)
        )
    settings = _settings(transformer["transformer"], config, prepared, run)
    del transformer
    decoder = {"vae": fetch(components, "vae")}
    clock.begin("decoding")
    image = decode_latents(decoder, config, prepared, run.states[-1:])[0].cpu()
    clock.begin("decoding of the steps")
    decoded = _frames(components, decoder, config, request, run, evenly(image_steps, len(run.denoised)))
    clock.begin("")
    return Trace(
        prompt, _negative(request), image, run.times.cpu(), run.states.cpu(), run.denoised.cpu(), run.velocities.cpu(),
        decoded, run.evaluations, attention and _on_cpu(attention), clock.seconds, run.seconds, settings, notes,
    )  # fmt: skip


def evenly(count: int | None, of: int) -> tuple[int, ...]:
    """At most `count` of the indices below `of`, evenly spaced, the first and the last among them; None for all."""
    if count is None or count >= of:
        return tuple(range(of))
    if count == 1:
        return (of - 1,)
    return tuple(round(index * (of - 1) / (count - 1)) for index in range(count))


def _frames(
    components: Components, decoder: Params, config: Config, request: Request, run: Run, steps: tuple[int, ...]
) -> Frames:
    """Images of the states and predictions of some steps, decoded one by one, which bounds the memory."""
    decoders = decoder if config.taesd is None else {"taesd": fetch(components, "taesd")}
    tile = None
    if request.tiling is not None:
        side, overlap = tile_sizes(config, request.tiling.side, request.tiling.overlap)
        tile = max(side, 2 * overlap)
    images = [
        [preview(decoders, config, latents[step][None], tile=tile)[0].cpu() for step in steps]
        for latents in (run.states, run.denoised)
    ]
    return Frames(steps, *map(torch.stack, images))


def _check(
    request: Request, config: Config, attention_steps: int, blocks: Collection[int] | None, image_steps: int | None
) -> None:
    if len(request.prompts) != 1 or request.frames is not None or request.edit is not None:
        what = f"{len(request.prompts)} prompts" if len(request.prompts) != 1 else "frames or an edit"
        raise ValueError(f"this looks at one image of one prompt, not at {what}: trace each image by itself")
    if request.show is not None:
        raise ValueError("show has no effect here: the states and the predictions of all steps are kept")
    if attention_steps < 0:
        raise ValueError(f"attention_steps {attention_steps} must be at least 0, which is no maps of attention")
    if image_steps is not None and image_steps < 1:
        raise ValueError(f"image_steps {image_steps} must be at least 1, or None for every step")
    depth = require(config, "transformer").depth
    if absent := sorted(block for block in blocks or () if not 0 <= block < depth):
        raise ValueError(f"attention_blocks {absent} are not among the blocks 0 to {depth - 1}")


def _t5_length(request: Request, tokenizers: Tokenizers) -> int:
    if request.text.t5_length is not None:
        return request.text.t5_length
    return T5_LENGTH if tokenizers.t5 is None else min(T5_LENGTH, tokenizers.t5.model_max_length)


def _negative(request: Request) -> str:
    negative = request.text.negative
    return negative if isinstance(negative, str) else (negative[0] if negative else "")


def _notes(request: Request) -> tuple[str, ...]:
    """Sentences on what is not shown of this request, and why."""
    notes = []
    if request.tiling is not None:
        notes.append("An image in tiles has no maps of attention: each evaluation sees one tile.")
    if request.regions:
        notes.append("Tokens and attention are those of the image's own prompt, not those of the regions.")
    if request.field is not None:
        notes.append("A field of one's own combines its velocities itself: their norms are not known.")
    return tuple(notes)


def _settings(transformer: Params, config: Config, prepared: Prepared, run: Run) -> dict[str, Any]:
    """Settings of the run, for reading."""
    sizes, sampling = require(config, "transformer"), prepared.request.sampling
    method = chosen_method(config, 1, sampling.method, prepared.keys)
    guided = None if sampling.guidance is None else sampling.guidance.made_by
    own = guided.function if guided else "a guidance of one's own"
    count = sum(leaf.numel() for leaf in tree.leaves(transformer))
    weight, factor = transformer["patch"]["weight"], vae.factor(require(config, "vae"))
    height, width = (factor * side for side in run.states.shape[-2:])
    return {
        "size": f"{width} x {height} pixels",
        "method": method.name,
        "steps": len(run.denoised),
        "guidance": f"cfg {_number(sampling.cfg)}" if sampling.guidance is None else own,
        "transformer": f"{sizes.depth} blocks, width {sizes.width}, {sizes.heads} heads, {count:,} parameters",
        "blocks with dual attention": ", ".join(map(str, sizes.dual_attention_layers)) or "none",
        "computed": f"{weight.dtype} on {weight.device}".removeprefix("torch."),
    }


def _number(scale: float | Tensor) -> str:
    return f"{float(scale.flatten()[0] if isinstance(scale, Tensor) else scale):g}"


def _on_cpu(attention: Attention) -> Attention:
    to_words, from_words, image = (part.cpu() for part in (attention.to_words, attention.from_words, attention.image))
    return attention._replace(to_words=to_words, from_words=from_words, image=image)
