"""JSON from files of unknown origin: parsed within bounds, its fields read with their types checked.

    config = json_fields.read(path, limit=2**20)          # an `Object`
    width = config.integer("width", low=1, high=2**20)
    names = config.texts("names", default=())

Every error is a WeightsError that names the file, the field, its value and what would be right. Constants that JSON
does not have (NaN, Infinity), names that occur twice and absurd nesting are refused when the text is parsed.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, overload

from functional_sd3.formats import bounded
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import shorten

REQUIRED: Any = object()
"""The default of a field that must be there."""
Default = TypeVar("Default")
_DEEPEST = 64
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}
_NESTED = frozenset((dict, list))
_TYPES = {kind: {kind, int} if kind is float else {kind} for kind in _KINDS}


class Object(NamedTuple):
    """A JSON object and its place: a file, then the names of the fields that lead to it.

    Each method reads one field. default: the result where the field is absent or null; without one that is an error.
    """

    values: Mapping[str, Any]
    where: str

    def text(self, name: str, default: Default = REQUIRED, *, longest: int = 2**20) -> str | Default:
        """A string of at most `longest` characters."""
        value = self._value(name, default, str)
        if isinstance(value, str) and len(value) > longest:
            raise self.error(name, f"has {len(value):,} characters, more than {longest:,}")
        return value

    def boolean(self, name: str, default: Default = REQUIRED) -> bool | Default:
        """True or false; numbers are neither."""
        return self._value(name, default, bool)

    def integer(
        self, name: str, default: Default = REQUIRED, *, low: int = -(2**63), high: int = 2**63 - 1
    ) -> int | Default:
        """A whole number from `low` to `high`; a float without a fraction (1e3) counts as one."""
        value: Any = self.number(name, default)
        if name not in self.values or self.values[name] is None:
            return value
        if value != int(value) or not low <= value <= high:
            raise self.error(name, f"must be a whole number from {low} to {high}")
        return int(value)

    def number(self, name: str, default: Default = REQUIRED) -> float | Default:
        """A finite number."""
        value = self._value(name, default, float)
        if value is default:
            return value
        return _finite(value, self, name)

    @overload
    def mapping(self, name: str, default: None) -> "Object | None": ...

    @overload
    def mapping(self, name: str, default: Mapping[str, Any] = REQUIRED) -> "Object": ...

    def mapping(self, name: str, default: Mapping[str, Any] | None = REQUIRED) -> "Object | None":
        """An object within this one; where the field is absent, one of the mapping `default`."""
        value = self._value(name, default, dict)
        return Object(value, f"{self.where}: {shorten(name)}") if isinstance(value, dict) else value

    def mappings(self, name: str, default: Any = REQUIRED, *, most: int = 2**20) -> list["Object"]:
        """A list of objects."""
        values = self.items(name, default, dict, most=most)
        return [Object(value, f"{self.where}: {shorten(name)}[{index}]") for index, value in enumerate(values)]

    def texts(self, name: str, default: Any = REQUIRED, *, most: int = 2**20) -> list[str]:
        """A list of strings."""
        return self.items(name, default, str, most=most)

    def items(self, name: str, default: Any = REQUIRED, kind: type = object, *, most: int = 2**20) -> list:
        """A list of at most `most` values of one kind (dict, list, str, bool, int, float; object: any)."""
        values = self._value(name, default, list)
        if not isinstance(values, list):
            return values
        if len(values) > most:
            raise self.error(name, f"has {len(values):,} entries, more than {most:,}")
        if kind is object or set(map(type, values)) <= _TYPES[kind]:
            return values
        for index, value in enumerate(values):
            if not _is(value, kind):
                entry = f"{shorten(name)}[{index}]"
                raise WeightsError(f"{self.where}: {entry} is {shorten(repr(value))}, not {_KINDS[kind]}")
        return values

    def error(self, name: str, problem: str) -> WeightsError:
        """The error of a field, to be raised: `problem` ends a sentence that names the field and its value."""
        return WeightsError(f"{self.where}: {shorten(name)} is {shorten(repr(self.values.get(name)))}: it {problem}")

    def _value(self, name: str, default: Any, kind: type) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is REQUIRED:
                raise WeightsError(f"{self.where}: has no {shorten(name)}, which must be {_KINDS[kind]}")
            return default
        if not _is(value, kind):
            raise WeightsError(f"{self.where}: {shorten(name)} is {shorten(repr(value))}, not {_KINDS[kind]}")
        return value


def read(path: str | os.PathLike, *, limit: int = 64 * bounded.MEBIBYTE) -> Object:
    """The JSON object in a file of at most `limit` bytes, in UTF-8 with or without a byte order mark."""
    return parse_object(bounded.read_bytes(path, limit), path)


def parse_object(content: str | bytes, where: object) -> Object:
    """The JSON object that a text is; `where` is named in errors."""
    value = parse(content, where)
    if not isinstance(value, dict):
        raise WeightsError(f"{where}: is {shorten(repr(value))}, not a JSON object")
    return Object(value, str(where))


def parse(content: str | bytes, where: object) -> Any:
    """The JSON value that a text is. Raises WeightsError, naming `where`, for anything else."""
    text = bounded.decode_text(content, where) if isinstance(content, bytes) else content
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
        _check_depth(value)
    except RecursionError as error:
        raise WeightsError(f"{where}: is no JSON that can be read: nested more than {_DEEPEST} deep") from error
    except ValueError as error:
        raise WeightsError(f"{where}: is no JSON that can be read: {error}") from error
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{shorten(repr(twice))} is named twice")
    return table


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _check_depth(value: Any) -> None:
    """Code that walks the value later may do so by recursion."""
    level = [value] if type(value) in _NESTED else []
    for _ in range(_DEEPEST):
        if not level:
            return
        inner = (each.values() if type(each) is dict else each for each in level)
        level = [child for children in inner for child in children if type(child) in _NESTED]
    if not level:
        return
    raise RecursionError


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind in (bool, object)
    return isinstance(value, (int, float) if kind is float else kind)


def _finite(value: Any, parent: Object, name: str) -> Any:
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # A whole number of more than 308 digits.
        is_finite = False
    if not is_finite:
        raise parent.error(name, "must be a finite number")
    return value
