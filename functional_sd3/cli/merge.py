"""Make one model of several fine-tunings of the same one."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from functional_sd3.cli import numbers, options, output, report

if TYPE_CHECKING:
    from functional_sd3.weights.model import Model

HELP = "make one model of several fine-tunings of the same one"
METHODS = ("average", "slerp", "task", "ties")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="DIR", help="folders of weights; what is not merged is the first one's")
    add("--out", required=True, metavar="DIR", help="folder for the merged model")
    add("--method", choices=METHODS, default="average", help="weighted average, arc between two, sum of what each "
        "learned, or TIES (default average)")  # fmt: skip
    add("--weights", metavar="W,W,...", help="one number a model, for average and task (default: all 1)")
    add("--t", type=float, default=0.5, help="how far from the first to the second, for slerp (default 0.5)")
    add("--base", metavar="DIR", help="what the models were tuned from, for task and ties")
    add("--density", type=float, default=0.2, help="share of every change that ties keeps (default 0.2)")
    add("--strength", type=float, default=1.0, help="how much of it ties adds to the base (default 1)")
    options.add_variant(parser)
    add("--part", nargs="+", metavar="NAME", default=("transformer",),
        help="components to merge: transformer, clip_l, clip_g, t5, vae, or all (default transformer)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    output.check_folder(arguments.out)
    output.check_weights(arguments.out)
    from functional_sd3 import weights
    from functional_sd3.weights import merge

    first = weights.load(arguments.models[0], dtype="stored", variant=arguments.variant)
    names = list(first.params) if "all" in arguments.part else list(arguments.part)
    absent = [name for name in names if name not in first.params]
    if absent:
        raise ValueError(f"--part {absent[0]} is not in {arguments.models[0]}; it has {', '.join(first.params)}")
    models = {path: _like(first, path, names, arguments.variant) for path in arguments.models[1:]}
    others = [model.params for model in models.values()]
    base = _like(first, arguments.base, names, arguments.variant).params if arguments.base else {}
    if "transformer" in names:
        _note_schedules(arguments.models[0], first, models)
    merged = {}
    for name in names:
        trees = [first.params[name], *(other[name] for other in others)]
        if arguments.method == "average":
            merged[name] = merge.average(trees, _numbers(arguments))
        elif arguments.method == "slerp":
            start, end = trees
            merged[name] = merge.slerp(start, end, arguments.t)
        elif arguments.method == "task":
            merged[name] = merge.task_arithmetic(base[name], trees, _numbers(arguments))
        else:
            merged[name] = merge.ties(base[name], trees, density=arguments.density, weight=arguments.strength)
        (row,) = merge.diff({name: first.params[name]}, {name: merged[name]}, group=merge.component)
        report.message(f"{name}: {row.relative:.3g} away from {arguments.models[0]}, relative")
    weights.save(arguments.out, first._replace(params={**first.params, **merged}))
    report.say(arguments.out)
    return 0


def differences(path: Path, other: Path, variant: str | None = None) -> Iterator[str]:
    """The lines of `inspect PATH --against OTHER`: how much every component and every layer of it changed."""
    from functional_sd3 import weights
    from functional_sd3.weights import merge

    base, changed = (weights.load(each, dtype="stored", variant=variant) for each in (other, path))
    names = [name for name in base.params if name in changed.params]
    for one, its, rest in ((path, changed, base), (other, base, changed)):
        absent = [name for name in its.params if name not in rest.params]
        if absent:
            yield f"only in {one}: {', '.join(absent)}"
    width = 36
    yield f"{'relative to ' + other.name:{width}} {'change':>10} {'largest':>10} {'numbers that differ':>24}"
    for name in names:
        pair = ({name: base.params[name]}, {name: changed.params[name]})
        whole = merge.diff(*pair, group=merge.component)
        parts = merge.diff(*pair) if whole[0].changed else []
        for row in [*whole, *parts]:
            place = ("  " if row in parts else "") + row.path
            share = f"{row.changed:,} of {row.parameters:,}"
            yield f"{place:{width}} {row.relative:>10.3g} {row.largest:>10.3g} {share:>24}"


def _check(arguments: argparse.Namespace) -> None:
    needs_base = arguments.method in ("task", "ties")
    if needs_base and not arguments.base:
        raise ValueError(f"--method {arguments.method} needs --base, the model that the others were tuned from")
    if arguments.base and not needs_base:
        raise ValueError(f"--base belongs to --method task or ties, not {arguments.method}")
    if arguments.method == "slerp" and len(arguments.models) != 2:
        raise ValueError(f"--method slerp goes between two models, not {len(arguments.models)}")
    if arguments.method == "average" and len(arguments.models) < 2:
        raise ValueError("an average needs at least two models")
    if arguments.weights and arguments.method not in ("average", "task"):
        raise ValueError(f"--weights belongs to --method average or task, not {arguments.method}")
    _numbers(arguments)


def _numbers(arguments: argparse.Namespace) -> list[float] | None:
    if not arguments.weights:
        return None
    what = f"--weights {arguments.weights} must be numbers with commas between them:"
    values = [numbers.number(word, what) for word in arguments.weights.split(",")]
    if len(values) != len(arguments.models):
        raise ValueError(f"--weights {arguments.weights} are {len(values)}, for {len(arguments.models)} models")
    return values


def _note_schedules(path: str, first: "Model", others: "Mapping[str, Model]") -> None:
    """Notes the models with another schedule than the first one's, which the merged model has."""
    for other, model in others.items():
        ours, theirs = ({} if each.config.schedule is None else asdict(each.config.schedule) for each in (first, model))
        names = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        if names:
            differing = ", ".join(f"{name} {ours.get(name)} and {theirs.get(name)}" for name in sorted(names))
            report.note(
                f"{path} and {other} are drawn otherwise ({differing}); the merged model is drawn as {path}: name the "
                "model first whose schedule it should have"
            )


def _like(first, path: str, names: list[str], variant: str | None) -> "Model":
    """Another model, which has to be of the same sizes."""
    from functional_sd3 import weights
    from functional_sd3.cli import runtime

    other = weights.load(path, only=names, dtype="stored", variant=variant)
    runtime.require(other, names, Path(path))
    for name in names:
        ours, theirs = getattr(first.config, name), getattr(other.config, name)
        if ours != theirs:
            raise ValueError(f"the {name} of {path} is another model's: {theirs}, not {ours}")
    return other
