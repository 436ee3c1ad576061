"""Tensors in functions, arguments and trees: found and replaced wherever a function of them could read them.

A transform that runs a function a second time, or at another level, must know every tensor that it reads, also those in
closures, `functools.partial`s, bound methods and callable objects.
"""

import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def tensors(value: Any) -> list[Tensor]:
    """The tensors that `value` holds, each once, in the order of `replace_tensors`."""
    collected: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        collected.append(tensor)
        return tensor

    _rebuild(value, record, {})
    return collected


def replace_tensors(value: Any, replacements: Sequence[Tensor]) -> Any:
    """`value` with each of its tensors replaced; functions and objects that hold none stay as they are.

    A function that holds a tensor is replaced by a copy with closure cells of its own.
    """
    remaining = iter(replacements)
    return _rebuild(value, lambda _: next(remaining), {})


def _rebuild(value: Any, replace: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    if isinstance(value, _LEAVES):
        return value
    if id(value) not in memo:
        memo[id(value)] = value  # Until it is known: a function may hold itself.
        memo[id(value)] = replace(value) if isinstance(value, Tensor) else _rebuild_holder(value, replace, memo)
    return memo[id(value)]


def _rebuild_holder(value: Any, replace: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    def rebuild(parts: Sequence[Any]) -> list[Any] | None:
        """The rebuilt parts; None where all are what they were."""
        rebuilt = [_rebuild(part, replace, memo) for part in parts]
        return None if all(new is old for new, old in zip(rebuilt, parts, strict=True)) else rebuilt

    if isinstance(value, dict):
        parts = rebuild(list(value.values()))
        return value if parts is None else dict(zip(value, parts, strict=True))
    if isinstance(value, list | tuple):
        parts = rebuild(value)
        if parts is None:
            return value
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    if isinstance(value, functools.partial):
        parts = rebuild([value.func, value.args, value.keywords])
        return value if parts is None else functools.partial(parts[0], *parts[1], **parts[2])
    if isinstance(value, types.MethodType):
        parts = rebuild([value.__func__, value.__self__])
        return value if parts is None else types.MethodType(*parts)
    if isinstance(value, types.FunctionType):
        return _rebuild_function(value, rebuild)
    if hasattr(value, "__dict__") and (callable(value) or dataclasses.is_dataclass(value)):
        parts = rebuild(list(vars(value).values()))
        if parts is None:
            return value
        duplicate = copy.copy(value)
        duplicate.__dict__.update(zip(vars(value), parts, strict=True))
        return duplicate
    return value


def _rebuild_function(function: types.FunctionType, rebuild: Callable[[Sequence[Any]], list[Any] | None]) -> Any:
    filled = [cell for cell in function.__closure__ or () if _is_filled(cell)]
    parts = rebuild([*(cell.cell_contents for cell in filled), function.__defaults__, function.__kwdefaults__])
    if parts is None:
        return function
    *contents, defaults, keyword_defaults = parts
    changed = {id(cell): types.CellType(content) for cell, content in zip(filled, contents, strict=True)}
    closure = tuple(changed.get(id(cell), cell) for cell in function.__closure__ or ())
    duplicate = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
    duplicate.__kwdefaults__ = keyword_defaults
    return duplicate


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


_LEAVES = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.BuiltinFunctionType)
