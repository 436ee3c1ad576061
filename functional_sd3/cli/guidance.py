"""Guidance on the command line: `--guidance NAME[:OPTION=VALUE,...]`, one after the other."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from functional_sd3.cli.session import Session
    from functional_sd3.flow.guidance import Guidance


class Asked(NamedTuple):
    """One `--guidance`: its name, and its options with their values."""

    name: str
    options: dict[str, Any]


class Kind(NamedTuple):
    """What a name stands for."""

    function: str
    """Its name in `flow.guidance`."""
    options: dict[str, Callable[[str], Any]]
    """Option -> what reads its value; named as the function's arguments, with hyphens."""
    begins: bool = False
    """Whether it is made of a scale (--cfg where it has none of its own), and not of the guidance before it."""
    required: tuple[str, ...] = ()
    fixed: dict[str, Any] = {}
    """Arguments that go with the name."""


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _limit(text: str) -> float | None:
    return None if text == "none" else float(text)


_WINDOW = {"start": float, "stop": float}
_WORSE = {"layers": _layers, "scale": float, **_WINDOW}
_PROJECTED = {"scale": float, "momentum": float, "eta": float, "longest": _limit}

KINDS = {
    "cfg": Kind("cfg", {"scale": float}, begins=True),
    "zero-star": Kind("zero_star", {"scale": float}, begins=True),
    "tangential": Kind("tangential", {"scale": float}, begins=True),
    "magnitude-aware": Kind("magnitude_aware", {"scale": float, "rate": float}, begins=True),
    "apg": Kind("apg", _PROJECTED, begins=True),
    "apg-of-data": Kind("apg", _PROJECTED, begins=True, fixed={"from_positive": True, "of_data": True}),
    "mixed-apg": Kind("mixed_apg", {**_PROJECTED, "projected-scale": float, "first": int}, begins=True),
    "auto": Kind("auto", {"scale": float, "params": str}, begins=True, required=("params",)),
    "skip-layer": Kind("skip_layer", _WORSE, required=("layers",)),
    "perturbed": Kind("perturbed", _WORSE, required=("layers",)),
    "smoothed": Kind("smoothed", {**_WORSE, "sigma": float}, required=("layers",)),
    "prompt": Kind("composed", {"text": str, "weight": float}, required=("text", "weight")),
    "rescaled": Kind("rescaled", {"factor": float}),
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
    """What a picture keeps of how it was guided; nothing where by --cfg alone."""
    return {"guidance": arguments.guidance} if arguments.guidance else {}


def parse(text: str) -> Asked:
    """ValueError where the name or an option is unknown, a value cannot be read, or one that is needed is missing."""
    name, _, rest = text.partition(":")
    if name not in KINDS:
        raise ValueError(f"--guidance {text!r}: {name!r} must be one of {', '.join(KINDS)}")
    kind, found = KINDS[name], {}
    for option, value in _pairs(rest, kind).items():
        if option not in kind.options:
            known = ", ".join(kind.options)
            raise ValueError(f"--guidance {text!r}: {option!r} is no option of {name}, which has {known}")
        try:
            found[option] = kind.options[option](value)
        except ValueError:
            raise ValueError(f"--guidance {text!r}: {option} cannot be {value!r}") from None
    for option in kind.required:
        if option not in found:
            raise ValueError(f"--guidance {text!r} needs {option}=, as in --guidance {name}:{option}=...")
    return Asked(name, found)


def prepare(arguments: argparse.Namespace, session: "Session") -> "Guidance | None":
    """The guidance that was asked for, None for --cfg alone.

    Raises ValueError for words that make no sense, or name blocks that the model has not.
    """
    from functional_sd3.flow import guidance

    asked = [parse(text) for text in arguments.guidance]
    if not asked:
        return None
    made = guidance.cfg(arguments.cfg)
    for place, one in enumerate(asked):
        kind = KINDS[one.name]
        if kind.begins and place:
            raise ValueError(f"--guidance {one.name} begins a guidance: it must come first, and be the only one")
        options = _loaded(one.options, session, arguments)
        given = {**kind.fixed, **{name.replace("-", "_"): value for name, value in options.items()}}
        function = getattr(guidance, kind.function)
        if one.name == "prompt":
            made = function(made, (given["text"], given["weight"]))
        elif kind.begins:
            made = function(**{"scale": arguments.cfg, **given})
        else:
            made = function(made, **given)
    return made


def _loaded(options: dict[str, Any], session: "Session", arguments: argparse.Namespace) -> dict[str, Any]:
    """The options with what their words name: blocks that there are, another model, a conditioning."""
    import torch

    from functional_sd3 import pipeline, weights
    from functional_sd3.cli import runtime
    from functional_sd3.cli.session import told

    depth = session.config.transformer.depth
    absent = [layer for layer in options.get("layers", ()) if not 0 <= layer < depth]
    if absent:
        raise ValueError(f"--guidance by layers {absent}: the model has the layers 0 to {depth - 1}")
    if "params" in options:
        path = options["params"]
        weak = weights.load(path, dtype=session.dtype, device=session.device, only="transformer", quantized=True)
        runtime.require(weak, ("transformer",), path)
        return {**options, "params": weak.params["transformer"], "config": weak.config.transformer}
    if "text" in options:
        with torch.no_grad():
            model = session.fetch, session.config, session.tokenizers
            conditions = pipeline.encode_from(*model, [options["text"]], **told(arguments))
        return {**options, "text": conditions.positive}
    return options


def _pairs(text: str, kind: Kind) -> dict[str, str]:
    """{"layers": "7,8,9", "scale": "2.5"} of "layers=7,8,9,scale=2.5": what names no option goes on with its value."""
    found: dict[str, str] = {}
    last = None
    for part in text.split(",") if text else []:
        option, equals, value = part.partition("=")
        if equals and (option in kind.options or last is None):
            found[option], last = value, option
        elif last is None:
            found[part], last = "", part
        else:
            found[last] += "," + part
    return found
