"""Metadata of LoRA files: PEFT's config of ranks and alphas, as diffusers stores it.

One JSON object under `lora_adapter_metadata` in the safetensors metadata, every name of it with its component before it
("transformer.lora_alpha"); or, of PEFT's own folders, the same without components in `adapter_config.json`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from functional_sd3.formats import json_fields, patterns
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import shorten
from functional_sd3.lora import tree as adapters
from functional_sd3.lora.tree import Adapter

_KEY = "lora_adapter_metadata"
_PEFT = "base_model.model."
_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_NUMBER = 1e30
_MAX_NAME = 300
"""Characters of a layer's name beyond which no expression is compared with it."""
_MAX_EXPRESSIONS = 64
_MAX_COMPARED = 10**7
"""Characters of names times expressions, for one file: some seconds of work."""
_NUMBERS = ("r", "lora_alpha", "alpha")
_UNSUPPORTED = ("use_qalora", "alora_invocation_tokens", "use_bdlora")

Values = Mapping[str, Any]


class Patterns(NamedTuple):
    """Values by the ends of names that they are for, in order: plain ends and whole names, and regular expressions."""

    ends: dict[str, tuple[int, Any]]
    wholes: dict[str, tuple[int, Any]]
    expressions: list[tuple[int, patterns.Pattern, Any]]


def read(path: Path, metadata: Mapping[str, str], layers: Iterable[str] = ()) -> Values:
    """The names and values, empty where there are none; layers: the names that `alpha` will be called with.

    Raises WeightsError for what is not a LoRA's, is damaged, or would take long to compare with the layers.
    """
    beside = path.parent / "adapter_config.json"
    if _KEY in metadata:
        values = json_fields.parse_object(metadata[_KEY], f"{path}: {_KEY}").values
    elif path.name.startswith("adapter_model") and beside.is_file():
        values = {
            _PEFT + name: value for name, value in json_fields.read(beside, limit=_MAX_CONFIG_BYTES).values.items()
        }
    else:
        return {}
    compiled = {}
    for name, value in values.items():
        kind, shown = name.rpartition(".")[2], shorten(name)
        if kind in _NUMBERS and value is not None and not _is_positive(value):
            raise WeightsError(f"{path}: {shown} is {shorten(repr(value))}, not a positive number")
        if kind in ("use_rslora", "use_dora", "lora_bias", *_UNSUPPORTED) and not isinstance(value, bool | None):
            if kind != "alora_invocation_tokens":
                raise WeightsError(f"{path}: {shown} is {shorten(repr(value))}, not true or false")
        if kind in _UNSUPPORTED and value:
            raise WeightsError(f"{path}: {shown} is {shorten(repr(value))}: a kind of LoRA that is not supported")
        if kind in ("rank_pattern", "alpha_pattern") and value is not None:
            if not isinstance(value, dict) or not all(map(_is_positive, value.values())):
                raise WeightsError(f"{path}: {shown} must map names to positive numbers")
            compiled[name] = _patterns(f"{path}: {shown}", value)
    count = sum(len(one.expressions) for one in compiled.values())
    compared = count * sum(len(layer) for layer in layers if len(layer) <= _MAX_NAME) if count else 0
    if compared > _MAX_COMPARED:
        raise WeightsError(
            f"{path}: {count} regular expressions of {_KEY} would be compared with {compared // count:,} characters of "
            f"layers' names: more than files have"
        )
    return {name: value for name, value in values.items() if value is not None} | compiled


def alpha(values: Values, layer: str, rank: int | None, where: str) -> float | None:
    """The alpha of a layer in the file's spelling, None where the metadata has none; for a rank of None, alpha / rank.

    Where alpha is to be divided by the root of the rank (`use_rslora`), it is the one that gives the same when divided
    by the rank. Raises WeightsError, beginning with `where`, for a rank other than the metadata's.
    """
    if not values:
        return None
    prefix, name = _component(layer)
    stated_rank = _match(values.get(prefix + "rank_pattern"), name, values.get(prefix + "r"))
    if None not in (stated_rank, rank) and stated_rank != rank:
        raise WeightsError(f"{where}: {layer} has rank {rank}, its metadata says {stated_rank}")
    usual = values.get(prefix + "lora_alpha", values.get(prefix + "alpha"))
    value = _match(values.get(prefix + "alpha_pattern"), name, usual)
    divisor = stated_rank if rank is None else rank
    if value is None or divisor is None:
        return None
    value = float(value) * (math.sqrt(divisor) if values.get(prefix + "use_rslora") else 1.0)
    return value / divisor if rank is None else value


def write(modules: Mapping[str, Mapping[str, Adapter]]) -> dict[str, str]:
    """The metadata for adapters by component folder and module, as diffusers writes it."""
    values: dict[str, Any] = {}
    for folder, adapted in modules.items():
        ranks = {module: adapters.rank(adapter) for module, adapter in adapted.items()}
        alphas = {module: _plain(float(adapter["alpha"])) for module, adapter in adapted.items()}
        for name, pattern, each in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
            usual = Counter(each.values()).most_common(1)[0][0]
            values[f"{folder}.{name}"] = usual
            # PEFT reads these as regular expressions of the end of a name, unless they begin with an anchor.
            values[f"{folder}.{pattern}"] = {
                f"^{re.escape(module)}": value for module, value in each.items() if value != usual
            }
        values[f"{folder}.target_modules"] = sorted(adapted)
    return {_KEY: json.dumps(values, indent=2, sort_keys=True)}


def _component(layer: str) -> tuple[str, str]:
    """(prefix of the names about this layer, the layer's name without it)."""
    if layer.startswith(_PEFT):
        return _PEFT, layer.removeprefix(_PEFT)
    prefix, _, name = layer.partition(".")
    return prefix + ".", name


def _patterns(where: str, given: Mapping[str, Any]) -> Patterns:
    """Patterns in PEFT's sense: regular expressions of the end of a name, from a dot on, or of all of it after a ^."""
    sorted_patterns = Patterns({}, {}, [])
    for index, (pattern, value) in enumerate(given.items()):
        plain = pattern.removeprefix("^").replace(r"\.", ".")
        if re.fullmatch(r"[\w.-]*", plain):
            (sorted_patterns.ends if plain == pattern.replace(r"\.", ".") else sorted_patterns.wholes).setdefault(
                plain, (index, value)
            )
            continue
        if len(sorted_patterns.expressions) == _MAX_EXPRESSIONS:
            raise WeightsError(f"{where} has more than {_MAX_EXPRESSIONS} regular expressions")
        try:
            patterns.compile(pattern)
            compiled = patterns.compile(rf"(.*\.)?({pattern})$")
        except patterns.PatternError as error:
            raise WeightsError(f"{where} has {shorten(repr(pattern))}, an expression that {error}") from None
        sorted_patterns.expressions.append((index, compiled, value))
    return sorted_patterns


def _match(given: Patterns | None, name: str, default: Any) -> Any:
    """The value of the first pattern that fits; no layer has a name longer than an expression may be."""
    if not given or len(name) > _MAX_NAME:
        return default
    ends = [name, *(name[place + 1 :] for place, letter in enumerate(name) if letter == ".")]
    fits = [given.ends[end] for end in ends if end in given.ends]
    fits += [given.wholes[name]] if name in given.wholes else []
    fits += [(index, value) for index, pattern, value in given.expressions if pattern.matches(name)]
    return min(fits)[1] if fits else default


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _MAX_NUMBER


def _plain(value: float) -> int | float:
    return int(value) if value.is_integer() else value
