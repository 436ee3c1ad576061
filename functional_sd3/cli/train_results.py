"""Results of `train` that are neither a model nor a LoRA alone: the folder of a ControlNet, the file of a word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from functional_sd3 import lora, weights
from functional_sd3.cli import train_model
from functional_sd3.cli.training_run import LORA
from functional_sd3.formats import folder_kinds
from functional_sd3.layouts.components import SPECS
from functional_sd3.text.textual_inversion import Word
from functional_sd3.training import tasks
from functional_sd3.weights.controlnets import ControlNet
from functional_sd3.weights.model import Model


def saver(options: tasks.Settings, stored: Model) -> Callable[[Path, Any], Path] | None:
    """A function of --out and the last state that writes the averaged parameters and returns what was written; None
    where a model or a LoRA is."""
    if (net := options.control) is not None:

        def save_controlnet(out: Path, state: Any) -> Path:
            params = train_model.as_stored(state.ema["controlnet"], stored.params["transformer"])
            weights.save_controlnet(out, ControlNet(params, net))
            return out

        return save_controlnet
    if (inversion := options.inversion) is not None:

        def save_word(out: Path, state: Any) -> Path:
            vectors = {name: vector.cpu() for name, vector in state.ema["word"].items()}
            weights.save_inversion(out / folder_kinds.WORD, Word(inversion.token, vectors))
            if not options.lora:
                return out / folder_kinds.WORD
            adapters = {name: part for name, part in state.ema.items() if name in SPECS}
            lora.save(out / LORA, adapters, differences=True)
            return out

        return save_word
    return None
