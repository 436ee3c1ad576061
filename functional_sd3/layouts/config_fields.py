"""Config files as tables: each of their fields paired with one of ours, read and written by one rule.

Every field that changes the computation is checked: a value we do not compute with is an error, never ignored.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from functional_sd3.formats.errors import WeightsError

# Far above any network there is, and low enough that a hostile file cannot make us build a spec for ever.
MAX_LAYERS = 1024
MAX_SIZE = 2**24
_MAX_NUMBER = 1e30


class Field(NamedTuple):
    """`read` turns theirs into ours, or raises ValueError saying what would be right; `default`: of an absent field.

    optional: left out of files where it has the default, as other programs do not know it.
    """

    theirs: str
    ours: str
    read: Callable[[Any], Any]
    default: Any
    write: Callable[[Any], Any] = lambda value: list(value) if isinstance(value, tuple) else value
    optional: bool = False


class Fixed(NamedTuple):
    """A field whose only supported value follows from the rest."""

    theirs: str
    value: Callable[[Any], Any]
    default: Any = None
    checked: bool = True
    written: bool = True


class Table(NamedTuple):
    """Correspondence between one type of config file and one config of ours.

    closed: fields the table does not know are errors, unless they have no effect; transformers' configs are full of
    unused ones. unsound: sentences about values that do not go together.
    """

    config: type
    fields: tuple[Field, ...]
    fixed: tuple[Fixed, ...] = ()
    closed: bool = True
    unsound: Callable[[Any], Iterable[str]] = lambda config: ()


def read(table: Table, values: dict[str, Any], path: Path | str) -> Any:
    """Our config from the values of a file. Raises one WeightsError naming every field that is unsupported."""
    problems: list[str] = []
    fields = {}
    for field in table.fields:
        value = values.get(field.theirs, field.default)
        try:
            fields[field.ours] = field.read(value)
        except ValueError as error:
            problems.append(f"{field.theirs} is {_shown(value)}, {error}")
    if table.closed:
        known = {field.theirs for field in table.fields} | {field.theirs for field in table.fixed}
        problems += [
            f"{name} is {_shown(value)}, a field that is not known"
            for name, value in values.items()
            if name not in known and not name.startswith("_") and value not in (None, False, [], {})
        ]
    if not problems:
        try:
            config = table.config(**fields)
            problems += [*_wrong_fixed(table, config, values), *table.unsound(config)]
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise WeightsError([f"{path}: {problem}" for problem in problems])
    return config


def write(table: Table, config: Any) -> dict[str, Any]:
    """The values of a file from our config: `read(table, write(table, config), path) == config`."""
    fields = {field.theirs: field.write(getattr(config, field.ours)) for field in table.fields}
    absent = {field.theirs for field in table.fields if field.optional and fields[field.theirs] == field.default}
    fields = {name: value for name, value in fields.items() if name not in absent}
    return {**fields, **{fixed.theirs: fixed.value(config) for fixed in table.fixed if fixed.written}}


def _wrong_fixed(table: Table, config: Any, values: dict[str, Any]) -> Iterable[str]:
    for fixed in table.fixed:
        stored, right = values.get(fixed.theirs, fixed.default), fixed.value(config)
        if fixed.checked and stored != right:
            yield f"{fixed.theirs} is {_shown(stored)}, only {right!r} is supported here"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def whole(lowest: int, highest: int) -> Callable[[Any], int]:
    """Reader of whole numbers in [lowest, highest]. Raises ValueError, as the other readers, completing "FIELD"."""

    def read(value: Any) -> int:
        if type(value) is not int or not lowest <= value <= highest:
            raise ValueError(f"must be a whole number from {lowest} to {highest}")
        return value

    return read


def number(lowest: float = 0.0) -> Callable[[Any], float]:
    """Reader of finite numbers above `lowest`, which are floats afterwards."""

    def read(value: Any) -> float:
        if type(value) not in (int, float) or not lowest < value < _MAX_NUMBER:
            raise ValueError(f"must be a number above {lowest:g}")
        return float(value)

    return read


def choice(*values: Any) -> Callable[[Any], Any]:
    """Reader of one of these values, of the same type."""

    def read(value: Any) -> Any:
        if not any(value == choice and type(value) is type(choice) for choice in values):
            raise ValueError(f"must be {' or '.join(map(repr, values))}")
        return value

    return read


def optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Reader of what `read` reads, or of null."""
    return lambda value: None if value is None else read(value)


def several(read: Callable[[Any], Any], fewest: int, most: int) -> Callable[[Any], tuple]:
    """Reader of a list of `fewest` to `most` items that `read` reads, as a tuple."""

    def read_all(value: Any) -> tuple:
        if not isinstance(value, list | tuple) or not fewest <= len(value) <= most:
            raise ValueError(f"must be a list of {fewest} to {most}")
        return tuple(read(item) for item in value)

    return read_all


size, layers, flag = whole(1, MAX_SIZE), whole(1, MAX_LAYERS), choice(True, False)
any_number = number(-_MAX_NUMBER)
