"""Parameter trees from the tensors of mapped files: first everything is checked, then everything is read.

The one engine of all that is loaded: components of models, ControlNets, IP-Adapters, CLIP, Inception. A tensor that is
stored as it is used costs no memory until it is read; one that is fused or converted is copied once and its pages are
given back, so the peak is the weights, once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core import spec as specs
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Params, Tree
from functional_sd3.formats import default_dtype, files, finite, gguf, scaled_fp8, sources
from functional_sd3.formats.default_dtype import Dtype, Kind
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.header import Entry
from functional_sd3.formats.sources import FUSE, IDENTITY, Source, Sources, Transform

_SAME_START = (IDENTITY.name, FUSE.name)
"""Transforms whose result begins with the first of their tensors."""


class TreePlan(NamedTuple):
    """A tree whose files were checked, and which is still to be read.

    where: its files, for messages; sources: of the spec; names: the sources' names -> the files'; places: name in the
    files -> file; scales: name of a weight -> name of the factor it is stored with.
    """

    where: str
    spec: Tree
    sources: Sources
    names: dict[str, str]
    places: dict[str, Mapped]
    scales: dict[str, str]


class Storage(NamedTuple):
    """Storage of a tree. narrow: share of its numbers that take at most 16 bits each. width: the largest of its
    matrices' shorter sides, of convolutions inputs and outputs: the width of a network."""

    narrow: float
    width: int


def shapes(places: Mapping[str, Mapped]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor."""
    return {name: entry(places, name).shape for name in places}


def entry(places: Mapping[str, Mapped], name: str) -> Entry:
    """Dtype, shape and place of one tensor."""
    return places[name].header.tensors[name]


def check(plan: TreePlan) -> TreePlan:
    """The plan, with dimensions of 1 that ggml drops restored. Raises WeightsError, naming `where`, with every tensor
    that is missing, unexpected, misshapen, of a dtype that is not read, or absent and too large to be made."""
    places = {**plan.places, **gguf.with_leading_ones(plan.places, plan.names, sources.shapes_of(plan.sources))}
    held = {proper: entry(places, name) for proper, name in plan.names.items()}
    problems = sources.check(plan.sources, {proper: one.shape for proper, one in held.items()})
    problems = problems or _too_large_to_make(plan.sources, plan.names, places)
    problems += [
        f"{name} has dtype {held[proper].dtype}, not a float"
        for proper, name in plan.names.items()
        if not (held[proper].dtype.is_floating_point or (name in plan.scales and held[proper].dtype == torch.int8))
    ]
    if problems:
        raise WeightsError([f"{plan.where}: {problem}" for problem in problems])
    return plan._replace(places=places)


def kinds(plan: TreePlan, quantized: bool = False) -> set[Kind]:
    """Storage of the parameters, without those that stay quantized: dtypes, and names of encodings."""
    stored: set[Kind] = set()
    for source in plan.sources.values():
        names = _present(plan, source)
        if not (quantized and names and _stays(plan, source, names)):
            stored.update(_kind(plan, name) for name in names)
    return stored


def storage(plan: TreePlan) -> Storage:
    """Storage of the tree, from the headers of its files alone."""
    held = [entry(plan.places, name) for name in plan.names.values()]
    # Blocks take less than the dtype that they are decoded to.
    narrow = sum(math.prod(one.shape) for one in held if one.blocks or one.dtype.itemsize <= 2)
    params = [source.param for source in plan.sources.values() if source.path.endswith("weight")]
    sides = [min(param.shape[:2]) for param in params if param is not None and len(param.shape) > 1]
    return Storage(narrow / max(1, sum(math.prod(one.shape) for one in held)), max(sides, default=0))


def load(plan: TreePlan, *, dtype: Dtype, device: torch.device | str, finite: bool = True) -> Params:
    """The tree of `read`, with a Note where the default dtype is another than the stored one."""
    default_dtype.check(dtype)
    if default_dtype.is_default(dtype):
        default_dtype.say(dtype, [kinds(plan)], device)
    return read(plan, dtype=dtype, device=device, finite=finite)


def read(plan: TreePlan, *, dtype: Dtype, device: torch.device | str, finite: bool, quantized: bool = False) -> Params:
    """The parameters, in `default_dtype.choose` of `dtype`.

    finite: whether the first tensor with a NaN or an infinity raises WeightsError. quantized: weights that are stored
    with a scale for each row stay so, their scales beside them.
    """
    scales: dict[str, Tensor] = {}
    scale_dtype = dtype if isinstance(dtype, torch.dtype) else None
    by_default = default_dtype.is_default(dtype)
    dtype = default_dtype.choose(dtype, kinds(plan, quantized) if by_default else (), device)
    stored = next((entry(plan.places, name).dtype for name in plan.names.values()), torch.float32)
    stored = torch.float32 if stored.itemsize == 1 else stored

    def leaf(path: str, param: Param) -> Tensor:
        source = plan.sources[path]
        names = _present(plan, source)
        if not names:
            if source.default is None:
                raise WeightsError(f"{path} is missing and has no default")
            return source.default().to(device=device, dtype=dtype or stored).contiguous()
        if finite:
            _check_finite(plan, names)
        if quantized and _stays(plan, source, names):
            rows = source.transform.join([_rows(plan, name) for name in names])
            # By default a scale is widened with the rest, and never narrowed: it is a factor of whole rows.
            wide = scale_dtype or (torch.promote_types(rows.dtype, dtype) if dtype else None)
            kind = scale_name(plan.scales[names[0]])
            scales[path.removesuffix("weight") + kind] = rows.to(device=device, dtype=wide)
            # As bytes: concatenation is not written for float8 everywhere.
            parts = [files.tensor(plan.places[name], name) for name in names]
            return source.transform.join([part.view(torch.int8) for part in parts]).view(parts[0].dtype).to(device)
        together = _stacked(plan, names) if source.transform is FUSE else None
        if together is None:
            together = _joined(source.transform, [_decoded(plan, name, dtype, finite) for name in names], dtype)
        value = together.to(device=device, dtype=dtype).contiguous()
        if not files.shares(plan.places[names[0]], names[0], value):
            for name in names:
                files.release(plan.places[name], name)
        return value

    params = specs.map_params(leaf, plan.spec)
    return _with_scales("", params, scales) if scales else params


def nonfinite_kind(plan: TreePlan, name: str) -> str | None:
    """Kind of a non-finite value in a tensor of the files or in its factor; None where there is none."""
    reads = [one for one in (name, plan.scales.get(name)) if one]
    return next((what for one in reads if (what := mapped_nonfinite_kind(plan.places[one], one))), None)


def first_values(plan: TreePlan, path: str, count: int) -> Tensor | None:
    """The first values of a leaf, float32 (at most `count`,), by which trees are distinguished; None for one that the
    files lack. Of a leaf whose rows are theirs no more than these are read."""
    source = plan.sources[path]
    names = _present(plan, source)
    if not names:
        return None
    parts = [files.tensor(plan.places[name], name) for name in names]
    is_enough = source.transform.name in _SAME_START and parts[0].numel() >= count
    start = (parts[0] if is_enough else source.transform.join(parts)).flatten()[:count].float()
    scale = plan.scales.get(names[0])
    return start if scale is None else start * files.tensor(plan.places[scale], scale).flatten()[0].float()


def mapped_nonfinite_kind(mapped: Mapped, name: str) -> str | None:
    """`finite.nonfinite_kind` of a tensor of a mapped file, whose memory is given back."""
    what = finite.nonfinite_kind(files.tensor(mapped, name))
    files.release(mapped, name)
    return what


def _too_large_to_make(known: Sources, names: Mapping[str, str], places: Mapping[str, Mapped]) -> list[str]:
    """Tables that a file lacks and that would be larger than all it holds: what is merely claimed takes no memory."""
    held = sum(math.prod(shape) for shape in shapes(places).values())
    absent = {name: shape for name, shape in sources.shapes_of(known).items() if name not in names}
    return [
        f"{name} is missing, and {list(shape)} is too large to make up"
        for name, shape in absent.items()
        if math.prod(shape) > held
    ]


def _present(plan: TreePlan, source: Source) -> list[str]:
    """The names in the files of a source's tensors, as far as they are there."""
    return [plan.names[name] for name in source.names if name in plan.names]


def _kind(plan: TreePlan, name: str) -> Kind:
    stored = entry(plan.places, name)
    scaled = f"scaled {stored.dtype}".replace("torch.", "") if name in plan.scales else stored.dtype
    return stored.blocks or scaled


def _stays(plan: TreePlan, source: Source, names: Sequence[str]) -> bool:
    """True if rows of the files are rows of ours, each with its scale, in one dtype, of a layer inside blocks: others
    (tables of embeddings, the layers whose weight says what the input is cast to) compute with floats only."""
    dtypes = {entry(plan.places, name).dtype for name in names}
    *layer, leaf = source.path.split(".")
    inside = "blocks" in layer and leaf == "weight" and source.param is not None and len(source.param.shape) > 1
    return source.transform.by_rows and inside and len(dtypes) == 1 and all(name in plan.scales for name in names)


def scale_name(name: str) -> str:
    """Our name of a factor, for the products that the file names."""
    if name.endswith(scaled_fp8.FLOAT8_PRODUCT):
        return "float8_scale"
    return "int8_scale" if name.endswith(scaled_fp8.INT8_PRODUCT) else "scale"


def _rows(plan: TreePlan, name: str) -> Tensor:
    scale, count = files.tensor(plan.places[plan.scales[name]], plan.scales[name]), entry(plan.places, name).shape[0]
    return scale.flatten().expand(count).clone()


def _with_scales(path: str, params: Tree, scales: Mapping[str, Tensor]) -> Tree:
    if isinstance(params, list):
        return [_with_scales(f"{path}{index}.", child, scales) for index, child in enumerate(params)]
    if not isinstance(params, dict):
        return params
    children = {name: _with_scales(f"{path}{name}.", child, scales) for name, child in params.items()}
    return children | {name: scales[path + name] for name in layers.SCALES if path + name in scales}


def _decoded(plan: TreePlan, name: str, dtype: torch.dtype | None, check_finite: bool) -> Tensor:
    value = files.tensor(plan.places[name], name)
    if entry(plan.places, name).blocks:
        if check_finite and (what := finite.nonfinite_kind(value)):
            raise WeightsError(_not_finite(plan, name, what))
        value = value.to(dtype=dtype)
    if name not in plan.scales:
        return value
    factor = files.tensor(plan.places[plan.scales[name]], plan.scales[name]).float()
    # One factor for the tensor, or one for each row.
    factor = factor.reshape(-1, *[1] * (value.ndim - 1)) if factor.numel() > 1 else factor.reshape(())
    return value.to(torch.float32, copy=True).mul_(factor).to(dtype or torch.float32)


def _joined(transform: Transform, parts: list[Tensor], dtype: torch.dtype | None) -> Tensor:
    """The leaf of these tensors; in another dtype without a copy in theirs, which a peak of memory would show."""
    if transform.pieces is None or dtype in (None, parts[0].dtype):
        return transform.join(parts)
    pieces = transform.pieces(parts)
    joined = parts[0].new_empty((sum(len(piece) for piece in pieces), *pieces[0].shape[1:]), dtype=dtype)
    for rows, piece in zip(joined.split([len(piece) for piece in pieces]), pieces, strict=True):
        rows.copy_(piece)
    return joined


def _stacked(plan: TreePlan, names: Sequence[str]) -> Tensor | None:
    mapped = plan.places[names[0]]
    if any(name in plan.scales or plan.places[name] is not mapped for name in names):
        return None
    return files.stacked(mapped, names)


def _check_finite(plan: TreePlan, names: Sequence[str]) -> None:
    for name in names:
        for read in (name, plan.scales.get(name)):
            # Blocks are looked at when they have been decoded, once.
            if read and not entry(plan.places, read).blocks:
                if what := finite.nonfinite_kind(files.tensor(plan.places[read], read)):
                    raise WeightsError(_not_finite(plan, read, what))


def _not_finite(plan: TreePlan, name: str, what: str) -> str:
    return f"{plan.places[name].path}: {name} holds {what}; finite=False loads it all the same"
