"""The tensors of one layer in a LoRA file -> adapters, with every shape and value checked.

The scale of each kind is its trainer's: alpha / rank (LoRA, LoHa, and LoKr with a factored matrix), 1 for a LoKr of
two whole matrices (LyCORIS stores no meaningful alpha for it; PEFT's config gives one), 1 for plain differences.
"""

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.formats import files, finite
from functional_sd3.formats.errors import WeightsError
from functional_sd3.lora import tree as adapters
from functional_sd3.lora.keys import FACTORS, Module, Target
from functional_sd3.lora.tree import Adapter

Alpha = Callable[[int | None], float | None]
"""Rank -> alpha by the file's metadata; for None (no factor has it) alpha / rank; None where it has none."""
_OTHER = "; is the LoRA for another model?"
_LOHA, _LOKR = FACTORS[:6], FACTORS[6:]


class Layer(NamedTuple):
    """Role -> key of one layer, and the file they are in."""

    path: Path
    mapped: files.Mapped
    keys: Mapping[str, str]

    def error(self, role: str, problem: str) -> WeightsError:
        return WeightsError(f"{self.path}: {self.keys[role]} {problem}")

    def shape(self, role: str) -> tuple[int, ...]:
        return self.mapped.header.tensors[self.keys[role]].shape

    def tensor(self, role: str) -> Tensor:
        """A copy of its own, so that the file is not kept open for the life of a small LoRA."""
        entry = self.mapped.header.tensors[self.keys[role]]
        if not entry.dtype.is_floating_point:
            raise self.error(role, f"has dtype {entry.dtype}, not a float")
        if not math.prod(entry.shape):
            raise self.error(role, f"is {list(entry.shape)} and holds no values{_RANK.get(role, '')}")
        value = files.tensor(self.mapped, self.keys[role])
        if what := finite.nonfinite_kind(value):
            raise self.error(role, f"holds {what}, so it is not finite")
        # PyTorch computes nothing in float8; bfloat16 holds all its numbers.
        return value.to(torch.bfloat16) if value.dtype.itemsize < 2 else value.clone()

    def number(self, role: str) -> float:
        """One number of any dtype."""
        entry = self.mapped.header.tensors[self.keys[role]]
        if math.prod(entry.shape) != 1:
            raise self.error(role, f"must be one number, not {list(entry.shape)}")
        if entry.dtype.is_complex:
            raise self.error(role, f"has dtype {entry.dtype}, not a real number")
        value = float(files.tensor(self.mapped, self.keys[role]).reshape(()))
        if not math.isfinite(value) or value == 0:
            raise self.error(role, f"is {value}, which is no strength: it must be a finite number other than 0")
        return value


_RANK = {"down": ": its rank is 0", "up": ": its rank is 0"}


def read(layer: Layer, module: Module, shapes: Mapping[str, tuple[int, ...]], alpha: Alpha) -> dict[Target, Adapter]:
    """The adapters of a layer's weight and bias. shapes: of our leaves by path.

    Raises WeightsError naming the key that is missing, misshapen, not finite, or of a kind that another key denies.
    """
    kinds = [kind for kind in _KINDS if any(role in layer.keys for role in kind.roles)]
    if len(kinds) > 1:
        first, second = (next(role for role in kind.roles if role in layer.keys) for kind in kinds[:2])
        raise layer.error(first, f"and {layer.keys[second]} are of two kinds: {kinds[0].name} and {kinds[1].name}")
    adapters: dict[Target, Adapter] = {}
    if kinds:
        adapters |= _weight(layer, kinds[0], module.weight, shapes, alpha)
    elif "diff_b" not in layer.keys:
        raise layer.error(next(iter(layer.keys)), "has no down, no up and no other factor beside it")
    elif "magnitude" in layer.keys:
        raise layer.error("magnitude", "has nothing beside it that changes the weight")
    weight = None if module.weight is None else adapters.get(module.weight)
    return adapters | _bias(layer, module.bias, shapes, weight)


def _weight(layer: Layer, kind: "_Kind", target: Target | None, shapes, alpha: Alpha) -> dict[Target, Adapter]:
    role = next(role for role in kind.roles if role in layer.keys)
    if target is None:
        raise layer.error(role, "is for a weight, which this layer lacks")
    rows, rest = shapes[target.path][0] // target.parts, tuple(shapes[target.path][1:])
    if kind.name != "difference" and not rest:
        raise layer.error(role, f"is part of a {kind.name}, which a layer of {rows} numbers cannot have")
    adapter = kind.read(layer, rows, rest, alpha)
    if "magnitude" in layer.keys:
        adapter["magnitude"] = _magnitude(layer, rows, rest)
    # Halves are swapped, never separate rows, so a transform acts alike on all that has the weight's rows.
    return {
        target: adapters.reordered(adapter, lambda value: target.transform.join([value])) if _moves(target) else adapter
    }


def _moves(target: Target) -> bool:
    return target.transform.name != "identity"


def _bias(layer: Layer, target: Target | None, shapes, weight: Adapter | None) -> dict[Target, Adapter]:
    roles = [role for role in ("diff_b", "up_bias") if role in layer.keys]
    if not roles:
        return {}
    if target is None:
        raise layer.error(roles[0], "is for a bias, which this layer lacks")
    rows = shapes[target.path][0] // target.parts
    change = torch.zeros(rows, dtype=torch.float32, device="cpu")
    for role in roles:
        value = layer.tensor(role)
        if tuple(value.shape) != (rows,):
            raise layer.error(role, f"is {list(value.shape)}, the layer's bias is [{rows}]{_OTHER}")
        if role == "up_bias" and (weight is None or "down" not in weight):
            raise layer.error(role, "is the bias of a LoRA whose down and up are not there")
        # PEFT scales the whole of up(down(x)), its bias too.
        change = change + value.float() * (adapters.scaling(weight) if weight and role == "up_bias" else 1.0)
        dtype = value.dtype
    return {target: {"diff": target.transform.join([change.to(dtype)])}}


def _low_rank(layer: Layer, rows: int, rest: tuple[int, ...], alpha: Alpha) -> Adapter:
    for role in ("down", "up"):
        if role not in layer.keys:
            raise layer.error(next(iter(layer.keys)), f"has no {role} beside it")
    down, up = layer.tensor("down"), layer.tensor("up")
    if "mid" in layer.keys:
        down = _through(layer, "mid", down, rest)
    # A linear layer's may be stored as a 1 x 1 convolution's.
    fits = down.ndim and math.prod(down.shape[1:]) == math.prod(rest)
    down = down.reshape(down.shape[:1] + rest) if fits else down
    up = up.flatten(1) if up.ndim == 4 and up.shape[2:] == (1, 1) else up
    if tuple(down.shape[1:]) != rest or down.ndim != len(rest) + 1:
        raise layer.error("down", f"is {list(layer.shape('down'))}, the layer takes {list(rest)}{_OTHER}")
    if up.ndim != 2 or up.shape[0] != rows:
        raise layer.error("up", f"is {list(layer.shape('up'))}, the layer gives {rows}{_OTHER}")
    if up.shape[1] != down.shape[0]:
        raise layer.error("down", f"has rank {down.shape[0]}, {layer.keys['up']} has {up.shape[1]}")
    return {"down": down, "up": up, "alpha": _float32(_alpha(layer, down.shape[0], alpha))}


def _loha(layer: Layer, rows: int, rest: tuple[int, ...], alpha: Alpha) -> Adapter:
    values = _tensors(layer, _LOHA[:4])
    adapter: Adapter = {}
    for name in ("w1", "w2"):
        first, second = values[f"hada_{name}_a"], values[f"hada_{name}_b"]
        if (core := f"hada_t{name[1]}") in layer.keys:
            first, second = _transposed(layer, f"hada_{name}_a", first), _through(layer, core, second, rest)
        if first.ndim != 2 or first.shape[0] != rows or math.prod(second.shape[1:]) != math.prod(rest):
            role = f"hada_{name}_a"
            shapes = f"is {list(first.shape)} beside {list(second.shape)}"
            raise layer.error(role, f"{shapes}, the layer is {[rows, *rest]}{_OTHER}")
        if first.shape[1] != second.shape[0]:
            raise layer.error(f"hada_{name}_a", f"has rank {first.shape[1]}, hada_{name}_b has {second.shape[0]}")
        adapter |= {f"{name}_a": first, f"{name}_b": second.reshape(len(second), *rest)}
    rank = len(adapter["w1_b"])
    return {**adapter, "scale": _float32(_alpha(layer, rank, alpha) / rank)}


def _lokr(layer: Layer, rows: int, rest: tuple[int, ...], alpha: Alpha) -> Adapter:
    left, first_rank = _factor(layer, "lokr_w1", rows, rest)
    right, second_rank = _factor(layer, "lokr_w2", rows, rest)
    rank = second_rank or first_rank
    if left.ndim != 2 or right.ndim not in (2, 4):
        raise layer.error(_first(layer, "lokr"), f"and those beside it are {list(left.shape)} and {list(right.shape)}")
    if len(rest) > 1 and right.ndim == 2 and right.shape[1] % math.prod(rest[1:]) == 0:
        right = right.unflatten(1, (-1, *rest[1:]))
    if len(rest) == 1 and right.ndim == 4 and right.shape[2:] == (1, 1):
        right = right.flatten(1)
    adapter = {"left": left, "right": right}
    if adapters.shape(adapter) != (rows, *rest):
        kron = f"is of a Kronecker product of {list(left.shape)} and {list(right.shape)}"
        raise layer.error(_first(layer, "lokr"), f"{kron}, the layer is {[rows, *rest]}{_OTHER}")
    scale = _alpha(layer, rank, alpha) / rank if rank else alpha(None) or 1.0
    return {**adapter, "scale": _float32(scale)}


def _difference(layer: Layer, rows: int, rest: tuple[int, ...], alpha: Alpha) -> Adapter:
    value = layer.tensor("diff")
    if math.prod(value.shape) != rows * math.prod(rest) or value.shape[:1] != (rows,):
        raise layer.error("diff", f"is {list(value.shape)}, the layer is {[rows, *rest]}{_OTHER}")
    return {"diff": value.reshape(rows, *rest)}


class _Kind(NamedTuple):
    name: str
    roles: tuple[str, ...]
    read: Callable[[Layer, int, tuple[int, ...], Alpha], Adapter]


_KINDS = (
    _Kind("LoRA", ("down", "up", "mid"), _low_rank),
    _Kind("LoHa", _LOHA, _loha),
    _Kind("LoKr", _LOKR, _lokr),
    _Kind("difference", ("diff",), _difference),
)


def kind_of(roles: Collection[str]) -> str | None:
    """The kind that these roles are of: "LoRA", "LoHa", "LoKr", "difference", with "(DoRA)" where it has magnitudes."""
    name = next((kind.name for kind in _KINDS if any(role in roles for role in kind.roles)), None)
    if name is None:
        return "difference" if "diff_b" in roles else None
    return f"{name} with magnitudes (DoRA)" if "magnitude" in roles else name


def _alpha(layer: Layer, rank: int, alpha: Alpha) -> float:
    if "alpha" in layer.keys:
        return layer.number("alpha")
    stated = alpha(rank)
    return float(rank) if stated is None else stated


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _magnitude(layer: Layer, rows: int, rest: tuple[int, ...]) -> Tensor:
    """Norms of the rows or of the columns: PEFT stores [rows], LyCORIS [rows, 1] or, by default once, [1, columns]."""
    value = layer.tensor("magnitude")
    ones = [1] * (len(rest) - 1)
    if not rest or value.numel() != max(value.shape, default=0):
        raise layer.error("magnitude", f"is {list(value.shape)}, not one number a row or a column")
    by_row = value.ndim == 1 or value.shape[0] == rows or "lora_magnitude_vector" in layer.keys["magnitude"]
    if by_row or value.numel() == rows != rest[0]:
        if value.numel() != rows:
            raise layer.error("magnitude", f"is {list(value.shape)}, the layer has {rows} rows{_OTHER}")
        return value.reshape(rows, 1, *ones)
    if value.numel() != rest[0]:
        raise layer.error("magnitude", f"is {list(value.shape)}, the layer is {[rows, *rest]}{_OTHER}")
    return value.reshape(1, rest[0], *ones)


def _factor(layer: Layer, name: str, rows: int, rest: tuple[int, ...]) -> tuple[Tensor, int | None]:
    """A matrix of a LoKr, and its rank where it is stored as a product."""
    if name in layer.keys:
        return layer.tensor(name), None
    values = _tensors(layer, (f"{name}_a", f"{name}_b"))
    first, second = values[f"{name}_a"], values[f"{name}_b"]
    core = name.replace("w", "t")
    if core in layer.keys:
        first, second = _transposed(layer, f"{name}_a", first), _through(layer, core, second, rest)
    if first.ndim != 2 or second.ndim not in (2, 4) or first.shape[1] != second.shape[0]:
        shapes = f"is {list(first.shape)} and {list(second.shape)} is beside it"
        raise layer.error(f"{name}_a", f"{shapes}, which have no product")
    if first.shape[0] > rows or math.prod(second.shape[1:]) > math.prod(rest):
        shapes = f"is {list(first.shape)} and {list(second.shape)} is beside it"
        raise layer.error(f"{name}_a", f"{shapes}, the layer is only {[rows, *rest]}{_OTHER}")
    whole = _float(first) @ _float(second).flatten(1)
    return whole.unflatten(1, second.shape[1:]), len(second)


def _through(layer: Layer, role: str, down: Tensor, rest: tuple[int, ...]) -> Tensor:
    """(rank, inputs, height, width) of a Tucker decomposition: its core (rank, inner, height, width) after `down`."""
    core = layer.tensor(role)
    down = down.flatten(1) if down.ndim == 4 and down.shape[2:] == (1, 1) else down
    fits = core.ndim == 4 and down.ndim == 2 and core.shape[1] == down.shape[0]
    if not fits or tuple(core.shape[2:]) != rest[1:] or down.shape[1] > rest[0]:
        shapes = f"is {list(core.shape)} beside {list(down.shape)}"
        raise layer.error(role, f"{shapes}, which does not fit a layer that takes {list(rest)}{_OTHER}")
    return torch.einsum("pqkl,qi->pikl", _float(core), _float(down))


def _transposed(layer: Layer, role: str, value: Tensor) -> Tensor:
    if value.ndim != 2:
        raise layer.error(role, f"is {list(value.shape)}, not a matrix")
    return value.T


def _float(value: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return value.float() if value.dtype.itemsize < 4 else value


def _tensors(layer: Layer, roles: tuple[str, ...]) -> dict[str, Tensor]:
    missing = [role for role in roles if role not in layer.keys]
    if missing:
        raise layer.error(next(iter(layer.keys)), f"has no {missing[0]} beside it")
    return {role: layer.tensor(role) for role in roles}


def _first(layer: Layer, start: str) -> str:
    return next(role for role in layer.keys if role.startswith(start))
