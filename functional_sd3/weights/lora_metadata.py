"""What files of LoRAs say beside their tensors: PEFT's config of ranks and alphas, as diffusers keeps it.

One JSON object under `lora_adapter_metadata` in the safetensors metadata, every name of it with its component before it
("transformer.lora_alpha"); or, of PEFT's own folders, the same without components in `adapter_config.json`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from functional_sd3.formats.errors import WeightsError
from functional_sd3.weights import adapters, files
from functional_sd3.weights.adapters import Adapter

_KEY = "lora_adapter_metadata"
_PEFT = "base_model.model."
_LARGEST_NUMBER = 1e30
# A pattern is a stranger's regular expression, and some take for ever: these bounds, far above what files have, keep
# the work of each small.
_MOST_EXPRESSIONS, _LONGEST, _MOST_REPEATS, _MOST_CHOICES = 64, 300, 2, 8

Values = Mapping[str, Any]


class Patterns(NamedTuple):
    """Values by the ends of names that they are for, in order: plain ends and whole names, and regular expressions."""

    ends: dict[str, tuple[int, Any]]
    wholes: dict[str, tuple[int, Any]]
    expressions: list[tuple[int, re.Pattern, Any]]


def read(path: Path, metadata: Mapping[str, str]) -> Values:
    """The names and values, empty where there are none. Raises WeightsError for what is not a LoRA's or is damaged."""
    beside = path.parent / "adapter_config.json"
    if _KEY in metadata:
        values = _parsed(path, metadata[_KEY])
    elif path.name.startswith("adapter_model") and beside.is_file():
        values = {_PEFT + name: value for name, value in files.read_json(beside).items()}
    else:
        return {}
    patterns = {}
    for name, value in values.items():
        kind = name.rpartition(".")[2]
        if kind == "use_dora" and value:
            raise WeightsError(f"{path}: {name} says that this is a DoRA (weight-decomposed LoRA): not supported")
        if kind in ("r", "lora_alpha") and not _number(value):
            raise WeightsError(f"{path}: {name} is {value!r}, not a positive number")
        if kind in ("rank_pattern", "alpha_pattern") and value is not None:
            if not isinstance(value, dict) or not all(map(_number, value.values())):
                raise WeightsError(f"{path}: {name} must map names to positive numbers")
            patterns[name] = _patterns(f"{path}: {name}", value)
    return {**values, **patterns}


def alpha(values: Values, layer: str, rank: int, path: Path, problems: list[str]) -> float:
    """The alpha of a layer in the file's spelling; the rank where nothing is said.

    Where alpha is to be divided by the root of the rank (`use_rslora`), it is the one that gives the same when divided
    by the rank. A rank that differs from what is said joins `problems`.
    """
    prefix, name = _component(layer, values)
    said = _match(values.get(prefix + "rank_pattern"), name, values.get(prefix + "r", rank))
    if said != rank:
        problems.append(f"{path}: {layer} has rank {rank}, its metadata says {said}")
    found = float(_match(values.get(prefix + "alpha_pattern"), name, values.get(prefix + "lora_alpha", rank)))
    return found * math.sqrt(rank) if values.get(prefix + "use_rslora") else found


def write(modules: Mapping[str, Mapping[str, Adapter]]) -> dict[str, str]:
    """The metadata for adapters by component folder and module, as diffusers writes it."""
    values: dict[str, Any] = {}
    for folder, found in modules.items():
        ranks = {module: adapters.rank(adapter) for module, adapter in found.items()}
        alphas = {module: _plain(float(adapter["alpha"])) for module, adapter in found.items()}
        for name, pattern, each in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
            usual = Counter(each.values()).most_common(1)[0][0]
            values[f"{folder}.{name}"] = usual
            # PEFT reads these as regular expressions of the end of a name, unless they say where they begin.
            values[f"{folder}.{pattern}"] = {
                f"^{re.escape(module)}": value for module, value in each.items() if value != usual
            }
        values[f"{folder}.target_modules"] = sorted(found)
    return {_KEY: json.dumps(values, indent=2, sort_keys=True)}


def _component(layer: str, values: Values) -> tuple[str, str]:
    """(what stands before the names about this layer, the layer's name without it)."""
    if layer.startswith(_PEFT):
        return _PEFT, layer.removeprefix(_PEFT)
    prefix, _, name = layer.partition(".")
    return prefix + ".", name


def _patterns(where: str, given: Mapping[str, Any]) -> Patterns:
    """As PEFT means them: regular expressions of the end of a name, from a dot on, or of all of it after a ^."""
    found = Patterns({}, {}, [])
    for index, (pattern, value) in enumerate(given.items()):
        plain = pattern.removeprefix("^").replace(r"\.", ".")
        if re.fullmatch(r"[\w.-]*", plain):
            (found.ends if plain == pattern.replace(r"\.", ".") else found.wholes).setdefault(plain, (index, value))
            continue
        if _may_take_for_ever(pattern):
            raise WeightsError(f"{where} has {pattern[:80]!r}, an expression that may take for ever to match")
        try:
            found.expressions.append((index, re.compile(rf"(.*\.)?({pattern})$"), value))
        except (re.error, OverflowError, RecursionError) as error:
            raise WeightsError(f"{where} has {pattern[:80]!r}, which is no regular expression: {error}") from None
    if len(found.expressions) > _MOST_EXPRESSIONS:
        raise WeightsError(f"{where} has {len(found.expressions)} regular expressions, more than {_MOST_EXPRESSIONS}")
    return found


def _may_take_for_ever(pattern: str) -> bool:
    repeats, choices = len(re.findall(r"[*+?{]", pattern)), pattern.count("|")
    nested = re.search(r"\)[*+{]", pattern) is not None
    return nested or len(pattern) > _LONGEST or repeats > _MOST_REPEATS or choices > _MOST_CHOICES


def _match(patterns: Patterns | None, name: str, default: Any) -> Any:
    """The value of the first pattern that fits; no layer has a name longer than an expression may be."""
    if not patterns or len(name) > _LONGEST:
        return default
    ends = [name, *(name[place + 1 :] for place, letter in enumerate(name) if letter == ".")]
    fits = [patterns.ends[end] for end in ends if end in patterns.ends]
    fits += [patterns.wholes[name]] if name in patterns.wholes else []
    fits += [(index, value) for index, pattern, value in patterns.expressions if pattern.match(name)]
    return min(fits)[1] if fits else default


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: {_KEY} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: {_KEY} must be an object, not {values!r:.50}")
    return values


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _LARGEST_NUMBER


def _plain(value: float) -> int | float:
    return int(value) if value.is_integer() else value
