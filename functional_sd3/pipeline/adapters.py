"""LoRAs and textual inversions added to the components of a model as they are read, one component at a time."""

from collections.abc import Sequence
from typing import NamedTuple

from functional_sd3 import lora
from functional_sd3.core.types import Params
from functional_sd3.layouts.components import SPECS, Config
from functional_sd3.lora.apply import Scale
from functional_sd3.lora.tree import Lora
from functional_sd3.pipeline.components import Components, changed
from functional_sd3.text import textual_inversion
from functional_sd3.text.textual_inversion import Word
from functional_sd3.weights.model import Tokenizers


class Adapted(NamedTuple):
    """A model with what a request adds to it."""

    components: Components
    config: Config
    tokenizers: Tokenizers


def adapted(
    components: Components,
    config: Config,
    tokenizers: Tokenizers,
    loras: Sequence[tuple[Lora, Scale]] = (),
    words: Sequence[Word] = (),
) -> Adapted:
    """The model with words added (`textual_inversion.add`), then LoRAs (`lora.apply`, lazily).

    Raises ValueError for a LoRA of a component that the model lacks, and as these functions do.
    """
    if not loras and not words:
        return Adapted(components, config, tokenizers)
    there = [name for name in SPECS if getattr(config, name) is not None]
    present = there if callable(components) else [name for name in SPECS if name in components]
    absent = sorted({name for one, _ in loras for name in one} - {*present})
    if absent:
        raise ValueError(f"a LoRA adapts {', '.join(absent)}, which this model lacks; load it with allow_absent=True")

    # New ids and sizes are known without the encoders: from tables of the same shapes without values.
    tables = textual_inversion.empty_tables(config, present)
    learned = textual_inversion.add(tables, config, tokenizers, *words)

    def with_words(name: str, params: Params) -> Params:
        own = [word for word in words if name in word.vectors]
        return textual_inversion.add({name: params}, config, tokenizers, *own).params[name]

    return Adapted(with_loras(changed(components, with_words), loras), learned.config, learned.tokenizers)


def with_loras(components: Components, loras: Sequence[tuple[Lora, Scale]]) -> Components:
    """The components with the LoRAs' parts for each added, lazily."""

    def add(name: str, params: Params) -> Params:
        parts = [({name: one[name]}, scale) for one, scale in loras if name in one]
        if not parts:
            return params
        return lora.apply({name: params}, [part for part, _ in parts], [scale for _, scale in parts], lazy=True)[name]

    return changed(components, add) if loras else components
