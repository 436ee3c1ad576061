"""The model of a training run: what learns in float32, the rest as it is stored, and back to the stored dtypes."""

import argparse
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from functional_sd3 import weights
from functional_sd3.cli import frozen_base, runtime, train_subjects
from functional_sd3.core import tree
from functional_sd3.core.types import Params, Tree
from functional_sd3.formats import default_dtype, finite
from functional_sd3.layouts.components import SPECS
from functional_sd3.parallel.mesh import ONE_PROCESS, Mesh
from functional_sd3.training import division, tasks
from functional_sd3.weights.model import Model


def load(
    arguments: argparse.Namespace, source: Sequence[Path], only: Sequence[str] | None = None, mesh: Mesh = ONE_PROCESS
) -> tuple[Model, Model, torch.dtype | None]:
    """The model as it is stored, as training computes with it, and the dtype of the computation (None: float32).

    Parameters that learn are in --weights, float32 by default. The rest stays as it is stored, unless the device does
    not compute that well. only: the components that are read, all by default; configs and tokenizers are of all. mesh:
    the processes of the run, of which this one converts and moves its part alone of what is divided (`divided`).
    """
    device = runtime.device(arguments.device)
    if only is None:
        stored = weights.load(source, dtype="stored", variant=arguments.variant)
    else:
        whole = weights.outline(source, variant=arguments.variant)
        stored = whole._replace(params=read(arguments, source, only))
    needed = ("transformer", "vae") if arguments.part == "transformer" and only is None else only or ("vae",)
    runtime.require(stored, needed, " and ".join(map(str, source)))
    names, dtype = trained(arguments, stored), None
    # Where the transformer does not learn, or by a LoRA alone.
    adapts = bool(arguments.lora or getattr(arguments, "control", None) or getattr(arguments, "inversion", None))
    if arguments.part != "vae":
        dtype = _adapted_dtype(stored.params["transformer"], device) if adapts else None
    learned = getattr(torch, getattr(arguments, "weights", "float32"))
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else dtype
    if learned != torch.float32:
        dtype = dtype or learned
    used = [name for name in stored.params if arguments.part == "transformer" or name == "vae"]
    params, in_parts = {}, divided(arguments, stored) if division.has_parts(mesh) else ()
    for name in used:
        part = division.Part(name, getattr(stored.config, name), mesh) if name in in_parts else None
        if name in names and arguments.lora and name != "vae":
            params[name] = frozen_base.place(arguments, name, stored.params[name], dtype or torch.float32, device, part)
            continue
        if name in names:
            chosen = dtype or torch.float32 if adapts else learned
        else:
            chosen = _computed_dtype(stored.params[name], device)
        params[name] = _computed(part(stored.params[name]) if part else stored.params[name], chosen, device)
    return stored, stored._replace(params=params), None if dtype == learned == torch.float32 else dtype


def divided(arguments: argparse.Namespace, model: Model) -> tuple[str, ...]:
    """The components that a mesh divides: those that learn, or are frozen in the loss. The encoders of a new word stay
    whole, as their tables get rows."""
    inversion = train_subjects.inversion(arguments) if getattr(arguments, "inversion", None) else None
    whole = inversion.encoders if inversion else ()
    return tuple(name for name in trained(arguments, model) if name not in whole)


def read(arguments: argparse.Namespace, source: Sequence[Path], only: Collection[str]) -> dict[str, Params]:
    """Components of the model as they are stored."""
    return weights.load(source, dtype="stored", variant=arguments.variant, only=only).params


def rest(arguments: argparse.Namespace, source: Sequence[Path], stored: Model) -> dict[str, Params]:
    """The components of the model that `stored` lacks."""
    names = [name for name in SPECS if getattr(stored.config, name) is not None and name not in stored.params]
    return read(arguments, source, names) if names else {}


def trained(arguments: argparse.Namespace, model: Model) -> tuple[str, ...]:
    """The components that learn, with the base of a LoRA or ControlNet, and those through which a word learns."""
    if arguments.part == "vae":
        return ("vae",)
    with_text = text_encoders(vars(arguments)) == "train" or getattr(arguments, "inversion", None) is not None
    return tuple(name for name in model.params if name == "transformer" or (with_text and name in tasks.ENCODERS))


def frozen(params: Params, device: torch.device) -> Params:
    """Parameters that do not learn, as they compute."""
    return _computed(params, _computed_dtype(params, device), device)


def _computed(params: Params, dtype: torch.dtype | None, device: torch.device) -> Params:
    return tree.to(tree.cast(params, dtype) if dtype else params, device)


def _computed_dtype(params: Tree, device: torch.device) -> torch.dtype | None:
    """The dtype in which frozen parameters compute; None for the stored one."""
    return default_dtype.choose(None, {leaf.dtype for leaf in tree.leaves(params)}, device)


def _adapted_dtype(params: Tree, device: torch.device) -> torch.dtype:
    """The dtype in which the base of a LoRA computes."""
    dtype = _computed_dtype(params, device) or tree.leaves(params)[0].dtype
    # Gradients underflow in float16; bfloat16 takes the same memory.
    return torch.bfloat16 if dtype == torch.float16 else dtype


def as_stored(params: Params, stored: Params) -> Params:
    """Trained parameters in the dtypes of the stored ones, but in none that is too narrow for what they are now.

    Parameters that were not stored, as of a student, are in the commonest dtype.
    """
    return tree.map_with_path(stored_caster(stored), params)


def stored_caster(stored: Params) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """The function of `as_stored` from the path and value of one leaf."""
    dtypes = {path: leaf.dtype for path, leaf in tree.flatten_paths(stored).items()}
    commonest = Counter(dtypes.values()).most_common(1)[0][0]

    def cast(path: str, leaf: torch.Tensor) -> torch.Tensor:
        old = dtypes.get(path, commonest)
        # Float8 without scales would round what was learned away.
        narrow = leaf.to("cpu", torch.bfloat16 if old.itemsize < 2 else old)
        return leaf.cpu() if finite.nonfinite_kind(narrow) else narrow

    return cast


def text_encoders(options: Mapping[str, Any]) -> str:
    """The value of --text-encoders ("train", "frozen") that the options of a command line or checkpoint mean."""
    given = options.get("text-encoders", options.get("text_encoders"))
    return given or ("train" if options.get("scratch") and options.get("part") == "transformer" else "frozen")
