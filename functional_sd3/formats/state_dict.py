"""Tensors by name from `torch.save`'s files, of both of its forms, by an unpickler that knows nothing else.

A pickle is a program. The few instructions that build a dict of tensors are carried out here, on values of our own: no
object is made by name, no key but text is hashed, nothing is allocated that the file does not hold, and the number of
instructions is bounded. Everything else is refused by its name.
"""

import io
import pickletools
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.formats import magic
from functional_sd3.formats.printable import shorten

_MAX_INSTRUCTIONS = 2**18
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = b"\x80"
"""First byte of every pickle that torch.save wrote: its instruction PROTO."""
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MARK = object()


class _Global(NamedTuple):
    """A name that a pickle would import."""

    name: str


class _Storage(NamedTuple):
    """Storage of a tensor's values: `key` names its bytes."""

    dtype: torch.dtype
    key: str
    numel: int


class _Lazy(NamedTuple):
    """A tensor whose bytes were not looked up yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(content: bytes) -> dict[str, Tensor]:
    """The tensors in the bytes of a file. Raises ValueError saying what else is in it, or what is broken."""
    if not content.startswith((magic.ZIP, _PROTOCOL)):
        # Else the bytes of a PNG would be read as instructions, and the first unknown one be named.
        raise ValueError("is not a file of tensors")
    try:
        return _read_zip(content) if content.startswith(magic.ZIP) else _read_legacy(content)
    except zipfile.BadZipFile as error:
        raise ValueError(f"is a broken archive: {error}") from error
    except (NotImplementedError, OSError, RecursionError, RuntimeError, IndexError, OverflowError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"is no file of tensors: {first}") from error


def _read_zip(content: bytes) -> dict[str, Tensor]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        names = {entry.filename for entry in entries}
        program = next((name for name in names if name.split("/")[1:] == ["data.pkl"]), None)
        if program is None:
            raise ValueError("is a zip archive, not weights: unpack it, and give what is in it")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("is a compressed archive, which torch does not write")
        if sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("is a broken archive: its entries are larger than the file")
        root = program.split("/")[0]
        if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
            raise ValueError("has numbers in another order of bytes than little-endian")
        state = _state(_run(io.BytesIO(archive.read(program))))
        keys = {lazy.storage.key for lazy in state.values()}
        if missing := [key for key in keys if f"{root}/data/{key}" not in names]:
            raise ValueError(f"lacks the values of the storage {shorten(missing[0])}")
        stored = {key: bytearray(archive.read(f"{root}/data/{key}")) for key in sorted(keys)}
    return {name: _tensor(name, lazy, stored[lazy.storage.key]) for name, lazy in state.items()}


def _read_legacy(content: bytes) -> dict[str, Tensor]:
    file = io.BytesIO(content)
    if _run(file) != _MAGIC:
        raise ValueError("is no file that torch.save wrote")
    _run(file)  # The version of the form.
    system = _run(file)
    if isinstance(system, dict) and system.get("little_endian") is not True:
        raise ValueError("has numbers in another order of bytes than little-endian")
    state = _state(_run(file))
    keys = _run(file)
    itemsizes = {lazy.storage.key: lazy.storage.dtype.itemsize for lazy in state.values()}
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(itemsizes):
        raise ValueError("has values of other tensors than it names")
    stored = {}
    for key in keys:
        size = int.from_bytes(file.read(8), "little") * itemsizes[key]
        if size > len(content) - file.tell():
            raise ValueError("is truncated")
        stored[key] = bytearray(file.read(size))
    return {name: _tensor(name, lazy, stored[lazy.storage.key]) for name, lazy in state.items()}


def _state(value: Any) -> dict[str, _Lazy]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"holds a {type(value).__name__}, not names with tensors")
    for name, lazy in value.items():
        if not isinstance(lazy, _Lazy):
            raise ValueError(f"{shorten(repr(name))} is no plain tensor")
    return value


def _tensor(name: str, lazy: _Lazy, content: bytearray) -> Tensor:
    storage, offset, shape, strides = lazy
    count = 1
    for side in shape:
        count *= side
    if count > min(storage.numel, len(content) // storage.dtype.itemsize):
        raise ValueError(f"{shorten(name)} {list(shape)} does not hold the values it claims")
    if not count:
        return torch.empty(shape, dtype=storage.dtype, device="cpu")
    values = torch.frombuffer(content, dtype=storage.dtype)
    return values.as_strided(shape, strides, offset)


def _run(file: io.BytesIO) -> Any:
    """The object built by the pickle at this position; the file's position is then after it."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for number, (code, argument) in enumerate(_instructions(file)):
        if number > _MAX_INSTRUCTIONS:
            raise ValueError(f"is a pickle of more than {_MAX_INSTRUCTIONS:,} instructions")
        if code == "STOP":
            return stack.pop()
        if code in ("PROTO", "FRAME"):
            continue
        if code in _CONSTANTS:
            stack.append(_CONSTANTS[code]())
        elif code in _LITERALS:
            stack.append(argument)
        elif code in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                raise ValueError("is a pickle that refers to nothing")
            stack.append(memo[argument])
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ") if code == "GLOBAL" else [stack.pop(), stack.pop()][::-1]
            stack.append(_Global(_allowed(".".join(map(str, parts)))))
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(code[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif code == "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        elif code in ("APPEND", "APPENDS"):
            items = [stack.pop()] if code == "APPEND" else _since_mark(stack)
            _of(stack[-1], list).extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if code == "SETITEM" else _since_mark(stack)
            _set(_of(stack[-1], dict), items)
        elif code == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif code == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(function, _of(arguments, tuple)))
        elif code == "BUILD":
            # A dict of modules carries their versions as its attributes.
            stack.pop()
            _of(stack[-1], dict)
        else:
            raise ValueError(f"is no pickle of weights alone: it has the instruction {code}")
    raise ValueError("is a pickle that does not end")


def _instructions(file: io.BytesIO) -> Iterator[tuple[str, Any]]:
    try:
        for code, argument, _ in pickletools.genops(file):
            yield code.name, argument
    except ValueError as error:
        raise ValueError(f"is a broken pickle: {error}") from error


def _since_mark(stack: list[Any]) -> list[Any]:
    for place in range(len(stack) - 1, -1, -1):
        if stack[place] is _MARK:
            items = stack[place + 1 :]
            del stack[place:]
            return items
    raise ValueError("is a broken pickle: a mark is missing")


def _set(target: dict[str, Any], items: list[Any]) -> None:
    for name, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(name, str):
            raise ValueError(f"is no pickle of weights alone: a name in it is a {type(name).__name__}")
        target[name] = value


def _of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is tuple and isinstance(value, _Global | _Storage | _Lazy)):
        raise ValueError(f"is no pickle of weights alone: a {type(value).__name__} stands where a {kind.__name__} must")
    return value


def _allowed(name: str) -> str:
    module, _, last = name.rpartition(".")
    known = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
    if name in known or (module == "torch" and last in _STORAGES):
        return name
    raise ValueError(f"is no pickle of weights alone: it asks for {shorten(name)}, which is never made")


def _called(function: Any, arguments: tuple) -> Any:
    name = function.name if isinstance(function, _Global) else ""
    if name == "collections.OrderedDict" and not arguments:
        return {}
    if name == "torch._utils._rebuild_parameter" and arguments and isinstance(arguments[0], _Lazy):
        return arguments[0]
    if name == "torch._utils._rebuild_tensor_v2" and len(arguments) >= 4:
        storage, offset, shape, strides = arguments[:4]
        sizes = [*shape, *strides, offset] if isinstance(shape, tuple) and isinstance(strides, tuple) else [None]
        if isinstance(storage, _Storage) and len(shape) == len(strides) <= 16:
            if all(type(size) is int and 0 <= size < 2**63 for size in sizes):
                return _Lazy(storage, offset, shape, strides)
    called = shorten(name) or "something"
    raise ValueError(f"is no pickle of weights alone: {called} is called with what it cannot take")


def _storage(described: Any) -> _Storage:
    """('storage', class, key, place, count) and, in the older form, a view, which must be none."""
    if isinstance(described, tuple) and len(described) in (5, 6) and described[0] == "storage":
        kind, key, count = described[1], described[2], described[4]
        known = isinstance(kind, _Global) and kind.name.rpartition(".")[2] in _STORAGES
        if known and isinstance(key, str) and type(count) is int and described[5:] in ((), (None,)):
            return _Storage(_STORAGES[kind.name.rpartition(".")[2]], key, count)
    raise ValueError("is no pickle of weights alone: it refers to something else than values of tensors")


_CONSTANTS = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_LITERALS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
