"""A request as plain data, for the metadata of its images: `describe`, and `read_description` back.

Every field of a request and of its parts is written, but for `UNRECORDED`: a table with the name of its "kind" for each
dataclass, tensor, guidance, method and function. Values that plain data cannot hold are described: a large tensor by
shape, dtype and SHA-256, a tree of parameters by its counts, a function of one's own (of attention, say) by its name.
Such a request cannot be drawn from its description alone: reading needs those parts given anew, and its error names
them.
"""

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import attention, attention_variants, blend, transform, tree
from functional_sd3.core.checks import function_name
from functional_sd3.flow import caches, ode
from functional_sd3.flow import guidance as guidances
from functional_sd3.flow.guidance import Guidance
from functional_sd3.flow.ode import fixed_point
from functional_sd3.flow.ode.method import Method
from functional_sd3.formats.printable import shorten
from functional_sd3.pipeline import mixing, request
from functional_sd3.pipeline.blending import Region
from functional_sd3.pipeline.fields import velocity
from functional_sd3.pipeline.request import Request

UNRECORDED = {"on_step"}
"""Fields that only observe a run."""

_PARTS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Request, Region, request.AppliedLora, request.TextOptions, request.SamplingOptions, request.StartImages,
        request.Variation, request.Tiling, request.InversionEdit, request.FlowEdit, request.Frames, attention.Stream,
        caches.Extrapolate, caches.Tolerance, caches.FirstBlock, caches.TeaCache,
    )
}  # fmt: skip
_FUNCTIONS: dict[str, Callable] = {
    f"{function.__module__.removeprefix('functional_sd3.')}.{function.__qualname__}": function
    for function in (
        mixing.lerp,
        blend.slerp,
        velocity,
        fixed_point.inverse,
        transform.compile,
        attention.joint_attention,
        attention.identity_attention,
        attention_variants.linear,
        request.states,
        request.denoised,
    )
}
"""Functions that a description may name. No others are looked up: a description may come from a file of unknown
origin."""
_ATTENTIONS: dict[str, Callable] = {"windowed": attention_variants.windowed, "cached": attention_variants.cached}
"""Makers of forms of attention by name, which take the fields of what they make."""
_MAX_NUMBERS = 1024


def describe(value: Any) -> Any:
    """A request, or a part of one, in the words of JSON."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"kind": "float", "value": str(value)}
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, Guidance):
        return _guidance(value)
    if isinstance(value, Method | ode.Adaptive):
        return _method(value)
    if isinstance(value, attention_variants.Windowed | attention_variants.Cached):
        arguments = {name: describe(getattr(value, name)) for name in field_names(value)}
        return {"kind": f"attention.{type(value).__name__.lower()}", **arguments}
    if fields := field_names(value):
        return {"kind": type(value).__name__, **{name: describe(getattr(value, name)) for name in fields}}
    if _is_tree(value):
        leaves = tree.leaves(value)
        return {"kind": "parameters", "tensors": len(leaves), "numbers": sum(leaf.numel() for leaf in leaves)}
    if isinstance(value, Mapping) and value and all(isinstance(name, int) for name in value):
        return {"kind": "blocks", **{str(block): describe(part) for block, part in value.items()}}
    if isinstance(value, Mapping):
        return {str(name): describe(part) for name, part in value.items()}
    if isinstance(value, tuple | list | range | set | frozenset):
        return [describe(part) for part in value]
    if callable(value):
        name = function_name(value).removeprefix("functional_sd3.")
        return {"kind": "function" if _FUNCTIONS.get(name) is value else "unwritten", "name": name}
    return {"kind": "unwritten", "name": type(value).__qualname__}


def field_names(value: Any) -> tuple[str, ...]:
    """The recorded fields of a dataclass or a NamedTuple; none of anything else."""
    fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else ()
    return tuple(name for name in fields or getattr(value, "_fields", ()) if name not in UNRECORDED)


def read_description(description: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Request:
    """The request of a description.

    given: by path ("start.images", "loras.0.lora", "sampling.guidance"), the parts that a description cannot hold, or
    that are to be others. Raises ValueError, with the path, for a part that must be given, for what is none, and for a
    given path that the description does not have.
    """
    unused = set(given or {})
    try:
        made = _read(description, "", given or {}, unused)
    except RecursionError:
        raise ValueError("this is no description of a request: its parts lie too deep in one another") from None
    if not isinstance(made, Request):
        raise ValueError("this is no description of a request")
    if unused:
        raise ValueError(f"the description has no part {', '.join(sorted(unused))}, which is given")
    return made


def _tensor(value: Tensor) -> dict[str, Any]:
    value, dtype = value.detach(), str(value.dtype).removeprefix("torch.")
    if value.numel() <= _MAX_NUMBERS or not value.is_floating_point():
        return {"kind": "tensor", "dtype": dtype, "values": describe(value.tolist())}
    content = value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"kind": "tensor", "dtype": dtype, "shape": list(value.shape), "sha256": digest}


def _guidance(value: Guidance) -> dict[str, Any]:
    if value.made_by is None:
        return {"kind": "unwritten", "name": "a guidance that no function of flow.guidance made"}
    arguments = {name: describe(part) for name, part in value.made_by.arguments.items()}
    return {"kind": f"guidance.{value.made_by.function}", **arguments}


def _method(value: Method | ode.Adaptive) -> dict[str, Any]:
    options: dict[str, Any] = {}
    known: Method | ode.Adaptive | None = (ode.METHODS | ode.MEAN).get(value.name)
    if isinstance(value, ode.Adaptive) and value.name in ode.ADAPTIVE:
        options = {"rtol": value.rtol, "atol": value.atol, "max_steps": value.max_steps}
        known = ode.ADAPTIVE[value.name]._replace(**options)
    if known != value:
        return {"kind": "unwritten", "name": f"a method {value.name}, not that of ode"}
    return {"kind": f"ode.{value.name}", **{name: describe(part) for name, part in options.items()}}


def _is_tree(value: Any) -> bool:
    if not isinstance(value, dict | list) or not value:
        return False
    parts = value.values() if isinstance(value, dict) else value
    return all(isinstance(part, Tensor) or part == {} or _is_tree(part) for part in parts)


def _read(data: Any, path: str, given: Mapping[str, Any], unused: set[str]) -> Any:
    """The value of a part; paths of `given` that it has are removed from `unused`."""
    if path in given:
        unused.discard(path)
        return given[path]
    if isinstance(data, list):
        return [_read(part, f"{path}.{index}", given, unused) for index, part in enumerate(data)]
    if not isinstance(data, Mapping):
        return data
    inner, place = f"{path}." if path else "", path or "this"
    parts = {name: _read(part, inner + str(name), given, unused) for name, part in data.items() if name != "kind"}
    try:
        return _make(str(data["kind"]), parts)
    except _NotHeld as error:
        raise ValueError(f"{place}: a description does not hold {error}; give it by this path") from None
    except LookupError as error:
        raise ValueError(f"{place} is no description of a part of a request: there is no {error}") from None
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{place} is no description of a part of a request: {error}") from None


class _NotHeld(Exception):
    """A part that a description names and does not hold."""


def _make(kind: str, parts: dict[str, Any]) -> Any:
    """The part of that kind. Raises _NotHeld for what a description does not hold, LookupError for what is missing."""
    room, _, name = kind.partition(".")
    if kind in _PARTS:
        return _PARTS[kind](**parts)
    if kind == "float":
        return float(parts["value"])
    if kind == "tensor" and "values" not in parts and "sha256" in parts:
        shape = " x ".join(map(str, parts.get("shape", ())))
        raise _NotHeld(f"this tensor of {shape} numbers (their SHA-256 is {shorten(str(parts['sha256']))})")
    if kind == "tensor":
        return torch.tensor(parts["values"], dtype=_dtype(parts["dtype"]), device="cpu")
    if kind == "function":
        return _FUNCTIONS[parts["name"]]
    if kind == "blocks":
        return {int(block): part for block, part in parts.items()}
    if room == "attention":
        return _ATTENTIONS[name](**parts)
    if room == "ode" and name in ode.ADAPTIVE:
        return ode.ADAPTIVE[name]._replace(**parts)
    if room == "ode":
        return (ode.METHODS | ode.MEAN)[name]
    if room == "guidance":
        return _make_guidance(name, parts)
    if kind == "unwritten":
        raise _NotHeld(f"{shorten(str(parts.get('name')), 200)}, which the request was given in Python")
    raise _NotHeld(shorten(f"{kind} {parts.get('name', '')}".strip()))


def _make_guidance(name: str, parts: dict[str, Any]) -> Guidance:
    function = vars(guidances)[name]
    if name not in guidances.__all__ or not hasattr(function, "__wrapped__"):
        raise _NotHeld(f"guidance {shorten(name)}")
    positional: list[Any] = []
    keywords = {}
    parameters = inspect.signature(function).parameters
    if unknown := parts.keys() - parameters.keys():
        raise TypeError(f"{name} has no {', '.join(sorted(unknown))}")
    for each in parameters.values():
        if each.kind is each.KEYWORD_ONLY:
            keywords[each.name] = parts[each.name]
        else:
            positional += parts[each.name] if each.kind is each.VAR_POSITIONAL else [parts[each.name]]
    return function(*positional, **keywords)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return dtype
