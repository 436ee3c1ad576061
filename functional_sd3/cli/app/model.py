"""The model that the page draws with: read once at start, and passed to every run."""

import argparse
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from functional_sd3 import pipeline
from functional_sd3.cli import image_settings, lora_options, preview, prompt_words, report, runtime, session
from functional_sd3.cli.app import fields, limits
from functional_sd3.cli.app.limits import Limits
from functional_sd3.cli.timing import Timer
from functional_sd3.image import vae
from functional_sd3.layouts.components import require

_OWN = ("params", "variant", "dtype", "embedding", "without")
_OTHERS = {"lora", "run", "leaf", "subcommand", "quiet", "debug"}


class Served(NamedTuple):
    """A model with what every run of the page takes from the command line that started it."""

    read: session.ReadModel
    generate: argparse.ArgumentParser
    """The parser of `generate`, which reads the words of each run."""
    settings: image_settings.Settings
    """Options of every run: of the weights."""
    offload: bool
    loras: Mapping[str, str]
    """The LoRAs that may be chosen: name -> FILE as it was given."""
    decoder: preview.Decoder | None
    """Decoder of previews; None for a run without them."""
    limits: Limits
    defaults: fields.Values
    """Values of fields that are not given: the model's own."""
    side: int
    """Size of the model's own images, in pixels."""
    step: int
    """Number of pixels of which every side is a multiple."""
    is_shipped: bool
    turn: threading.Lock
    """Held by the run that computes: one after the other, also where a cancelled one still ends its step."""


def serve(arguments: argparse.Namespace) -> Served:
    """The model of the options of `app`. Raises ValueError for what cannot be drawn with or is named twice."""
    loras = named_loras(arguments.lora)
    lora_options.check(list(loras.values()))
    generate = fields.generate_parser()
    own = generate.parse_args([])
    # Whatever options of weights and devices both commands have.
    for name in vars(own).keys() & vars(arguments).keys() - _OTHERS:
        setattr(own, name, getattr(arguments, name))
    read = session.read_model(own, runtime.device(arguments.device))
    opened = session.adapted_session(own, Timer(), read)
    for path in loras.values():
        # Read now, so that one that does not fit is no surprise to a visitor.
        lora_options.load([path], lora_options.student_config([path], read.model.config), read.place)
    factor, sizes = vae.factor(require(opened.config, "vae")), require(opened.config, "transformer")
    step = factor * sizes.patch_size
    side = sizes.sample_size * factor
    defaults = {
        "steps": own.steps,
        "cfg": own.cfg,
        "method": pipeline.default_method(opened.config),
        "key": own.seed,
        "count": own.count,
    }
    return Served(
        read,
        generate,
        image_settings.given_options(own, _OWN),
        arguments.offload,
        loras,
        _decoder(own, opened),
        limits.of(arguments, side, sizes.position_size * step),
        defaults,
        side,
        step,
        prompt_words.is_shipped(arguments.params) and not arguments.embedding,
        threading.Lock(),
    )


def named_loras(texts: list[str]) -> dict[str, str]:
    """Name -> file of each `--lora FILE`; the name is the file's without its suffix.

    Raises ValueError for a file that does not exist, one with a scale, which a visitor chooses, and two of one name.
    """
    loras: dict[str, str] = {}
    for text in texts:
        spec = lora_options.parse(text)
        if str(spec.path) != str(Path(text)):
            raise ValueError(f"--lora {text}: the scale is chosen on the page; give the file alone, --lora {spec.path}")
        name = spec.path.stem or spec.path.name
        if name in loras or "=" in name:
            why = f"has the name of {loras[name]}" if name in loras else "has = in its name"
            raise ValueError(f"--lora {text} {why}: rename the file, whose name is that of the LoRA on the page")
        loras[name] = text
    return loras


def _decoder(arguments: argparse.Namespace, opened: session.Session) -> preview.Decoder | None:
    try:
        return preview.decoder_of(arguments, opened)
    except ValueError as error:
        if arguments.preview_decoder:
            raise
        report.note(f"no images on the way: {error}")
        return None
