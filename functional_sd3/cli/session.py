"""The model that a command draws with, opened as its options say."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from functional_sd3 import pipeline, weights
from functional_sd3.cli import guidance, lora_options, report, runtime
from functional_sd3.cli.timing import Timer
from functional_sd3.core import prng, transform
from functional_sd3.core.types import Key, Params
from functional_sd3.flow.guidance import Guidance
from functional_sd3.image import vae
from functional_sd3.layouts.components import Config
from functional_sd3.text.completeness import check_encoders
from functional_sd3.weights import shipped
from functional_sd3.weights.model import Tokenizers


class Session(NamedTuple):
    """`fetch`: a component's name -> its parameters, from memory or, with --offload, from disk each time."""

    config: Config
    tokenizers: Tokenizers
    fetch: Callable[[str], Params]
    device: torch.device
    dtype: torch.dtype | None
    timer: Timer
    guidance: Guidance | None = None


def start(arguments: argparse.Namespace, timer: Timer) -> Session:
    """Raises ValueError for options that make no sense, WeightsError for weights that cannot be read."""
    timer.done("import")
    device = runtime.device(arguments.device)
    runtime.method(arguments.method or "euler", prng.key(0), rtol=arguments.rtol, atol=arguments.atol)
    for text in arguments.guidance:
        guidance.parse(text)
    lora_options.check(arguments.lora)
    if arguments.compile:
        transform.check_compiler()
    source = arguments.params or shipped.folder()
    dtype = runtime.dtype(arguments.dtype, device)
    told = {"dtype": dtype, "device": device, "quantized": True, "variant": arguments.variant}
    if arguments.offload:
        if arguments.embedding:
            raise ValueError("--embedding changes the text encoders, which --offload reads as they are: leave one out")
        model, fetch = weights.outline(source, variant=arguments.variant), weights.fetcher(source, **told)
    else:
        model = runtime.with_words(weights.load(source, **told), arguments.embedding)
        fetch = model.params.__getitem__
    runtime.require(model, ("transformer", "vae"), " and ".join(arguments.params or [str(source)]))
    # Before images are read and the first prompt is encoded, which checks it again.
    check_encoders([name for name in Tokenizers._fields if getattr(model.config, name) is not None], model.tokenizers)
    fetch = lora_options.added_to(fetch, lora_options.load(arguments.lora, model.config, device))
    opened = Session(model.config, model.tokenizers, fetch, device, dtype, timer)
    return opened._replace(guidance=guidance.prepare(arguments, opened))


def picture_size(session: Session, size: tuple[int, int] | None, *, bounded: bool = True) -> tuple[int, int]:
    """Width and height in pixels of what is drawn; ValueError where the model cannot draw it (`bounded`: at once)."""
    height, width = pipeline.latent_size(session.config, *(size[::-1] if size else ()), bounded=bounded)
    factor = vae.factor(session.config.vae)
    return width * factor, height * factor


def told(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `pipeline.encode_from`."""
    return {"negative": arguments.negative, "weighted": arguments.weighted, "long_prompts": arguments.long}


def conditions(session: Session, prompts: Sequence[str], arguments: argparse.Namespace) -> list[pipeline.Conditions]:
    """Of each prompt, a row each, all of the same number of tokens."""
    both = pipeline.encode_from(session.fetch, session.config, session.tokenizers, list(prompts), **told(arguments))
    return [pipeline.rows(both, slice(index, index + 1)) for index in range(len(prompts))]


def sampling(session: Session, arguments: argparse.Namespace, keys: Key, default: str | None = None) -> dict[str, Any]:
    """The options of `pipeline.sample`; keys (batch, 2): those that the noise is drawn from. default: the method where
    --method names none, instead of what the model's scheduler config says."""
    name = arguments.method or default or pipeline.default_method(session.config)
    keys = pipeline.step_keys(keys, len(keys))
    method = runtime.method(name, keys, rtol=arguments.rtol, atol=arguments.atol)
    told = {"steps": arguments.steps, "cfg": guidance.scale(arguments.cfg), "method": method}
    told["guidance"] = session.guidance
    return {**told, "block_transform": transform.compile if arguments.compile else None}


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
