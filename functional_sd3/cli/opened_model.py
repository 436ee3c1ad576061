"""The model of a drawing command, as `session.open_session` opens it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from functional_sd3.cli.timing import Timer
from functional_sd3.core.types import Params
from functional_sd3.flow.guidance import Guidance
from functional_sd3.formats.default_dtype import Default
from functional_sd3.layouts.components import Config
from functional_sd3.lora.tree import Lora
from functional_sd3.text.textual_inversion import Word
from functional_sd3.weights.model import Tokenizers


class Session(NamedTuple):
    """A model and where it is computed.

    fetch: a component's name -> its parameters, with LoRAs and words added, from memory or, with --offload, from disk
    each time. config, tokenizers: with words added too. dtype: of what is loaded.
    """

    config: Config
    tokenizers: Tokenizers
    fetch: Callable[[str], Params]
    device: torch.device
    dtype: torch.dtype | Default
    timer: Timer
    guidance: Guidance | None = None
    loras: Sequence[tuple[Lora, float]] = ()
    words: Sequence[Word] = ()
