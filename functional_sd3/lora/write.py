"""LoRA files written, with the names of PEFT or of kohya."""

import os
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from functional_sd3.formats import files
from functional_sd3.formats.sources import Source
from functional_sd3.layouts.diffusers_folder import COMPONENTS
from functional_sd3.lora import keys as lora_keys
from functional_sd3.lora import metadata as lora_metadata
from functional_sd3.lora import tree as adapters
from functional_sd3.lora.tree import Adapter, Lora, LoraEntry


def save(
    path: str | os.PathLike,
    lora: Lora,
    *,
    layout: Literal["peft", "kohya"] = "peft",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    differences: bool = False,
) -> None:
    """Write a LoRA as one safetensors file, whole or not at all; `load` gives it back.

    "peft": the keys of diffusers' `save_lora_weights`, alpha and ranks in its metadata (what reads no metadata takes
    alpha for the rank). "kohya": `lora_unet_joint_blocks_...` and `lora_te*_...` with a tensor for each alpha; separate
    query, key and value become one block diagonal LoRA, equal but of three times the rank. dtype: of `down` and `up`.
    metadata: more of the file's. differences: write {"diff"} entries too, as `.diff` and `.diff_b`, which `load` and
    ComfyUI read, and diffusers does not.

    Raises WeightsError when the system refuses, ValueError for an unknown layout, an empty LoRA, a component that no
    file has a name for.
    """
    if layout not in _WRITERS:
        raise ValueError(f"layout {layout!r} must be one of {', '.join(_WRITERS)}")
    entries = adapters.entries(lora)
    if not entries:
        raise ValueError("a LoRA without adapters cannot be saved")
    strangers = sorted({place.partition(".")[0] for place in entries} - set(lora_keys.KOHYA))
    if strangers:
        raise ValueError(f"files have no names for LoRAs of {', '.join(strangers)}; only {', '.join(lora_keys.KOHYA)}")
    for place, entry in entries.items():
        if differences and _is_difference(entry):
            continue
        if not adapters.is_low_rank(entry):
            raise ValueError(
                f"{place} changes by more than a low-rank product, which these layouts cannot hold: `lora.resize` "
                f"makes a LoRA of a LoHa, a LoKr or a difference of matrices; or save the merged model"
            )
        if any(value.ndim != 0 for value in (part["alpha"] for part in adapters.members(entry))):
            raise ValueError(f"{place} is a stack of LoRAs; save one of them at a time")
    low_rank = {place: entry for place, entry in entries.items() if not _is_difference(entry)}
    tensors, own = _WRITERS[layout](low_rank)
    tensors |= _differences({place: entry for place, entry in entries.items() if place not in low_rank}, layout)
    for name, value in tensors.items():
        if dtype and not name.endswith(".alpha"):
            tensors[name] = value.to(dtype)
    files.write_atomic(path, tensors, metadata={"format": "pt", **(metadata or {}), **own})


def _peft(entries: Mapping[str, LoraEntry]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Adapter]] = {}
    for place, source in lora_keys.sources({place: _shape(entry) for place, entry in entries.items()}).items():
        component = place.partition(".")[0]
        for name, adapter in zip(source.names, _in_their_order(entries[place], source), strict=True):
            if not adapter:
                continue
            module = name.removesuffix(".weight")
            modules.setdefault(COMPONENTS[component].folder, {})[module] = adapter
            down, up = adapter["down"], adapter["up"]
            tensors[f"{COMPONENTS[component].folder}.{module}.lora_A.weight"] = down
            tensors[f"{COMPONENTS[component].folder}.{module}.lora_B.weight"] = up if down.ndim == 2 else _conv(up)
    return tensors, lora_metadata.write(modules)


def _differences(entries: Mapping[str, LoraEntry], layout: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for place, source in lora_keys.sources({place: entry["diff"].shape for place, entry in entries.items()}).items():
        component, values = place.partition(".")[0], source.transform.split(entries[place]["diff"], len(source.names))
        for name, value in zip(source.names, values, strict=True):
            layer, _, leaf = name.rpartition(".")
            start = f"{COMPONENTS[component].folder}." if layout == "peft" else lora_keys.KOHYA[component]
            layer = layer if layout == "peft" else layer.replace(".", "_")
            tensors[f"{start}{layer}.{'diff_b' if leaf == 'bias' else 'diff'}"] = value
    return tensors


def _is_difference(entry: LoraEntry) -> bool:
    return isinstance(entry, dict) and set(entry) == {"diff"}


def _in_their_order(entry: LoraEntry, source: Source) -> list[Adapter]:
    if len(source.names) > 1:
        return adapters.separate(entry, len(source.names))
    return [{**entry, "up": source.transform.split(entry["up"], 1)[0]}]


def _kohya(entries: Mapping[str, LoraEntry]) -> tuple[dict[str, Tensor], dict[str, str]]:
    named = lora_keys.stability_sources([place for place in entries if place.startswith("transformer.")])
    named |= lora_keys.sources({place: _shape(entry) for place, entry in entries.items() if place not in named})
    tensors: dict[str, Tensor] = {}
    for place, source in named.items():
        entry = entries[place] if len(source.names) > 1 else _whole(entries[place])
        for name, adapter in zip(source.names, _in_their_order(entry, source), strict=True):
            if adapter:
                flat = lora_keys.KOHYA[place.partition(".")[0]] + name.removesuffix(".weight").replace(".", "_")
                down, up = adapter["down"], adapter["up"]
                tensors[f"{flat}.lora_down.weight"] = down
                tensors[f"{flat}.lora_up.weight"] = up if down.ndim == 2 else _conv(up)
                tensors[f"{flat}.alpha"] = adapter["alpha"]
    return tensors, {}


_WRITERS = {"peft": _peft, "kohya": _kohya}


def _whole(entry: LoraEntry) -> Adapter:
    """One adapter for several: the one they were split from where they share their `down`, else a block diagonal."""
    if isinstance(entry, dict):
        return entry
    parts = adapters.members(entry)
    first, scalings = parts[0], {float(adapters.scaling(part)) for part in parts}
    if len(scalings) > 1:
        down, up = adapters.factors(entry)
        return {"down": down, "up": up, "alpha": torch.tensor(float(len(down)), dtype=torch.float32, device="cpu")}
    if len(parts) == len(entry) and all(torch.equal(part["down"], first["down"]) for part in parts):
        return {**first, "up": torch.cat([part["up"] for part in parts])}
    # Their common scaling stays in alpha, so that the values are written as they are.
    unscaled = [
        part and {**part, "alpha": torch.tensor(float(adapters.rank(part)), dtype=torch.float32, device="cpu")}
        for part in entry
    ]
    down, up = adapters.factors(unscaled)
    return {"down": down, "up": up, "alpha": first["alpha"] * (len(down) / adapters.rank(first))}


def _shape(entry: LoraEntry) -> tuple[int, ...]:
    first = adapters.members(entry)[0]
    count = 1 if isinstance(entry, dict) else len(entry)
    return (first["up"].shape[0] * count, *first["down"].shape[1:])


def _conv(up: Tensor) -> Tensor:
    return up[:, :, None, None]
