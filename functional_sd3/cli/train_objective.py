"""Densities of training times and weights of the flow loss on the command line of `train`.

`--density NAME[:NUMBER[,NUMBER]]`, `--shift S` and `--loss-weight NAME[:NUMBER]`, which may be repeated.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

from functional_sd3.cli import numbers

DENSITIES = {"logit-normal": ("mean", "std"), "uniform": (), "mode": ("scale",), "cosmap": ()}
"""Name -> the numbers that may follow it."""
WEIGHTS = {"data": (), "noise": (), "sigma-sqrt": (), "cosmap": (), "min-snr": ("gamma",)}


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--density",
        default="logit-normal",
        metavar="NAME[:NUMBERS]",
        help="of the training times: logit-normal[:MEAN,STD], uniform, mode[:SCALE] or cosmap (default logit-normal)",
    )
    add("--shift", type=float, help="of the training times towards noise, 1 for none (default: the model's own)")
    add(
        "--loss-weight",
        action="append",
        metavar="NAME[:NUMBER]",
        help="of the loss at each time: data, noise, sigma-sqrt, cosmap or min-snr[:GAMMA]; several are multiplied "
        "(default: none, the error of the velocity)",
    )


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a name that is none, and for numbers that it does not take."""
    if arguments.part == "vae":
        given = [name for name, value in (("density", arguments.density != "logit-normal"),
                                          ("shift", arguments.shift is not None),
                                          ("loss-weight", arguments.loss_weight)) if value]  # fmt: skip
        if given:
            raise ValueError(f"--{given[0]} belongs to --part transformer: the autoencoder has no times")
    _parse("density", arguments.density, DENSITIES)
    for text in arguments.loss_weight or ():
        _parse("loss-weight", text, WEIGHTS)


def density(text: str) -> Callable:
    """The density of times that `--density` names, as `objectives.flow_loss` takes it."""
    from functional_sd3.flow import path

    name, values = _parse("density", text, DENSITIES)
    functions: dict[str, Callable] = {
        "logit-normal": path.logit_normal, "uniform": path.uniform, "mode": path.mode, "cosmap": path.cosine_map,
    }  # fmt: skip
    return partial(functions[name], **values) if values else functions[name]


def weight(texts: list[str] | None) -> Callable | None:
    """w(t) of the `--loss-weight` options, None for 1."""
    from functional_sd3.flow import loss_weights

    functions: dict[str, Callable] = {
        "data": loss_weights.data, "noise": loss_weights.noise, "sigma-sqrt": loss_weights.sigma_sqrt,
        "cosmap": loss_weights.cosine_map, "min-snr": loss_weights.min_snr,
    }  # fmt: skip
    parsed = [_parse("loss-weight", text, WEIGHTS) for text in texts or ()]
    weights = [partial(functions[name], **values) if values else functions[name] for name, values in parsed]
    return loss_weights.product(*weights) if weights else None


def _parse(option: str, text: str, known: dict[str, tuple[str, ...]]) -> tuple[str, dict[str, float]]:
    """The name in NAME[:NUMBER[,NUMBER]], and its numbers by what they are called."""
    name, colon, rest = text.partition(":")
    if name not in known:
        raise ValueError(f"--{option} {text!r}: {name!r} must be one of {', '.join(known)}")
    values = rest.split(",") if colon else []
    if len(values) > len(known[name]):
        wanted = f"takes {', '.join(known[name])}" if known[name] else "takes no number"
        raise ValueError(f"--{option} {text!r}: {name} {wanted}")
    given: dict[str, float] = {
        called: numbers.number(value, f"--{option} {text!r}: its {called}")
        for called, value in zip(known[name], values, strict=False)
    }
    for called in ("std", "gamma"):
        if given.get(called, 1) <= 0:
            raise ValueError(f"--{option} {text!r}: its {called} must be a positive number")
    if not -1 <= given.get("scale", 0) <= 2 / (math.pi - 2):
        raise ValueError(f"--{option} {text!r}: its scale must be between -1 and 2 / (pi - 2) = 1.752")
    return name, given
