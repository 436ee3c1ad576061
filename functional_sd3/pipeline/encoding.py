"""Prompts -> conditioning of the transformer, each distinct text encoded once."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.types import Params
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.components import Components, encoder_names, fetch
from functional_sd3.pipeline.dividing import divide_encoders
from functional_sd3.pipeline.fields import Conditions
from functional_sd3.pipeline.request import TextOptions
from functional_sd3.text import conditioning
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.weights.model import Tokenizers

T5_LENGTH = 256


class EncodedPrompts(NamedTuple):
    """Prompts as rows of a table of distinct texts."""

    texts: Conditioning
    positive: Tensor
    """(samples,) int64: the row of each prompt."""
    negative: Tensor
    """(samples,) int64: the row of each negative prompt."""


def conditions_of(prompts: EncodedPrompts) -> Conditions:
    """The conditioning of every sample and of its negative prompt, both (samples, ...)."""

    def rows(index: Tensor) -> Conditioning:
        return Conditioning(*(part[index.to(part.device)] for part in prompts.texts))

    return Conditions(rows(prompts.positive), rows(prompts.negative))


def encode(
    params: Params,
    config: Config,
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    *,
    negative: str | Sequence[str] | None = None,
    t5_length: int | None = None,
    weighted: bool = False,
    long_prompts: bool = False,
) -> Conditions:
    """Conditioning of prompts and of their negative prompts ("" by default), both (batch, ...).

    The other options as in `conditioning.apply`; T5 reads 256 tokens by default. Raises ValueError for another number
    of negative prompts than 1 or that of the prompts.
    """
    texts = stack_prompts(prompts, negative)
    options = _options(tokenizers, TextOptions(negative, t5_length, weighted, long_prompts))
    return split_prompts(conditioning.apply(params, config, tokenizers, texts, **options))


def encode_from(
    fetch: Callable[[str], Params],
    config: Config,
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    *,
    negative: str | Sequence[str] | None = None,
    t5_length: int | None = None,
    weighted: bool = False,
    long_prompts: bool = False,
) -> Conditions:
    """Conditions of prompts with one text encoder in memory at a time: see `conditioning.apply_from`."""
    texts = stack_prompts(prompts, negative)
    options = _options(tokenizers, TextOptions(negative, t5_length, weighted, long_prompts))
    return split_prompts(conditioning.apply_from(fetch, config, tokenizers, texts, **options))


def encode_groups(
    components: Components,
    config: Config,
    tokenizers: Tokenizers,
    groups: Sequence[Sequence[str]],
    options: TextOptions,
) -> list[EncodedPrompts]:
    """Each group of prompts with its negative prompts; every encoder is read once, for all distinct texts of all.

    With `options.long_prompts` each group is encoded by itself, since the longest text of a table sets its length.
    """
    if options.long_prompts and len(groups) > 1:
        return [encode_groups(components, config, tokenizers, [group], options)[0] for group in groups]
    pairs = [(list(group), _negatives(len(group), options.negative)) for group in groups]
    texts = list(dict.fromkeys(text for pair in pairs for half in pair for text in half))
    row = {text: index for index, text in enumerate(texts)}
    names = encoder_names(components, config)
    table = conditioning.apply_from(
        lambda name: fetch(components, name),
        config,
        tokenizers,
        texts,
        names=names,
        encode_each=divide_encoders(config, names),
        **_options(tokenizers, options),
    )
    return [EncodedPrompts(table, *(_index(row[text] for text in half) for half in pair)) for pair in pairs]


def stack_prompts(prompts: Sequence[str], negative: str | Sequence[str] | None) -> list[str]:
    """The prompts, then as many negative ones."""
    return [*prompts, *_negatives(len(prompts), negative)]


def split_prompts(both: Conditioning) -> Conditions:
    """The conditioning of `stack_prompts` as that of the prompts and that of the negative ones."""
    return Conditions(*(Conditioning(*parts) for parts in zip(*(part.chunk(2) for part in both), strict=True)))


def _negatives(count: int, negative: str | Sequence[str] | None) -> list[str]:
    texts = [negative or ""] * count if negative is None or isinstance(negative, str) else list(negative)
    if len(texts) != count:
        raise ValueError(f"{len(texts)} negative prompts for {count} prompts; give one, or one for each")
    return texts


def _index(rows: Iterable[int]) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.int64, device="cpu")


def _options(tokenizers: Tokenizers, options: TextOptions) -> dict[str, Any]:
    length = options.t5_length
    if length is None:
        length = T5_LENGTH if tokenizers.t5 is None else min(T5_LENGTH, tokenizers.t5.model_max_length)
    return {"t5_length": length, "weighted": options.weighted, "long_prompts": options.long_prompts}
