"""Prompts as token ids, for all three text encoders at once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from functional_sd3.text import bpe, clip, t5, unigram, weighting
from functional_sd3.text.batches import text_batch

MAX_T5_LENGTH = 4096


class Config(Protocol):
    """The encoders' configs (None where absent), and the transformer's, from which the widths of absent ones follow."""

    @property
    def clip_l(self) -> clip.Config | None: ...
    @property
    def clip_g(self) -> clip.Config | None: ...
    @property
    def t5(self) -> t5.Config | None: ...
    @property
    def transformer(self) -> Any: ...


class Tokenizers(Protocol):
    """Tables of the tokenizers, None where absent."""

    @property
    def clip_l(self) -> Any: ...
    @property
    def clip_g(self) -> Any: ...
    @property
    def t5(self) -> Any: ...


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


def tokenize_prompts(
    config: Config,
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    *,
    weighted: bool = False,
    long_prompts: bool = False,
    **options: Any,
) -> tuple[Ids, Emphasis | tuple]:
    """Token ids of prompts by `tokenize` or `tokenize_weighted`, and their emphasis, () where unweighted."""
    if not (weighted or long_prompts):
        return tokenize(config, tokenizers, prompts, **options), ()
    ids, emphasis = tokenize_weighted(
        config, tokenizers, prompts, weighted=weighted, long_prompts=long_prompts, **options
    )
    return ids, emphasis if weighted else ()


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

    `prompts` go to CLIP-L; `prompts_2` to CLIP-G and `prompts_3` to T5, both by default the same; one string is
    repeated for the batch. CLIP texts have CLIP-L's length, T5's `t5_length` tokens, padding included; zeros where
    there is no tokenizer. Raises ValueError when the numbers of prompts differ, or the length is below 1.
    """
    if t5_length < 1:
        raise ValueError(f"t5_length {t5_length} must be at least 1 (SD3 uses 77 to 512)")
    if t5_length > MAX_T5_LENGTH:
        raise ValueError(
            f"t5_length {t5_length} must be at most {MAX_T5_LENGTH:,} (SD3 uses 77 to 512): every prompt is padded "
            "to it, and T5's attention takes its square in memory"
        )
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
    """Token ids and emphasis of prompts of any length: CLIP's ids are (batch, chunks, tokens)."""
    blank = tokenize(config, tokenizers, "", t5_length=t5_length)
    texts = _texts(prompts, prompts if prompts_2 is None else prompts_2, prompts if prompts_3 is None else prompts_3)
    parsed = [[weighting.parse(text) for text in one] if weighted else weighting.unweighted(one) for one in texts]
    length = blank.clip_l.shape[1]
    split = {
        name: weighting.clip_rows(getattr(tokenizers, name), one, length, long=long_prompts)
        for name, one in zip(("clip_l", "clip_g"), parsed, strict=False)
        if getattr(tokenizers, name) is not None
    }
    chunks = max((len(chunks) for prompts in split.values() for chunks in prompts), default=1)
    rows = {}
    for name in ("clip_l", "clip_g"):
        empty = weighting.Rows(getattr(blank, name)[0], torch.ones(length, dtype=torch.float32, device="cpu"))
        rows[name] = weighting.stack_chunks(split.get(name, [[empty]] * len(texts[0])), chunks, empty)
    if tokenizers.t5 is None:
        ones = torch.ones(len(texts[0]), t5_length, dtype=torch.float32, device="cpu")
        rows["t5"] = weighting.Rows(blank.t5.expand(len(texts[0]), -1), ones)
    else:
        rows["t5"] = weighting.t5_rows(tokenizers.t5, parsed[2], t5_length)
    ids, weights = (Ids(*(getattr(rows[name], part) for name in Ids._fields)) for part in ("ids", "weights"))
    return ids, Emphasis(weights, blank)


def _texts(*prompts: str | Sequence[str]) -> list[list[str]]:
    """Every encoder's texts, equally many; a single string is repeated."""
    batches = [text_batch(texts, "prompt") for texts in prompts]
    rows = max(map(len, batches))
    lists = [batch * rows if isinstance(texts, str) else batch for texts, batch in zip(prompts, batches, strict=True)]
    if not rows:
        raise ValueError("there are no prompts; give a string or several, and an empty one for no prompt")
    if any(len(texts) != rows for texts in lists):
        counts = [len(texts) for texts in lists]
        raise ValueError(f"{counts} prompts for the three encoders; give each as many, or one string")
    return lists


def _clip_length(config: Config, tokenizers: Tokenizers) -> int:
    """The token length of both CLIPs: CLIP-L's, or CLIP-G's where that is absent."""
    for name in ("clip_l", "clip_g"):
        tables, encoder = getattr(tokenizers, name), getattr(config, name)
        if tables is not None and encoder is not None:
            return min(tables.model_max_length, encoder.length)
    return 77


def _ids(tokenizer: Callable[..., Tensor], tables: Any, texts: list[str], length: int) -> Tensor:
    if tables is None:
        return torch.zeros((len(texts), length), dtype=torch.int64, device="cpu")
    return tokenizer(tables, texts, length=length)
