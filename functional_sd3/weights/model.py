"""A whole model: the configs, the parameters and the tokenizers of its components, and whether they fit each other."""

from typing import Any, NamedTuple

from functional_sd3.core import layers, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.types import Params, Tree
from functional_sd3.layouts.components import SPECS, WHERE, Config, spec

_DRAWING = ("clip_l", "clip_g", "t5", "transformer", "vae")
"""Components with which images are drawn."""


class Tokenizers(NamedTuple):
    """The tables of every tokenizer (`bpe`, `bpe`, `unigram`), None for those that are absent."""

    clip_l: Any = None
    clip_g: Any = None
    t5: Any = None


class Model(NamedTuple):
    """Parameters, config and tokenizers of a model; `params` has a tree for each component that is there."""

    params: dict[str, Params]
    config: Config
    tokenizers: Tokenizers = Tokenizers()

    def __repr__(self) -> str:
        """Components and tokenizers; all numbers of the parameters are too many to print."""
        there = [name for name, tables in self.tokenizers._asdict().items() if tables is not None]
        return f"Model with tokenizers {', '.join(there) or 'none'} and params\n{tree.summary(self.params, 1)}"


def missing(model: Model) -> list[str]:
    """Components and tokenizers that are missing for drawing images, one sentence each; empty when none is."""
    sentences = [f"{name} is missing (found in: {WHERE[name]})" for name in _DRAWING if name not in model.params]
    sentences += [
        f"the tokenizer of {name} is missing (found in: {folder}/ of a diffusers folder)"
        for name, folder in zip(Tokenizers._fields, ("tokenizer", "tokenizer_2", "tokenizer_3"), strict=True)
        if name in model.params and getattr(model.tokenizers, name) is None
    ]
    return sentences


def check(model: Model) -> list[str]:
    """Problems of a model's parameters against its config, one sentence each; empty when they fit."""
    known = ", ".join(SPECS)
    unknown = [f"{name} is not a component; known are {known}" for name in model.params if name not in SPECS]
    without_config = [
        f"{name} has parameters but no config"
        for name in model.params
        if name in SPECS and getattr(model.config, name) is None
    ]
    problems = unknown + without_config
    for name, part in spec(model.config).items():
        if name in model.params:
            problems += _check_leaves(name, part, model.params[name])
    return problems


def split_scales(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves of a tree by path, and of these, apart, the scales of quantised weights ("x.scale" or
    "x.int8_scale" beside "x.weight")."""
    leaves = tree.flatten_paths(params)
    scales = {path: leaf for path, leaf in leaves.items() if _scaled_weight(path) in leaves}
    return {path: leaf for path, leaf in leaves.items() if path not in scales}, scales


def _scaled_weight(path: str) -> str:
    """The path of the weight that a leaf at `path` is the scale of; an empty one for all other leaves."""
    layer, _, name = path.rpartition(".")
    return f"{layer}.weight" if name in layers.SCALES else ""


def _check_leaves(name: str, spec: Tree, params: Params) -> list[str]:
    weights, scales = split_scales(params)
    leaves = {**weights, **scales}
    wrong = [path for path, leaf in leaves.items() if not hasattr(leaf, "is_floating_point")]
    if wrong:
        return [f"{name}.{path} is a {type(leaves[path]).__name__}, not a tensor" for path in wrong]
    problems = specs.check(spec, weights)
    for path, scale in scales.items():
        rows = weights[_scaled_weight(path)].shape[:1]
        if scale.shape != rows:
            problems.append(f"{path} has shape {list(scale.shape)}, expected one number for each row, {list(rows)}")
    quantized = set(map(_scaled_weight, scales))
    for path, leaf in leaves.items():
        if not leaf.is_floating_point() and path not in quantized:
            problems.append(f"{path} has dtype {leaf.dtype}, not a float")
        if leaf.is_meta:
            problems.append(f"{path} is a meta tensor without values")
    return [f"{name}.{problem}" for problem in problems]
