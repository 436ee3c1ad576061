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
from functional_sd3.text import bpe, clip, t5, unigram


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
    """Token ids, int64: clip_l and clip_g (batch, clip tokens), t5 (batch, t5 tokens); for absent encoders, any ids."""

    clip_l: Tensor
    clip_g: Tensor
    t5: Tensor


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
    implementation: Implementation = "sdpa",
) -> Conditioning:
    """Conditioning of prompts: `encode` of their `tokenize`; see there for the arguments.

    The ids are made on the CPU and moved to the device of the parameters.
    """
    unread = [name for name in Ids._fields if name in params and getattr(tokenizers, name) is None]
    if unread:
        raise ValueError(f"no tokenizer for {', '.join(unread)}, whose parameters are given; remove these or give one")
    ids = tokenize(config, tokenizers, prompts, prompts_2=prompts_2, prompts_3=prompts_3, t5_length=t5_length)
    device = _like(params).device
    ids = Ids(*(part.to(device) for part in ids))
    return encode(params, config, ids, clip_skip=clip_skip, implementation=implementation)


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


def encode(
    params: Params,
    config: Config,
    ids: Ids,
    *,
    clip_skip: int = 0,
    t5_mask: Tensor | None = None,
    implementation: Implementation = "sdpa",
) -> Conditioning:
    """Conditioning of token ids: pure tensors in, pure tensors out, differentiable in the parameters.

    `clip_skip` more layers of both CLIPs are left out of the context. `t5_mask` (batch, t5 tokens) hides T5's padding
    from T5; SD3 was trained, and is run by default, without. Raises ValueError when the CLIPs together are wider than
    the context, when T5's width is not the one the transformer reads, and for unequal batches.
    """
    rows = {part.shape[0] for part in ids}
    if len(rows) > 1:
        raise ValueError(f"ids of {sorted(rows)} texts; every encoder needs as many as the others")
    width = _context_width(params, config)
    options = {"skip": clip_skip, "implementation": implementation}
    features_l, pooled_l = _clip(params, config, "clip_l", ids.clip_l, options)
    features_g, pooled_g = _clip(params, config, "clip_g", ids.clip_g, options)
    features = torch.cat((features_l, features_g), dim=-1)
    if features.shape[-1] > width:
        raise ValueError(f"the CLIP features together are {features.shape[-1]} wide, more than the context's {width}")
    features = F.pad(features, (0, width - features.shape[-1]))
    if "t5" in params:
        text = t5.apply(params["t5"], config.t5, ids.t5, mask=t5_mask, implementation=implementation)
    else:
        text = _zeros(params, ids.t5, width)
    return Conditioning(torch.cat((features, text), dim=1), torch.cat((pooled_l, pooled_g), dim=-1))


def _clip(params: Params, config: Config, name: str, ids: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """Features (batch, tokens, width) and pooled vector (batch, projection width) of one of the CLIPs."""
    own = getattr(config, name)
    if name in params:
        output = clip.apply(params[name], own, ids, **options)
        return output.penultimate, output.projected
    width, pooled_width = (own.width, own.projection_width) if own else (_absent_width(config, name),) * 2
    return _zeros(params, ids, width), _zeros(params, ids[:, 0], pooled_width)


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
