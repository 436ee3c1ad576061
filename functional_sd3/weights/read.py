"""From tensors in mapped files to the parameters of a component: first everything is checked, then everything is read.

A tensor that is stored as we use it costs no memory until it is read; one that is fused or converted is copied once and
its pages are given back, so the peak is the weights, once.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core.spec import Param
from functional_sd3.core.types import Params, Tree
from functional_sd3.formats import files, finite, gguf
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.header import Entry
from functional_sd3.layouts import registry, rules
from functional_sd3.layouts.components import SPECS
from functional_sd3.layouts.registry import Format
from functional_sd3.layouts.rules import Layout, Source, Sources
from functional_sd3.weights import default_dtype
from functional_sd3.weights.default_dtype import Dtype, Kind

# ComfyUI's scaled fp8, old and new names: a factor that a weight is multiplied by, and what only its kernels use.
_SCALES = (".scale_weight", ".weight_scale")
_UNUSED = (".scale_input", ".input_scale")
_QUANTIZED = ".comfy_quant"
_FP8 = {"float8_e4m3fn", "float8_e5m2"}
_LONGEST_NOTE = 4096


class ComponentFiles(NamedTuple):
    """The tensors of one component, by the names they have in their files, and their format.

    component: "clip" where nothing tells L from G yet. where: what to call it in messages. config: what a file beside
    the tensors or their metadata say; None where it has to be read off the shapes.
    """

    component: str
    format: Format
    where: str
    places: dict[str, Mapped]
    config: Any = None


class Discovered(NamedTuple):
    """Contents of a path. schedule_told: whether something there would have said if there were a schedule;
    passed: what lies beside a model and is no part of one, a sentence each."""

    pieces: list[ComponentFiles]
    tokenizers: dict[str, Any]
    schedule: Any = None
    schedule_told: bool = False
    problems: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()


class LoadPlan(NamedTuple):
    """A component that was checked and is still to be read.

    names: the rules' names -> the files'; has_config: whether the config was read from a file, not inferred from
    shapes; sources: the layout's, of the spec.
    """

    component: str
    format: Format | None
    where: str
    config: Any
    spec: Tree
    layout: Layout
    names: dict[str, str]
    places: dict[str, Mapped]
    scales: dict[str, str]
    has_config: bool
    sources: Sources


def plan(piece: ComponentFiles) -> LoadPlan:
    """Check the files of a component and plan how to read them. Raises WeightsError naming every tensor that is
    missing, unexpected, misshapen or of a dtype that is not read."""
    problems: list[str] = []
    scales, places = _without_scales(piece.places, problems)
    shapes = {name: _entry(places, name).shape for name in places}
    where = f"{piece.where}: "
    try:
        config = registry.config_of(piece.format, shapes) if piece.config is None else piece.config
        described = SPECS["clip_l" if piece.component == "clip" else piece.component](config)
        table = piece.format.layout(config)
        names = rules.canonical(table, places)
        known = rules.sources(table, described)
        places = gguf.with_leading_ones(places, names, rules.shapes_of(known))
        shapes = {name: _entry(places, name).shape for name in places}
        problems += rules.check(table, described, {proper: shapes[name] for proper, name in names.items()}, known)
        if not problems:
            problems += too_large_to_compute(names, shapes, known)
    except WeightsError as error:
        raise WeightsError([where + problem for problem in (*problems, *error.problems)]) from None
    except (RuntimeError, OverflowError) as error:
        raise WeightsError(f"{where}its config describes tensors too large to exist: {error}") from error
    for name in names.values():
        if not _entry(places, name).dtype.is_floating_point and not (
            name in scales and _entry(places, name).dtype == torch.int8
        ):
            problems.append(f"{name} has dtype {_entry(places, name).dtype}, not a float")
    if problems:
        raise WeightsError([where + problem for problem in problems])
    has_config = piece.config is not None
    format, where = piece.format, piece.where
    places = {**piece.places, **places}
    return LoadPlan(piece.component, format, where, config, described, table, names, places, scales, has_config, known)


def kinds(plan: LoadPlan, quantized: bool = False) -> set[Kind]:
    """Storage of the parameters, without those that stay quantized: dtypes, and names of encodings."""
    found: set[Kind] = set()
    for source in plan.sources.values():
        names = [plan.names[name] for name in source.names if name in plan.names]
        if not (quantized and names and _stays(plan, source, names)):
            found.update(_kind(plan, name) for name in names)
    return found


def _kind(plan: LoadPlan, name: str) -> Kind:
    entry = _entry(plan.places, name)
    scaled = "scaled " if name in plan.scales else ""
    return entry.blocks or (f"{scaled}{str(entry.dtype).removeprefix('torch.')}" if scaled else entry.dtype)


def read(
    plan: LoadPlan,
    *,
    dtype: Dtype,
    device: torch.device | str,
    check_finite: bool,
    quantized: bool = False,
) -> Params:
    """The parameters, in `default_dtype.choose` of `dtype`. Raises WeightsError naming the first tensor with a NaN or
    an infinity.

    quantized: weights that are stored with a scale for each row stay so, their scales beside them.
    """
    scales: dict[str, Tensor] = {}
    scale_dtype = None if dtype == "stored" else dtype
    dtype = default_dtype.choose(dtype, kinds(plan, quantized) if dtype is None else (), device)
    stored = next((_entry(plan.places, name).dtype for name in plan.names.values()), torch.float32)
    stored = torch.float32 if stored.itemsize == 1 else stored

    def fetch(source: Source, param: Param) -> Tensor:
        names = [plan.names[name] for name in source.names if name in plan.names]
        if not names:
            make = rules.default(plan.layout, source.path, param)
            if make is None:
                raise WeightsError(f"{source.path} is missing and has no default")
            return make().to(device=device, dtype=dtype or stored).contiguous()
        if check_finite:
            _check_finite(plan, names)
        if quantized and _stays(plan, source, names):
            place = source.path.removesuffix("weight") + "scale"
            rows = torch.cat([_rows(plan, name) for name in names])
            # By default a scale is widened with the rest, and never narrowed: it is a factor of whole rows.
            wide = scale_dtype or (torch.promote_types(rows.dtype, dtype) if dtype else None)
            scales[place] = rows.to(device=device, dtype=wide)
            # As bytes: concatenation is not written for float8 everywhere.
            parts = [files.tensor(plan.places[name], name) for name in names]
            stored_as = parts[0].dtype
            return source.transform.join([part.view(torch.int8) for part in parts]).view(stored_as).to(device)
        together = _stacked(plan, names) if source.transform is rules.FUSE else None
        if together is None:
            together = source.transform.join([_part(plan, name, dtype, check_finite) for name in names])
        value = together.to(device=device, dtype=dtype).contiguous()
        if not files.shares(plan.places[names[0]], names[0], value):
            for name in names:
                files.release(plan.places[name], name)
        return value

    params = rules.to_ours(plan.layout, plan.spec, fetch, plan.sources)
    return _with_scales("", params, scales) if scales else params


def _stays(plan: LoadPlan, source: Source, names: list[str]) -> bool:
    """True if rows of the files are rows of ours, each with its scale, in one dtype, of a layer inside blocks: others
    (tables of embeddings, the layers whose weight says what the input is cast to) compute with floats only."""
    kinds = {_entry(plan.places, name).dtype for name in names}
    *layer, leaf = source.path.split(".")
    inside = "blocks" in layer and leaf == "weight" and source.param is not None and len(source.param.shape) > 1
    plain = source.transform in (rules.IDENTITY, rules.FUSE) and inside
    return plain and len(kinds) == 1 and all(name in plan.scales for name in names)


def _rows(plan: LoadPlan, name: str) -> Tensor:
    scale, count = files.tensor(plan.places[plan.scales[name]], plan.scales[name]), _entry(plan.places, name).shape[0]
    return scale.flatten().expand(count).clone()


def _with_scales(path: str, params: Tree, scales: Mapping[str, Tensor]) -> Tree:
    if isinstance(params, list):
        return [_with_scales(f"{path}{index}.", child, scales) for index, child in enumerate(params)]
    if not isinstance(params, dict):
        return params
    children = {name: _with_scales(f"{path}{name}.", child, scales) for name, child in params.items()}
    return {**children, "scale": scales[path + "scale"]} if path + "scale" in scales else children


def _part(plan: LoadPlan, name: str, dtype: torch.dtype | None, check_finite: bool) -> Tensor:
    value = files.tensor(plan.places[name], name)
    if _entry(plan.places, name).blocks:
        if check_finite and (what := finite.nonfinite_kind(value)):
            raise WeightsError(_not_finite(plan, name, what))
        value = value.to(dtype=dtype)
    if name not in plan.scales:
        return value
    factor = files.tensor(plan.places[plan.scales[name]], plan.scales[name]).float()
    # One factor for the tensor, or one for each row.
    factor = factor.reshape(-1, *[1] * (value.ndim - 1)) if factor.numel() > 1 else factor.reshape(())
    return value.to(torch.float32, copy=True).mul_(factor).to(dtype or torch.float32)


def _stacked(plan: LoadPlan, names: list[str]) -> Tensor | None:
    mapped = plan.places[names[0]]
    if any(name in plan.scales or plan.places[name] is not mapped for name in names):
        return None
    return files.stacked(mapped, names)


def _check_finite(plan: LoadPlan, names: list[str]) -> None:
    for name in names:
        for read in (name, plan.scales.get(name)):
            # Blocks are looked at when they have been decoded, once.
            if read and not _entry(plan.places, read).blocks:
                if what := finite.nonfinite_kind(files.tensor(plan.places[read], read)):
                    raise WeightsError(_not_finite(plan, read, what))


def _not_finite(plan: LoadPlan, name: str, what: str) -> str:
    return f"{plan.places[name].path}: {name} holds {what}; finite=False loads it all the same"


def _entry(places: Mapping[str, Mapped], name: str) -> Entry:
    return places[name].header.tensors[name]


def _without_scales(places: Mapping[str, Mapped], problems: list[str]) -> tuple[dict[str, str], dict[str, Mapped]]:
    """(weight -> its factor, the tensors that are weights)."""
    scales: dict[str, str] = {}
    rest = {}
    for name, mapped in places.items():
        suffix = next((s for s in (*_SCALES, *_UNUSED, _QUANTIZED) if name.endswith(s)), None)
        weight = name.removesuffix(suffix or "") + ".weight"
        if suffix is None or weight not in places:
            if not name.endswith("scaled_fp8"):
                rest[name] = mapped
        elif suffix in _SCALES:
            scales[weight] = name
            problems += _wrong_scale(name, _entry(places, name), _entry(places, weight))
        elif suffix == _QUANTIZED:
            problems += _wrong_format(name, mapped)
    return scales, rest


def _wrong_scale(name: str, scale: Entry, weight: Entry) -> list[str]:
    count = scale.shape[0] if scale.shape else 1
    whole = scale.shape in ((), (1,)) or all(size == 1 for size in scale.shape)
    rows = weight.shape and count == weight.shape[0] and all(size == 1 for size in scale.shape[1:])
    if not scale.dtype.is_floating_point:
        return [f"{name} has dtype {scale.dtype}, not a float"]
    return [] if whole or rows else [f"{name} has shape {list(scale.shape)}, expected one number or one for each row"]


def _wrong_format(name: str, mapped: Mapped) -> list[str]:
    entry = mapped.header.tensors[name]
    note = bytes(mapped.buffer[entry.start : min(entry.end, entry.start + _LONGEST_NOTE)])
    try:
        said = json.loads(note)["format"]
        known = said in _FP8
    except (ValueError, TypeError, KeyError, RecursionError):
        return [f"{name} does not say how the weight is quantised"]
    return [] if known else [f"{name} says the weight is quantised as {said!r}; only {' and '.join(_FP8)} are read"]


def too_large_to_compute(names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], known: Sources) -> list[str]:
    """Tables that a file lacks and that would be larger than all it holds: what is merely claimed takes no memory."""
    held = sum(map(math.prod, shapes.values()))
    absent = {name: shape for name, shape in rules.shapes_of(known).items() if name not in names}
    return [
        f"{name} is missing, and {list(s)} is too large to make up" for name, s in absent.items() if math.prod(s) > held
    ]
