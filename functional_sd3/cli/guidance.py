"""Guidance on the command line: `--guidance NAME[:OPTION=VALUE,...]`, one after the other."""

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_sd3.cli import numbers, report
from functional_sd3.cli.parser import suggestion

if TYPE_CHECKING:
    from functional_sd3.cli.opened_model import Session
    from functional_sd3.flow.guidance import Guidance


class GuidanceSpec(NamedTuple):
    """One `--guidance`: its name, and its options with their values."""

    name: str
    options: dict[str, Any]


class Kind(NamedTuple):
    """The guidance function of a name, and its options."""

    function: str
    """Name of the function in `flow.guidance`."""
    options: Mapping[str, Callable[[str], Any]]
    """Option -> what reads its value; named as the function's arguments, with hyphens."""
    begins: bool = False
    """True if it starts from a scale (--cfg where it has none of its own), False if from the guidance before it."""
    required: tuple[str, ...] = ()
    fixed: dict[str, Any] = {}
    """Arguments that go with the name."""


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _limit(text: str) -> float | None:
    return None if text == "none" else _number(text)


def _number(text: str) -> float:
    return numbers.number(text, "it")


_WINDOW = {"start": _number, "stop": _number}
_WORSE = {"layers": _layers, "scale": _number, **_WINDOW}
_PROJECTED = {"scale": _number, "momentum": _number, "eta": _number, "longest": _limit}

KINDS = {
    "cfg": Kind("cfg", {"scale": _number}, begins=True),
    "zero-star": Kind("zero_star", {"scale": _number}, begins=True),
    "tangential": Kind("tangential", {"scale": _number}, begins=True),
    "magnitude-aware": Kind("magnitude_aware", {"scale": _number, "rate": _number}, begins=True),
    "apg": Kind("apg", _PROJECTED, begins=True),
    "apg-of-data": Kind("apg", _PROJECTED, begins=True, fixed={"from_positive": True, "of_data": True}),
    "mixed-apg": Kind("mixed_apg", {**_PROJECTED, "projected-scale": _number, "first": int}, begins=True),
    "auto": Kind("auto", {"scale": _number, "params": str}, begins=True, required=("params",)),
    "skip-layer": Kind("skip_layer", _WORSE, required=("layers",)),
    "perturbed": Kind("perturbed", _WORSE, required=("layers",)),
    "smoothed": Kind("smoothed", {**_WORSE, "sigma": _number}, required=("layers",)),
    "prompt": Kind("composed", {"text": str, "weight": _number}, required=("text", "weight")),
    "rescaled": Kind("rescaled", {"factor": _number}),
    "interval": Kind("interval", _WINDOW),
    "zero-init": Kind("zero_init", {"steps": int}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    begins = ", ".join(name for name, kind in KINDS.items() if kind.begins)
    follows = ", ".join(name for name, kind in KINDS.items() if not kind.begins)
    parser.add_argument(
        "--guidance",
        action="append",
        default=[],
        metavar="NAME[:OPTION=VALUE,...]",
        help=f"how prompt and negative prompt are made one: {begins} (each by --cfg, or its own scale=), and upon it, "
        f"in the order given, {follows}; such as --guidance zero-star --guidance skip-layer:layers=7,8,9,scale=2.5. "
        "May be repeated (default: cfg)",
    )


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of guidance, for the settings in an image; none where it is by --cfg alone."""
    return {"guidance": arguments.guidance} if arguments.guidance else {}


def parse(text: str) -> GuidanceSpec:
    """The name and options of a guidance.

    Raises ValueError where the name or an option is unknown, a value cannot be read, or a needed one is missing.
    """
    name, _, rest = text.partition(":")
    if name not in KINDS:
        near = suggestion(name, KINDS)
        raise ValueError(f"--guidance {text!r}: {name!r} must be one of {', '.join(KINDS)}{near}")
    kind, values = KINDS[name], {}
    for option, value in _pairs(rest, kind).items():
        if option not in kind.options:
            known = ", ".join(kind.options)
            raise ValueError(f"--guidance {text!r}: {option!r} is no option of {name}, which has {known}")
        try:
            values[option] = kind.options[option](value)
        except ValueError:
            raise ValueError(f"--guidance {text!r}: {option} cannot be {value!r}") from None
    for option in kind.required:
        if option not in values:
            raise ValueError(f"--guidance {text!r} needs {option}=, as in --guidance {name}:{option}=...")
    return GuidanceSpec(name, values)


def scale(number: float) -> float:
    """The guidance scale of a number on a command line: up to 1 there is no guidance, as in diffusers.

    1 is the prompt's own velocity. (Below it, `guidance.cfg` goes towards that of the negative prompt.)
    """
    return max(1.0, number)


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for words that make no sense; notes what is without effect because a scale is at most 1."""
    specs = [parse(text) for text in getattr(arguments, "guidance", ())]
    begins = next((spec for spec in specs if KINDS[spec.name].begins), None)
    if begins is None:
        unguided, given = arguments.cfg <= 1, f"--cfg {arguments.cfg:g}"
    else:
        own = begins.options.get("scale", arguments.cfg)
        unguided, given = own <= 1, f"--guidance {begins.name} at scale {own:g}"
    if unguided and (begins is not None or arguments.cfg < 1):
        rest = "; what is added to it stays" if len(specs) > (begins is not None) else ""
        report.note(f"{given} is no guidance, as every scale up to 1: the prompt alone counts, as in diffusers{rest}")
    if unguided and getattr(arguments, "negative", "") and not any(spec.name == "prompt" for spec in specs):
        report.note("--negative has no effect without guidance, which needs a --cfg above 1")


def prepare(arguments: argparse.Namespace, session: "Session") -> "Guidance | None":
    """The guidance of the options, None for --cfg alone.

    Raises ValueError for words that make no sense, or name blocks that the model has not.
    """
    from functional_sd3.flow import guidance

    specs = [parse(text) for text in arguments.guidance]
    if not specs:
        return None
    made = guidance.cfg(scale(arguments.cfg))
    for place, one in enumerate(specs):
        kind = KINDS[one.name]
        if kind.begins and place:
            raise ValueError(f"--guidance {one.name} begins a guidance: it must come first, and be the only one")
        options = _loaded(one.options, session, arguments)
        given = {**kind.fixed, **{name.replace("-", "_"): value for name, value in options.items()}}
        if "projected_scale" in given:
            given["projected_scale"] = scale(given["projected_scale"])
        function = getattr(guidance, kind.function)
        if one.name == "prompt":
            made = function(made, (given["text"], given["weight"]))
        elif kind.begins:
            given["scale"] = scale(given.get("scale", arguments.cfg))
            made = function(**given) if given["scale"] > 1 else guidance.cfg(1.0)
        else:
            made = function(made, **given)
    return made


def _loaded(options: dict[str, Any], session: "Session", arguments: argparse.Namespace) -> dict[str, Any]:
    """The options with what their words name: blocks that there are, another model, a conditioning."""
    import torch

    from functional_sd3 import pipeline, weights
    from functional_sd3.cli import precision, runtime
    from functional_sd3.layouts.components import require

    depth = require(session.config, "transformer").depth
    absent = [layer for layer in options.get("layers", ()) if not 0 <= layer < depth]
    if absent:
        raise ValueError(f"--guidance by layers {absent}: the model has the layers 0 to {depth - 1}")
    if "params" in options:
        path = options["params"]
        weak = weights.load(path, dtype=session.dtype, device=session.device, only="transformer", quantized=True)
        runtime.require(weak, ("transformer",), path)
        params = precision.with_products_of(weak.params["transformer"], session.device, session.dtype)
        return {**options, "params": params, "config": weak.config.transformer}
    if "text" in options:
        with torch.no_grad():
            model = session.fetch, session.config, session.tokenizers
            words = {"negative": arguments.negative, "weighted": arguments.weighted, "long_prompts": arguments.long}
            conditions = pipeline.encode_from(*model, [options["text"]], **words)
        return {**options, "text": conditions.positive}
    return options


def _pairs(text: str, kind: Kind) -> dict[str, str]:
    """{"layers": "7,8,9", "scale": "2.5"} of "layers=7,8,9,scale=2.5": a part without an option's name continues its
    value."""
    pairs: dict[str, str] = {}
    last = None
    for part in text.split(",") if text else []:
        option, equals, value = part.partition("=")
        if equals and (option in kind.options or last is None):
            pairs[option], last = value, option
        elif last is None:
            pairs[part], last = "", part
        else:
            pairs[last] += "," + part
    return pairs
