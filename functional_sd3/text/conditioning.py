"""What Stable Diffusion 3 knows of a prompt: the three text encoders together.

Esser et al. 2024, "Scaling Rectified Flow Transformers", section 4; numerics of diffusers' `StableDiffusion3Pipeline`:

    context = [ CLIP-L penultimate | CLIP-G penultimate | 0 ]   along the features, up to T5's width,
              [                 T5                          ]   then along the tokens
    pooled  =   CLIP-L projected   | CLIP-G projected

An encoder whose parameters are absent contributes zeros.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Params
from functional_sd3.text import bpe, clip, t5, unigram, weighting


class Config(Protocol):
    """The encoders' configs (None where absent), and the transformer's, which tells the widths of what is absent."""

    clip_l: clip.Config | None
    clip_g: clip.Config | None
    t5: t5.Config | None
    transformer: Any


class Tokenizers(Protocol):
    """Tables of the tokenizers, None where absent."""

    clip_l: Any
    clip_g: Any
    t5: Any


class Ids(NamedTuple):
    """Token ids, int64: clip_l and clip_g (batch, clip tokens), or (batch, chunks, clip tokens) of long prompts, t5
    (batch, t5 tokens); for absent encoders, any ids."""

    clip_l: Tensor
    clip_g: Tensor
    t5: Tensor


class Emphasis(NamedTuple):
    """Weights of tokens, float32 and shaped as `Ids` are, and the ids of the empty prompt, (1, tokens) each."""

    weights: Ids
    blank: Ids


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

    weighted: `(words:1.3)` weighs words. long_prompts: what CLIP has no room for follows in more chunks of its tokens,
    and the context becomes longer; prompts of a batch that are shorter end in empty chunks. Both off, as in training:
    see `weighting`. The ids are made on the CPU and moved to the device of the parameters.
    """
    unread = [name for name in Ids._fields if name in params and getattr(tokenizers, name) is None]
    if unread:
        raise ValueError(f"no tokenizer for {', '.join(unread)}, whose parameters are given; remove these or give one")
    told = {"prompts_2": prompts_2, "prompts_3": prompts_3, "t5_length": t5_length}
    emphasis = None
    if weighted or long_prompts:
        ids, emphasis = tokenize_weighted(
            config, tokenizers, prompts, **told, weighted=weighted, long_prompts=long_prompts
        )
        emphasis = emphasis if weighted else None
    else:
        ids = tokenize(config, tokenizers, prompts, **told)
    ids, emphasis = tree.map(lambda part: part.to(_like(params).device), (ids, emphasis or ()))
    return encode(params, config, ids, clip_skip=clip_skip, emphasis=emphasis or None, implementation=implementation)


def tokenize(
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    *,
    prompts_2: str | Sequence[str] | None = None,
    prompts_3: str | Sequence[str] | None = None,
    t5_length: int = 256,
) -> Ids:
    """Token ids of one prompt or several.

    `prompts` go to CLIP-L; `prompts_2` to CLIP-G and `prompts_3` to T5, both by default the same; one string stands for
    all of a batch. CLIP texts have CLIP-L's length, T5's `t5_length` tokens, padding included; zeros where there is no
    tokenizer. Raises ValueError when the numbers of prompts differ, or the length is below 1.
    """
    if t5_length < 1:
        raise ValueError(f"t5_length {t5_length} must be at least 1 (SD3 uses 77 to 512)")
    texts = _texts(prompts, prompts if prompts_2 is None else prompts_2, prompts if prompts_3 is None else prompts_3)
    length = _clip_length(config, tokenizers)
    return Ids(
        _ids(bpe.apply, tokenizers.clip_l, texts[0], length),
        _ids(bpe.apply, tokenizers.clip_g, texts[1], length),
        _ids(unigram.apply, tokenizers.t5, texts[2], t5_length),
    )


def tokenize_weighted(
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    *,
    prompts_2: str | Sequence[str] | None = None,
    prompts_3: str | Sequence[str] | None = None,
    t5_length: int = 256,
    weighted: bool = True,
    long_prompts: bool = True,
) -> tuple[Ids, Emphasis]:
    """As `tokenize`, for prompts with emphasis and of any length: CLIP's ids are (batch, chunks, tokens)."""
    blank = tokenize(config, tokenizers, "", t5_length=t5_length)
    texts = _texts(prompts, prompts if prompts_2 is None else prompts_2, prompts if prompts_3 is None else prompts_3)
    read = [[weighting.parse(text) for text in one] if weighted else weighting.plain(one) for one in texts]
    length = blank.clip_l.shape[1]
    split = {
        name: weighting.clip_rows(getattr(tokenizers, name), one, length, long=long_prompts)
        for name, one in zip(("clip_l", "clip_g"), read, strict=False)
        if getattr(tokenizers, name) is not None
    }
    chunks = max((len(rows) for prompts in split.values() for rows in prompts), default=1)
    found = {}
    for name in ("clip_l", "clip_g"):
        empty = weighting.Rows(getattr(blank, name)[0], torch.ones(length))
        found[name] = weighting.stack_chunks(split.get(name, [[empty]] * len(texts[0])), chunks, empty)
    if tokenizers.t5 is None:
        found["t5"] = weighting.Rows(blank.t5.expand(len(texts[0]), -1), torch.ones(len(texts[0]), t5_length))
    else:
        found["t5"] = weighting.t5_rows(tokenizers.t5, read[2], t5_length)
    ids, weights = (Ids(*(getattr(found[name], part) for name in Ids._fields)) for part in ("ids", "weights"))
    return ids, Emphasis(weights, blank)


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
    """Conditioning of token ids: pure tensors in, pure tensors out, differentiable in the parameters.

    `clip_skip` more layers of both CLIPs are left out of the context. `t5_mask` (batch, t5 tokens) hides T5's padding
    from T5; SD3 was trained, and is run by default, without. `emphasis` weighs the tokens. Of CLIP's chunks the context
    has all, one after the other, and the pooled vector is the first's. Raises ValueError when the CLIPs together are
    wider than the context, when T5's width is not the one the transformer reads, and for unequal batches.
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
        text = t5.apply(params["t5"], config.t5, ids.t5, mask=t5_mask, implementation=implementation)
        if emphasis is not None:
            blank = t5.apply(params["t5"], config.t5, emphasis.blank.t5, implementation=implementation)
            text = weighting.reweigh(text, blank, emphasis.weights.t5)
    else:
        text = _zeros(params, ids.t5, width)
    return Conditioning(torch.cat((features, text), dim=1), torch.cat((pooled_l, pooled_g), dim=-1))


def _clip(
    params: Params, config: Config, name: str, ids: Ids, emphasis: Emphasis | None, options: dict
) -> tuple[Tensor, Tensor]:
    """Features (batch, chunks * tokens, width) and pooled vector (batch, projection width) of one of the CLIPs."""
    own, tokens = getattr(config, name), getattr(ids, name)
    chunks = tokens.shape[1] if tokens.ndim == 3 else 1
    if name not in params:
        width, pooled_width = (own.width, own.projection_width) if own else (_absent_width(config, name),) * 2
        whole = tokens.flatten(1)
        return _zeros(params, whole, width), _zeros(params, whole[:, 0], pooled_width)
    output = clip.apply(params[name], own, tokens.reshape(-1, tokens.shape[-1]), **options)
    features = output.penultimate.unflatten(0, (-1, chunks)).flatten(1, 2)
    pooled = output.projected.unflatten(0, (-1, chunks))[:, 0]
    if emphasis is not None:
        blank = clip.apply(params[name], own, getattr(emphasis.blank, name), **options).penultimate.repeat(1, chunks, 1)
        features = weighting.reweigh(features, blank, getattr(emphasis.weights, name).flatten(1))
    return features, pooled


def _absent_width(config: Config, name: str) -> int:
    """What the other CLIP leaves of the pooled vector; the features of both released CLIPs are as wide as it."""
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
    if "t5" in params and config.t5.width != width:
        raise ValueError(f"T5 is {config.t5.width} wide, but the transformer reads a context of width {width}")
    return width


def _zeros(params: Params, ids: Tensor, width: int) -> Tensor:
    return torch.zeros((*ids.shape, width), dtype=_like(params).dtype, device=ids.device)


def _like(params: Params) -> Tensor:
    """A tensor of the dtype and device of the encoders, or of whatever there is when all three are absent."""
    encoders = {name: params[name] for name in Ids._fields if name in params}
    return next(iter(tree.leaves(encoders or params)), torch.empty(0))


def _texts(*prompts: str | Sequence[str]) -> list[list[str]]:
    """Every encoder's texts, equally many; a single string is repeated."""
    rows = max(1 if isinstance(texts, str) else len(texts) for texts in prompts)
    lists = [[texts] * rows if isinstance(texts, str) else list(texts) for texts in prompts]
    if not rows or any(len(texts) != rows for texts in lists):
        counts = [len(texts) for texts in lists]
        raise ValueError(f"{counts} prompts for the three encoders; give each as many, or one string")
    return lists


def _clip_length(config: Config, tokenizers: Tokenizers) -> int:
    """The length both CLIPs read: CLIP-L's, or CLIP-G's where that is absent."""
    for name in ("clip_l", "clip_g"):
        tables, encoder = getattr(tokenizers, name), getattr(config, name)
        if tables is not None and encoder is not None:
            return min(tables.model_max_length, encoder.length)
    return 77


def _ids(tokenizer: Callable[..., Tensor], tables: Any, texts: list[str], length: int) -> Tensor:
    if tables is None:
        return torch.zeros((len(texts), length), dtype=torch.int64)
    return tokenizer(tables, texts, length=length)
