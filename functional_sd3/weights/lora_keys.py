"""The names of LoRA tensors: in PEFT and diffusers, old and new, in Stability's and in kohya's files.

A key is the name of a layer in one of several spellings, and a suffix that says what the tensor is. The spellings are
made from the layouts' tables for the layers a config has, and looked up, so that underscores need not be understood.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from functional_sd3.core import spec as specs
from functional_sd3.weights import layout, stability
from functional_sd3.weights.diffusers import COMPONENTS
from functional_sd3.weights.layout import IDENTITY, SWAP_HALVES, Source
from functional_sd3.weights.model import Config, spec

KOHYA = {"transformer": "lora_unet_", "clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5": "lora_te3_"}
"""Component -> what kohya's names of its layers begin with."""

_OTHER_PREFIXES = ("lora_transformer_", "lycoris_")
_STABILITY_PREFIXES = ("diffusion_model.", "model.diffusion_model.")


class Target(NamedTuple):
    """What a name of a layer means: the weight of ours at `path`, or the `part`-th of its `parts` matrices.

    `transform` is that of the weight's rows between their order and ours.
    """

    path: str
    part: int
    parts: int
    transform: layout.Transform


class Key(NamedTuple):
    """A tensor's name taken apart: the layer, and "down", "up" or "alpha"; None for what is no part of a LoRA."""

    layer: str
    role: str | None


_ROLES = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"(.+)\.lora_A(?:\.[^.]+)?\.weight", "down"),
        (r"(.+)\.lora_B(?:\.[^.]+)?\.weight", "up"),
        (r"(.+?)(?:\.lora_down|\.lora\.down|_lora\.down|\.lora_linear_layer\.down|\.down)\.weight", "down"),
        (r"(.+?)(?:\.lora_up|\.lora\.up|_lora\.up|\.lora_linear_layer\.up|\.up)\.weight", "up"),
        (r"(.+)\.alpha", "alpha"),
    )
)
REFUSED = (
    (re.compile(r".+\.(dora_scale|lora_magnitude_vector)(\..+)?"), "a DoRA magnitude (weight-decomposed LoRA)"),
    (re.compile(r".+\.hada_\w+"), "part of a LoHa"),
    (re.compile(r".+\.lokr_\w+"), "part of a LoKr"),
    (re.compile(r".+\.lora_mid\.weight"), "the core of a Tucker decomposition"),
    (re.compile(r".+\.lora_B(\..+)?\.bias"), "a LoRA's bias"),
    (re.compile(r".+\.diff(_b)?"), "a full difference, not a LoRA"),
    (re.compile(r".+\.lora_embedding_[AB](\..+)?"), "the LoRA of an embedding"),
)
"""Keys that are understood, but stand for something that adapters do not hold."""


def parse(key: str) -> Key:
    """The parts of a tensor's name."""
    for pattern, role in _ROLES:
        if match := pattern.fullmatch(key):
            return Key(match[1].replace(".processor.", "."), role)
    return Key(key, None)


def refused(key: str) -> str | None:
    """What a tensor is that no adapter can hold; None for all others."""
    return next((what for pattern, what in REFUSED if pattern.fullmatch(key)), None)


def adaptable(path: str, ndim: int) -> bool:
    """Whether a leaf is the weight of a linear or convolution layer."""
    *_, owner, name = ("", *path.split("."))
    return name == "weight" and ndim in (2, 4) and not owner.endswith("embedding") and owner != "relative_bias"


def sources(paths: Iterable[str]) -> dict[str, Source]:
    """Our paths of a whole model -> their names in diffusers, without the component, and the transform."""
    found: dict[str, Source] = {}
    grouped: dict[str, list[str]] = {}
    for path in paths:
        component, _, rest = path.partition(".")
        if component not in COMPONENTS:
            raise ValueError(f"{path} begins with no component; known are {', '.join(COMPONENTS)}")
        grouped.setdefault(component, []).append(rest)
    for component, rests in grouped.items():
        for rest, source in layout.sources_of(COMPONENTS[component].layout, rests).items():
            found[f"{component}.{rest}"] = source
    return found


def parts(paths: Iterable[str]) -> dict[str, int]:
    """How many matrices of a file each weight is made of: 3 for query, key and value."""
    return {path: len(source.names) for path, source in sources(paths).items()}


def stability_sources(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """As `sources` for weights of the transformer (path -> shape), in Stability's names."""
    found = layout.sources_of(stability.TRANSFORMER, [path.removeprefix("transformer.") for path in shapes])
    named = {path: found[path.removeprefix("transformer.")] for path in shapes}
    return {path: source._replace(transform=SWAP_HALVES) if _two_parts(path, shapes[path]) else source
            for path, source in named.items()}  # fmt: skip


def targets(config: Config) -> dict[str, Target]:
    """Every spelling of every layer that a LoRA can adapt -> what it means. VAEs have no LoRAs in files."""
    shapes = adaptable_shapes(config)
    found: dict[str, Target] = {}
    for path, source in sources(shapes).items():
        component = path.partition(".")[0]
        for part, name in enumerate(source.names):
            target = Target(path, part, len(source.names), IDENTITY if len(source.names) > 1 else source.transform)
            found |= dict.fromkeys(_diffusers_spellings(component, name.removesuffix(".weight")), target)
    inside = {path: shape for path, shape in shapes.items() if path.startswith("transformer.")}
    for path, source in stability_sources(inside).items():
        target = Target(path, 0, 1, source.transform)
        found |= dict.fromkeys(_stability_spellings(source.names[0].removesuffix(".weight")), target)
    return found


def adaptable_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The weights that LoRAs in files may adapt, by path of ours."""
    leaves = specs.paths({name: part for name, part in spec(config).items() if name in KOHYA})
    return {path: leaf.shape for path, leaf in leaves.items() if adaptable(path, len(leaf.shape))}


def _two_parts(path: str, shape: tuple[int, ...]) -> bool:
    """Whether this is the last block's modulation of the context: shift and scale alone, the other way round."""
    return path.endswith(".context.modulation.weight") and shape[0] == 2 * shape[1]


def _diffusers_spellings(component: str, name: str) -> list[str]:
    prefix = COMPONENTS[component].folder + "."
    names = [name, name.removeprefix("text_model.")]
    dotted = [prefix + each for each in names]
    flat = [KOHYA[component] + each.replace(".", "_") for each in names]
    if component != "transformer":
        # As ComfyUI writes those that it extracts.
        dotted += [stability.ENCODER_PREFIXES[component] + each for each in names]
        return [*dotted, *flat, *(prefix + _old_text_name(each) for each in names)]
    flat += [other + name.replace(".", "_") for other in _OTHER_PREFIXES]
    # Older files leave the position in `to_out` out; PEFT's own know no components.
    return [*dotted, *flat, "base_model.model." + name, name, prefix + name.replace(".to_out.0", ".to_out")]


def _old_text_name(name: str) -> str:
    head, attention, layer = name.partition(".self_attn.")
    return head + attention + {"out_proj": "to_out"}.get(layer, "to_" + layer.removesuffix("_proj"))


def _stability_spellings(name: str) -> list[str]:
    return [*(prefix + name for prefix in _STABILITY_PREFIXES), KOHYA["transformer"] + name.replace(".", "_")]
