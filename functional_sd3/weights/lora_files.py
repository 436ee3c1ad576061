"""LoRA files read, in the spellings of PEFT, diffusers, kohya and Stability: first all is checked, then all is read."""

import difflib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from functional_sd3.formats.errors import WeightsError
from functional_sd3.weights import adapters, files, finite, lora_keys, lora_metadata
from functional_sd3.weights.adapters import Adapter, Lora, Node
from functional_sd3.weights.lora_keys import Target
from functional_sd3.weights.model import Config

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def load(
    path: str | os.PathLike,
    config: Config,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> Lora:
    """The LoRA in a safetensors file (or in a folder, under the names diffusers and PEFT give it) for a model.

    config: of the model, as `weights.load` returns it. Read are the keys of PEFT and diffusers, new and old, of kohya
    (`lora_unet_`, `lora_te1_` to `lora_te3_`) and of Stability (`diffusion_model.`); alpha comes from the file's alphas
    or its metadata, else it is the rank. dtype: of `down` and `up`, None as stored; alpha is float32.

    Raises WeightsError naming file and keys: keys that adapt no layer of this model (with strict=False these are left
    out, unless that leaves nothing), shapes that do not fit, halves of pairs, values that are not finite, and what is
    no plain LoRA (DoRA, LoHa, LoKr, biases), always. Nothing loads in part.
    """
    path = find(Path(path))
    mapped = files.open_mapped(path)
    shapes = lora_keys.adaptable_shapes(config)
    found = _sorted_keys(path, list(mapped.header.tensors), lora_keys.targets(config), strict)
    alphas = lora_metadata.read(path, mapped.header.metadata)
    problems: list[str] = []
    pieces: dict[str, dict[Target, Adapter]] = {}
    for (target, layer), keys in found.items():
        adapter = _adapter(path, mapped, target, keys, shapes[target.path], problems)
        if adapter is None:
            continue
        alpha = adapter.pop("alpha", None)
        if alpha is None:
            value = lora_metadata.alpha(alphas, layer, adapters.rank(adapter), path, problems)
            alpha = torch.tensor(value, dtype=torch.float32, device="cpu")
        moved = {name: value.to(device=device, dtype=dtype or value.dtype) for name, value in adapter.items()}
        pieces.setdefault(target.path, {})[target] = {**moved, "alpha": alpha.to(device)}
    nodes = {place: _node(path, place, parts, problems) for place, parts in pieces.items()}
    if problems:
        raise WeightsError(problems)
    return adapters.build({place: nodes[place] for place in shapes if place in nodes})


class Layer(NamedTuple):
    """One layer of a file as it is spelled there."""

    name: str
    rank: int
    inputs: int
    outputs: int
    alpha: float


def layers(path: str | os.PathLike) -> list[Layer]:
    """What a file holds, whatever model it is for. Raises WeightsError when that is no LoRA."""
    path = find(Path(path))
    mapped = files.open_mapped(path)
    grouped: dict[str, dict[str, str]] = {}
    for key in mapped.header.tensors:
        layer, role = lora_keys.parse(key)
        if role:
            grouped.setdefault(layer, {})[role] = key
    alphas, found, problems = lora_metadata.read(path, mapped.header.metadata), [], []
    for layer, keys in grouped.items():
        shapes = {role: mapped.header.tensors[key].shape for role, key in keys.items()}
        if all(len(shapes.get(role, ())) > 1 for role in ("down", "up")):
            down, up = shapes["down"], shapes["up"]
            if math.prod(shapes.get("alpha", (0,))) == 1:
                alpha = float(files.tensor(mapped, keys["alpha"]))
            else:
                alpha = lora_metadata.alpha(alphas, layer, down[0], path, problems)
            found.append(Layer(layer, down[0], math.prod(down[1:]), up[0], alpha))
    if not found:
        raise WeightsError(f"{path}: holds no LoRA: {', '.join(list(mapped.header.tensors)[:3]) or 'it is empty'}")
    return found


def summary(layers: Iterable[Layer]) -> list[str]:
    """A line for every kind of layer: those of one name but for its number, of one rank and alpha."""
    kinds = Counter(
        (re.sub(r"(?<=[._])\d+(?=[._])", "*", layer.name, count=1), layer.rank, layer.alpha) for layer in layers
    )
    return [f"{name}: {count} layers of rank {rank}, alpha {alpha:g}" for (name, rank, alpha), count in kinds.items()]


def find(path: Path) -> Path:
    """The file of a LoRA: the path, or in a folder what diffusers or PEFT wrote there."""
    if not path.is_dir():
        return path
    found = [path / name for name in NAMES if (path / name).is_file()]
    if not found:
        raise WeightsError(f"{path}: is a folder without {' or '.join(NAMES)}; name the file of the LoRA")
    return found[0]


def _sorted_keys(
    path: Path, keys: list[str], targets: Mapping[str, Target], strict: bool
) -> dict[tuple[Target, str], dict[str, str]]:
    """(target, layer in the file's spelling) -> role -> key."""
    problems = [f"{path}: {key} is {what}, which is not supported" for key in keys if (what := lora_keys.refused(key))]
    found: dict[tuple[Target, str], dict[str, str]] = {}
    unmatched = []
    for key in keys:
        layer, role = lora_keys.parse(key)
        if role is None or layer not in targets:
            unmatched.append(key)
        elif role in (roles := found.setdefault((targets[layer], layer), {})):
            problems.append(f"{path}: {key} and {roles[role]} are the same tensor under two names")
        else:
            roles[role] = key
    if problems:
        raise WeightsError(problems)
    if not found:
        some = ", ".join(unmatched[:3]) or "it is empty"
        raise WeightsError(f"{path}: nothing in it adapts a layer of this model; it holds {some}")
    if unmatched and strict:
        known = list(targets) if len(unmatched) <= 20 else []
        raise WeightsError([f"{path}: {key} adapts no layer of this model{_closest(key, known)}" for key in unmatched])
    return found


def _adapter(
    path: Path, mapped: files.Mapped, target: Target, keys: dict[str, str], shape: tuple[int, ...], problems: list[str]
) -> Adapter | None:
    """The tensors of one layer, in our order of rows; None, and the reasons in `problems`, when they are not right."""
    before = len(problems)
    for role in ("down", "up"):
        if role not in keys:
            problems.append(f"{path}: {next(iter(keys.values()))} has no {role} beside it")
    values = {}
    for role, key in keys.items():
        value = files.tensor(mapped, key)
        if not value.is_floating_point() and role != "alpha":
            problems.append(f"{path}: {key} has dtype {value.dtype}, not a float")
        elif what := finite.stranger(value):
            problems.append(f"{path}: {key} holds {what}, so it is not finite")
        # A copy of its own, so that the file is not kept open for the life of a small LoRA.
        values[role] = value.float().reshape(()) if role == "alpha" and value.numel() == 1 else value.clone()
    if len(problems) > before:
        return None
    down, up = values["down"], values["up"]
    rows, rest = shape[0] // target.parts, tuple(shape[1:])
    # A linear layer's may be stored as a 1 x 1 convolution's.
    down = down.reshape(down.shape[:1] + rest) if math.prod(down.shape[1:]) == math.prod(rest) and down.ndim else down
    up = up.flatten(1) if up.ndim == 4 and up.shape[2:] == (1, 1) else up
    if tuple(down.shape[1:]) != rest or down.ndim != len(shape):
        problems.append(f"{path}: {keys['down']} is {list(values['down'].shape)}, the layer takes {list(rest)}{_OTHER}")
    if up.ndim != 2 or up.shape[0] != rows:
        problems.append(f"{path}: {keys['up']} is {list(values['up'].shape)}, the layer gives {rows}{_OTHER}")
    if len(problems) == before and (up.shape[1] != down.shape[0] or not down.shape[0]):
        problems.append(f"{path}: {keys['down']} has rank {down.shape[0]}, {keys['up']} has {up.shape[1]}")
    if values.get("alpha", up.new_zeros(())).ndim:
        problems.append(f"{path}: {keys['alpha']} must be one number, not {list(values['alpha'].shape)}")
    if len(problems) > before:
        return None
    return {**values, "down": down, "up": target.transform.join([up])}


_OTHER = "; is the LoRA for another model?"


def _node(path: Path, place: str, pieces: Mapping[Target, Adapter], problems: list[str]) -> Node:
    whole = [adapter for target, adapter in pieces.items() if target.parts == 1]
    if whole:
        if len(pieces) > 1:
            problems.append(f"{path}: adapts {place} both as one matrix and as several")
        return whole[0]
    by_part = {target.part: adapter for target, adapter in pieces.items()}
    return [by_part.get(part, {}) for part in range(next(iter(pieces)).parts)]


def _closest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(lora_keys.parse(key).layer, known, n=1, cutoff=0.8)
    return f"; the closest is {near[0]}" if near else ""
