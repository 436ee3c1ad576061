"""LoRA files read, in the spellings of every public trainer: first all is checked, then all is read."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from functional_sd3.formats import files, folder_kinds
from functional_sd3.formats.errors import WeightsError, attempt
from functional_sd3.formats.printable import shorten
from functional_sd3.layouts.components import Config
from functional_sd3.lora import (
    foreign,
)
from functional_sd3.lora import (
    keys as lora_keys,
)
from functional_sd3.lora import (
    kinds as adapter_kinds,
)
from functional_sd3.lora import (
    metadata as lora_metadata,
)
from functional_sd3.lora import (
    tree as adapters,
)
from functional_sd3.lora.keys import Module, Table, Target
from functional_sd3.lora.tree import Adapter, Lora, LoraEntry

NAMES = folder_kinds.LORAS
_MAX_COMPARED = 5
"""Unknown names beyond which none is compared with those that are known."""


class Loaded(NamedTuple):
    """A LoRA, and the keys of its file that were left out."""

    lora: Lora
    left_out: tuple[str, ...]


def load(
    path: str | os.PathLike,
    config: Config,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> Lora:
    """The LoRA in a safetensors file (or in a folder, under the names diffusers and PEFT give it) for a model.

    config: of the model, as `weights.load` returns it. Read are LoRA, LoCon, LoHa, LoKr and DoRA, differences of
    weights, norms and biases, under the names of PEFT, diffusers, kohya, LyCORIS, SimpleTuner, OneTrainer, OMI,
    ComfyUI and Stability; alpha comes from the file's alphas or its metadata, else it is the rank. dtype: of all
    factors, None as stored (float8 as bfloat16, exactly); alpha and scale are float32.

    Raises WeightsError naming file and keys: keys that adapt no layer of this model (with strict=False these are left
    out, unless that leaves nothing; `load_with_report` names them), shapes that do not fit, factors that are missing,
    values that are not finite, kinds that no formula is known of (OFT, GLoRA, (IA)3). Nothing loads in part.
    """
    return load_with_report(path, config, dtype=dtype, device=device, strict=strict).lora


def load_with_report(
    path: str | os.PathLike,
    config: Config,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    strict: bool = True,
    allow_absent: bool = False,
) -> Loaded:
    """The LoRA of `load`, and the keys that were left out.

    allow_absent: those of components that the model lacks, and of embeddings stored beside the LoRA, are left out too.
    """
    path = find(Path(path))
    mapped = files.open_mapped(path)
    shapes = lora_keys.leaf_shapes(config)
    grouped, left_out = _sorted_keys(path, mapped.header, lora_keys.table(config), strict, allow_absent)
    metadata = lora_metadata.read(path, mapped.header.metadata, [layer for layer, _ in grouped])
    problems: list[str] = [*_without_magnitudes(path, metadata, grouped)]
    pieces: dict[str, dict[Target, Adapter]] = {}
    for (layer, module), keys in grouped.items():
        alpha = lambda rank, layer=layer: lora_metadata.alpha(metadata, layer, rank, str(path))  # noqa: E731
        adapted = attempt(problems, adapter_kinds.read, adapter_kinds.Layer(path, mapped, keys), module, shapes, alpha)
        for target, adapter in (adapted or {}).items():
            moved = {name: _moved(name, value, dtype, device) for name, value in adapter.items()}
            if target in pieces.setdefault(target.path, {}):
                problems.append(f"{path}: {layer} adapts {target.path} a second time, under another name")
            pieces[target.path][target] = moved
    entries = {place: _entry(path, place, parts, problems) for place, parts in pieces.items()}
    if problems:
        raise WeightsError(problems)
    return Loaded(adapters.build({place: entries[place] for place in shapes if place in entries}), left_out)


class Layer(NamedTuple):
    """One layer of a file as it is spelled there; rank: 0 where it has none; numbers: all that its tensors hold."""

    name: str
    rank: int
    inputs: int
    outputs: int
    alpha: float
    kind: str = "LoRA"
    numbers: int = 0


def layers(path: str | os.PathLike) -> list[Layer]:
    """Layers of a LoRA file, for whichever model. Raises WeightsError when that is no LoRA."""
    path = find(Path(path))
    mapped = files.open_mapped(path)
    grouped: dict[str, dict[str, str]] = {}
    for key in mapped.header.tensors:
        layer, role = lora_keys.parse(key)
        if role:
            grouped.setdefault(layer, {})[role] = key
    metadata = lora_metadata.read(path, mapped.header.metadata, grouped)
    described: list[Layer] = []
    problems: list[str] = []
    for layer, keys in grouped.items():
        described += attempt(problems, _described, path, mapped, layer, keys, metadata) or []
    if not described:
        names = list(mapped.header.tensors)
        what = foreign.described({name: entry.shape for name, entry in mapped.header.tensors.items()})
        some = ", ".join(shorten(name) for name in names[:3]) or "it is empty"
        raise WeightsError(f"{path}: holds no LoRA: {what or some}")
    return described


def summary(layers: Iterable[Layer]) -> list[str]:
    """A line for every kind of layer: those of one name but for its number, of one kind, rank and alpha."""
    kinds = Counter(
        (re.sub(r"(?<=[._])\d+(?=[._])", "*", layer.name, count=1), layer.kind, layer.rank, layer.alpha)
        for layer in layers
    )
    return [
        f"{shorten(name, 200)}: {count} layers"
        + (f" of rank {rank}, alpha {alpha:g}" if rank else "")
        + ("" if kind == "LoRA" else f", {kind}")
        for (name, kind, rank, alpha), count in kinds.items()
    ]


def find(path: Path) -> Path:
    """The file of a LoRA: the path, or in a folder what diffusers or PEFT wrote there."""
    if not path.is_dir():
        return path
    files_there = [path / name for name in NAMES if (path / name).is_file()]
    if not files_there:
        kind = folder_kinds.described(path) or "; name the file of the LoRA"
        raise WeightsError(f"{path}: is a folder without {' or '.join(NAMES)}{kind}")
    return files_there[0]


def _sorted_keys(
    path: Path, header: files.Header, table: Table, strict: bool, allow_absent: bool
) -> tuple[dict[tuple[str, Module], dict[str, str]], tuple[str, ...]]:
    """(layer in the file's spelling, its leaves) -> role -> key; and the keys that are left out."""
    keys = list(header.tensors)
    problems = [f"{path}: {key} is {what}, which is not supported" for key in keys if (what := lora_keys.refused(key))]
    grouped: dict[tuple[str, Module], dict[str, str]] = {}
    unknown: list[tuple[str, str | None]] = []
    absent: list[tuple[str, str | None]] = []
    for key in keys:
        layer, role = lora_keys.parse(key)
        component, module = table.find(layer) if role else (None, None)
        if module is None or role is None:
            is_beside = foreign.extra(key) or (component and component not in table.components)
            (absent if is_beside else unknown).append((key, component))
        elif role in (roles := grouped.setdefault((layer, module), {})):
            problems.append(f"{path}: {key} and {roles[role]} are the same tensor under two names")
        else:
            roles[role] = key
    if problems:
        raise WeightsError(problems)
    if not grouped:
        what = foreign.described({name: entry.shape for name, entry in header.tensors.items()})
        some = f"it holds {', '.join(shorten(key) for key in keys[:3])}" if keys else "it is empty"
        raise WeightsError(f"{path}: nothing in it adapts a layer of this model: {what or some}")
    if strict and (what := foreign.described({key: header.tensors[key].shape for key, _ in unknown})):
        raise WeightsError(f"{path}: {what} ({len(unknown)} of its {len(keys)} tensors adapt no layer of this model)")
    refused = unknown if strict else []
    refused = refused + (absent if strict and not allow_absent else [])
    if refused:
        compared = len(unknown) <= _MAX_COMPARED
        raise WeightsError([f"{path}: {key} {_reason(key, one, table, compared)}" for key, one in refused])
    return grouped, tuple(key for key, _ in unknown + absent)


def _reason(key: str, component: str | None, table: Table, compared: bool) -> str:
    if component and component not in table.components:
        return f"adapts {component}, which this model lacks"
    if what := foreign.extra(key):
        return f"is {what}"
    near = table.closest(lora_keys.parse(key).layer) if compared else None
    return "adapts no layer of this model" + (f"; the closest is {near}" if near else "")


def _without_magnitudes(path: Path, metadata: lora_metadata.Values, grouped: Mapping) -> Iterable[str]:
    """Problems of a file whose metadata names a DoRA but which has no magnitudes: it would be read as another LoRA."""
    if any("magnitude" in keys for keys in grouped.values()):
        return
    for name, value in metadata.items():
        if name.rpartition(".")[2] == "use_dora" and value:
            yield f"{path}: {shorten(name)} says that this is a DoRA, but it holds no magnitudes"


def _described(path: Path, mapped: files.Mapped, layer: str, keys: dict[str, str], metadata) -> list[Layer]:
    shapes = {role: mapped.header.tensors[key].shape for role, key in keys.items()}
    kind, numbers = adapter_kinds.kind_of(keys), sum(math.prod(shapes[role]) for role in shapes if role != "alpha")
    if kind is None:
        return []
    first, last = next(((shapes[one], shapes[two]) for one, two in _ENDS if one in shapes and two in shapes), ((), ()))
    rank, inputs, outputs = 0, 0, 0
    if first or last:
        if min(len(first), len(last)) < 2:
            return []
        rank, inputs, outputs = first[0], math.prod(first[1:]), last[0]
    elif kind.startswith(("LoRA", "LoHa")):
        return []
    if math.prod(shapes.get("alpha", (0,))) == 1 and not mapped.header.tensors[keys["alpha"]].dtype.is_complex:
        alpha: float | None = float(files.tensor(mapped, keys["alpha"]))
    else:
        alpha = lora_metadata.alpha(metadata, layer, rank, str(path)) if rank else None
    return [Layer(layer, rank, inputs, outputs, float(rank) if alpha is None else alpha, kind, numbers)]


_ENDS = (("down", "up"), ("hada_w1_b", "hada_w1_a"), ("lokr_w2_b", "lokr_w2_a"), ("lokr_w1_b", "lokr_w1_a"))


def _moved(name: str, value: torch.Tensor, dtype: torch.dtype | None, device: torch.device | str) -> torch.Tensor:
    return value.to(device=device, dtype=value.dtype if name in ("alpha", "scale") else dtype or value.dtype)


def _entry(path: Path, place: str, pieces: Mapping[Target, Adapter], problems: list[str]) -> LoraEntry:
    whole = [adapter for target, adapter in pieces.items() if target.parts == 1]
    if whole:
        if len(pieces) > 1:
            problems.append(f"{path}: adapts {place} both as one matrix and as several")
        return whole[0]
    by_part = {target.part: adapter for target, adapter in pieces.items()}
    return [by_part.get(part, {}) for part in range(next(iter(pieces)).parts)]
