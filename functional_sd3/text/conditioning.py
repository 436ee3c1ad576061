"""Text conditioning of Stable Diffusion 3: context and pooled vector from the three text encoders.

Esser et al. 2024, "Scaling Rectified Flow Transformers", section 4; numerics of diffusers' `StableDiffusion3Pipeline`:

    context = [ CLIP-L penultimate | CLIP-G penultimate | 0 ]   along the features, up to T5's width,
              [                 T5                          ]   then along the tokens
    pooled  =   CLIP-L projected   | CLIP-G projected

An encoder whose parameters are absent contributes zeros; `apply` warns of it, and needs at least one encoder.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import computation, tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Params
from functional_sd3.text import clip, t5, weighting
from functional_sd3.text.completeness import check_encoders
from functional_sd3.text.tokenization import (
    Config,
    Emphasis,
    Ids,
    Tokenizers,
    tokenize,
    tokenize_prompts,
    tokenize_weighted,
)

__all__ = ["Conditioning", "Emphasis", "Ids", "apply", "apply_from", "encode", "tokenize", "tokenize_weighted"]


class Conditioning(NamedTuple):
    """context (batch, clip tokens + t5 tokens, context width) and pooled (batch, pooled width)."""

    context: Tensor
    pooled: Tensor


def apply(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    *,
    prompts_2: str | Sequence[str] | None = None,
    prompts_3: str | Sequence[str] | None = None,
    t5_length: int = 256,
    clip_skip: int = 0,
    weighted: bool = False,
    long_prompts: bool = False,
    implementation: Implementation = "sdpa",
) -> Conditioning:
    """Conditioning of prompts: `encode` of their `tokenize`; see there for the arguments.

    weighted: `(words:1.3)` weighs words. long_prompts: tokens beyond CLIP's length go into further chunks, which make
    the context longer; prompts of a batch that are shorter end in empty chunks. Both off, as in training;
    see `weighting`. The ids are made on the CPU and moved to the device of the parameters.

    Raises ValueError where `params` has no text encoder, or one without its tokenizer; warns (`notes.Note`) naming the
    encoders that are absent.
    """
    check_encoders([name for name in Ids._fields if name in params], tokenizers)
    options = {"prompts_2": prompts_2, "prompts_3": prompts_3, "t5_length": t5_length}
    tokens = tokenize_prompts(config, tokenizers, prompts, **options, weighted=weighted, long_prompts=long_prompts)
    _check_known([name for name in Ids._fields if name in params], config, tokens[0])
    ids, emphasis = tree.map(lambda part: part.to(_like(params).device), tokens)
    return encode(params, config, ids, clip_skip=clip_skip, emphasis=emphasis or None, implementation=implementation)


def apply_from(
    fetch: Callable[[str], Params],
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    *,
    names: Sequence[str] | None = None,
    clip_skip: int = 0,
    implementation: Implementation = "sdpa",
    encode_each: Callable[[Sequence[str], Callable[[str], Conditioning]], list[Conditioning]] | None = None,
    **text_options: Any,
) -> Conditioning:
    """Conditioning of prompts with one encoder in memory at a time; `text_options` are the other options of `apply`.

    `fetch` gives the parameters of "clip_l", "clip_g" and "t5". It is called once for each of `names`, by default for
    those that the config has, after the previous encoder has been released. encode_each: how the parts of the encoders
    are computed, from their names and a function of one; by default one after the other.
    """
    if names is None:
        names = [name for name in Ids._fields if getattr(config, name) is not None]
    encoders = [name for name in Ids._fields if name in names]
    check_encoders(encoders, tokenizers)
    ids, emphasis = tokenize_prompts(config, tokenizers, prompts, **text_options)
    _check_known(encoders, config, ids)
    options = {"clip_skip": clip_skip, "implementation": implementation}

    def encode_one(name: str) -> Conditioning:
        return _encode_alone(fetch, config, name, (ids, emphasis), options)

    parts = encode_each(encoders, encode_one) if encode_each else [encode_one(name) for name in encoders]
    # The encoders fill disjoint blocks, so summing is exact.
    return Conditioning(*(sum(part[1:], start=part[0]) for part in zip(*parts, strict=True)))


def _check_known(names: Sequence[str], config: Config, ids: Ids) -> None:
    """Raises ValueError for ids that an encoder has no embedding for; they are on the CPU here."""
    for name in names:
        encoder, highest = getattr(config, name), int(getattr(ids, name).max())
        if encoder is not None and highest >= encoder.vocab:
            raise ValueError(
                f"the tokenizer of {name} gives the token {highest}, but its encoder has embeddings for "
                f"{encoder.vocab} tokens, so they are of different models"
            )


def _encode_alone(fetch, config: Config, name: str, tokens: tuple[Ids, Any], options: dict) -> Conditioning:
    params = {name: fetch(name)}
    ids, emphasis = tree.map(lambda part: part.to(_like(params).device), tokens)
    outputs = []
    for start in range(0, len(ids.t5), _BATCH):
        batch_ids = tree.map(lambda part, first=start: part[first : first + _BATCH], ids)
        batch_emphasis = None
        if emphasis:
            weights = tree.map(lambda part, first=start: part[first : first + _BATCH], emphasis.weights)
            batch_emphasis = emphasis._replace(weights=weights)
        outputs.append(encode(params, config, batch_ids, emphasis=batch_emphasis, **options))
    return Conditioning(*map(torch.cat, zip(*outputs, strict=True)))


# Batch size of an encoder where encoders run one after the other over all texts.
_BATCH = 32


def encode(
    params: Params,
    config: Config,
    ids: Ids,
    *,
    clip_skip: int = 0,
    t5_mask: Tensor | None = None,
    emphasis: Emphasis | None = None,
    implementation: Implementation = "sdpa",
) -> Conditioning:
    """Conditioning of token ids, differentiable in the parameters.

    `clip_skip` more layers of both CLIPs are left out of the context. `t5_mask` (batch, t5 tokens) hides T5's padding
    from T5; SD3 was trained, and is run by default, without. `emphasis` weighs the tokens. The context contains all
    chunks of CLIP, one after the other; the pooled vector is the first chunk's. Raises ValueError when the CLIPs
    together are wider than the context, when T5's width is not the one the transformer reads, and for unequal batches.
    """
    rows = {part.shape[0] for part in ids}
    if len(rows) > 1:
        raise ValueError(f"ids of {sorted(rows)} texts; every encoder needs as many as the others")
    width = _context_width(params, config)
    options = {"skip": clip_skip, "implementation": implementation}
    features_l, pooled_l = _clip(params, config, "clip_l", ids, emphasis, options)
    features_g, pooled_g = _clip(params, config, "clip_g", ids, emphasis, options)
    features = torch.cat((features_l, features_g), dim=-1)
    if features.shape[-1] > width:
        raise ValueError(f"the CLIP features together are {features.shape[-1]} wide, more than the context's {width}")
    features = F.pad(features, (0, width - features.shape[-1]))
    if "t5" in params:
        t5_options = {"implementation": implementation, **computation.of(config, "t5").options}
        text = t5.apply(params["t5"], _t5_config(config), ids.t5, mask=t5_mask, **t5_options)
        if emphasis is not None:
            blank = t5.apply(params["t5"], _t5_config(config), emphasis.blank.t5, **t5_options)
            text = weighting.reweigh(text, blank, emphasis.weights.t5)
    else:
        text = _zeros(params, ids.t5, width)
    return Conditioning(torch.cat((features, text), dim=1), torch.cat((pooled_l, pooled_g), dim=-1))


def _clip(
    params: Params, config: Config, name: str, ids: Ids, emphasis: Emphasis | None, options: dict
) -> tuple[Tensor, Tensor]:
    """Features (batch, chunks * tokens, width) and pooled vector (batch, projection width) of one CLIP encoder."""
    encoder, tokens = getattr(config, name), getattr(ids, name)
    chunks = tokens.shape[1] if tokens.ndim == 3 else 1
    if name not in params:
        width, pooled_width = (
            (encoder.width, encoder.projection_width) if encoder else (_absent_width(config, name),) * 2
        )
        flat = tokens.flatten(1)
        return _zeros(params, flat, width), _zeros(params, flat[:, 0], pooled_width)
    options = {**options, **computation.of(config, name).options}
    output = clip.apply(params[name], encoder, tokens.reshape(-1, tokens.shape[-1]), **options)
    features = output.penultimate.unflatten(0, (-1, chunks)).flatten(1, 2)
    pooled = output.projected.unflatten(0, (-1, chunks))[:, 0]
    if emphasis is not None:
        blank_output = clip.apply(params[name], encoder, getattr(emphasis.blank, name), **options)
        blank = blank_output.penultimate.repeat(1, chunks, 1)
        features = weighting.reweigh(features, blank, getattr(emphasis.weights, name).flatten(1))
    return features, pooled


def _absent_width(config: Config, name: str) -> int:
    """The pooled width less the other CLIP's; the features of both released CLIPs are as wide as it."""
    pooled = config.transformer.pooled_width if config.transformer else 2048
    other = config.clip_g if name == "clip_l" else config.clip_l
    if other is None:
        # Both absent: which of them is given the width makes no difference to zeros.
        return pooled if name == "clip_l" else 0
    return max(pooled - other.projection_width, 0)


def _context_width(params: Params, config: Config) -> int:
    if not config.transformer:
        return config.t5.width if config.t5 else 4096
    width = config.transformer.context_width
    if "t5" in params and _t5_config(config).width != width:
        raise ValueError(f"T5 is {_t5_config(config).width} wide, but the transformer reads a context of width {width}")
    return width


def _t5_config(config: Config) -> t5.Config:
    if config.t5 is None:
        raise ValueError("there are parameters of t5, but the config has no t5")
    return config.t5


def _zeros(params: Params, ids: Tensor, width: int) -> Tensor:
    return torch.zeros((*ids.shape, width), dtype=_like(params).dtype, device=ids.device)


def _like(params: Params) -> Tensor:
    """A tensor of the dtype and device of the encoders, or of whatever there is when all three are absent."""
    encoders = {name: params[name] for name in Ids._fields if name in params}
    return next(iter(tree.leaves(encoders or params)), torch.empty(0, dtype=torch.float32, device="cpu"))
