"""A whole model: the configs, the parameters and the tokenizers of its components, and whether they fit each other."""

from typing import Any, NamedTuple

from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.layouts.components import SPECS, Config, spec


class Tokenizers(NamedTuple):
    """The tables of every tokenizer (`bpe`, `bpe`, `unigram`), None for those that are absent."""

    clip_l: Any = None
    clip_g: Any = None
    t5: Any = None


class Model(NamedTuple):
    """Everything a folder holds; `params` has one tree for each component that is there."""

    config: Config
    params: dict[str, Params]
    tokenizers: Tokenizers = Tokenizers()


_WHERE = {
    "clip_l": "text_encoder/, clip_l.safetensors, an all-in-one file",
    "clip_g": "text_encoder_2/, clip_g.safetensors, an all-in-one file",
    "t5": "text_encoder_3/, t5xxl.safetensors, an all-in-one file; SD3 also works without",
    "transformer": "transformer/, a file of Stability's",
    "vae": "vae/, a file of Stability's, a stand-alone VAE",
}


def missing(model: Model) -> list[str]:
    """What a model lacks to draw pictures of prompts, one sentence for each component; empty when it is whole."""
    found = [f"{name} is missing (found in: {where})" for name, where in _WHERE.items() if name not in model.params]
    found += [
        f"the tokenizer of {name} is missing (found in: {folder}/ of a diffusers folder)"
        for name, folder in zip(Tokenizers._fields, ("tokenizer", "tokenizer_2", "tokenizer_3"), strict=True)
        if name in model.params and getattr(model.tokenizers, name) is None
    ]
    return found


def check(model: Model) -> list[str]:
    """What stands between a model's parameters and its config, one sentence each; empty when they fit."""
    known = ", ".join(SPECS)
    strangers = [f"{name} is not a component; known are {known}" for name in model.params if name not in SPECS]
    homeless = [
        f"{name} has parameters but no config"
        for name in model.params
        if name in SPECS and getattr(model.config, name) is None
    ]
    problems = strangers + homeless
    for name, part in spec(model.config).items():
        if name in model.params:
            problems += _check_leaves(name, part, tree.flatten_paths(model.params[name]))
    return problems


def scaled_weight(path: str) -> str:
    """The path of the weight that a leaf at `path` is the scale of; an empty one for all other leaves."""
    layer, _, name = path.rpartition(".")
    return f"{layer}.weight" if name == "scale" else ""


def _check_leaves(name: str, spec: Tree, leaves: dict[str, Any]) -> list[str]:
    wrong = [path for path, leaf in leaves.items() if not hasattr(leaf, "is_floating_point")]
    if wrong:
        return [f"{name}.{path} is a {type(leaves[path]).__name__}, not a tensor" for path in wrong]
    scales = {path: leaf for path, leaf in leaves.items() if scaled_weight(path) in leaves}
    problems = specs.check(spec, {path: leaf for path, leaf in leaves.items() if path not in scales})
    for path, scale in scales.items():
        rows = leaves[scaled_weight(path)].shape[:1]
        if scale.shape != rows:
            problems.append(f"{path} has shape {list(scale.shape)}, expected one number for each row, {list(rows)}")
    quantized = set(map(scaled_weight, scales))
    for path, leaf in leaves.items():
        if not leaf.is_floating_point() and path not in quantized:
            problems.append(f"{path} has dtype {leaf.dtype}, not a float")
        if leaf.is_meta:
            problems.append(f"{path} is a meta tensor without values")
    return [f"{name}.{problem}" for problem in problems]
