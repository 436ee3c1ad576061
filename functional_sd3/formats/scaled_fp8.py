"""ComfyUI's scaled fp8 in files: weights of float8 or int8 beside the factors that they are multiplied by."""

import json
from collections.abc import Mapping

from functional_sd3.formats.files import Mapped
from functional_sd3.formats.header import Entry

INT8_PRODUCT = ".int8_scale_weight"
"""Ours: the factor of a weight of int8 whose product is computed in int8, too."""
FLOAT8_PRODUCT = ".float8_scale_weight"
"""Likewise of float8."""
# Old and new names: a factor, and what only ComfyUI's kernels use.
_SCALES = (".scale_weight", ".weight_scale", INT8_PRODUCT, FLOAT8_PRODUCT)
_UNUSED = (".scale_input", ".input_scale")
_QUANTIZED = ".comfy_quant"
_FP8 = {"float8_e4m3fn", "float8_e5m2"}
_MAX_NOTE = 4096


def split(places: Mapping[str, Mapped], problems: list[str]) -> tuple[dict[str, str], dict[str, Mapped]]:
    """(name of a weight -> name of its factor, the tensors that are weights). Sentences about wrong factors join
    `problems`."""
    scales: dict[str, str] = {}
    weights = {}
    for name, mapped in places.items():
        suffix = next((s for s in (*_SCALES, *_UNUSED, _QUANTIZED) if name.endswith(s)), None)
        weight = name.removesuffix(suffix or "") + ".weight"
        if suffix is None or weight not in places:
            if not name.endswith("scaled_fp8"):
                weights[name] = mapped
        elif suffix in _SCALES:
            scales[weight] = name
            problems += _wrong_scale(name, mapped.header.tensors[name], places[weight].header.tensors[weight])
        elif suffix == _QUANTIZED:
            problems += _wrong_encoding(name, mapped)
    return scales, weights


def _wrong_scale(name: str, scale: Entry, weight: Entry) -> list[str]:
    count = scale.shape[0] if scale.shape else 1
    single = all(size == 1 for size in scale.shape)
    rows = weight.shape and count == weight.shape[0] and all(size == 1 for size in scale.shape[1:])
    if not scale.dtype.is_floating_point:
        return [f"{name} has dtype {scale.dtype}, not a float"]
    return [] if single or rows else [f"{name} has shape {list(scale.shape)}, expected one number or one for each row"]


def _wrong_encoding(name: str, mapped: Mapped) -> list[str]:
    entry = mapped.header.tensors[name]
    note = bytes(mapped.buffer[entry.start : min(entry.end, entry.start + _MAX_NOTE)])
    try:
        encoding = json.loads(note)["format"]
        known = encoding in _FP8
    except (ValueError, TypeError, KeyError, RecursionError):
        return [f"{name} does not say how the weight is quantised"]
    return [] if known else [f"{name} says the weight is quantised as {encoding!r}; only {' and '.join(_FP8)} are read"]
