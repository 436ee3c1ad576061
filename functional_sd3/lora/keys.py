"""The names of LoRA tensors in public trainers' files, as a product of tables.

A key is prefix + layer + role. The prefix names the component, the layer is spelled in diffusers' (transformers') names
or in Stability's, with dots or with underscores, and the role names the factor. Any prefix may precede any
spelling of any layer: all are compared with their dots written as underscores, so no list of whole names is needed.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from functional_sd3.core import spec as specs
from functional_sd3.formats.sources import IDENTITY, Source, Transform
from functional_sd3.layouts import rules, stability
from functional_sd3.layouts.components import Config, spec
from functional_sd3.layouts.diffusers_folder import COMPONENTS
from functional_sd3.layouts.rules import SWAP_HALVES

KOHYA = {"transformer": "lora_unet_", "clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5": "lora_te3_"}
"""Component -> the start of kohya's names of its layers."""

COMPONENT_NAMES = {
    "transformer": ("", "transformer", "unet", "diffusion_model", "model.diffusion_model"),
    "clip_l": ("text_encoder", "text_encoder_1", "te1", "te_1", "clip_l", "text_encoders.clip_l"),
    "clip_g": ("text_encoder_2", "te2", "te_2", "clip_g", "text_encoders.clip_g"),
    "t5": ("text_encoder_3", "te3", "te_3", "t5", "t5xxl", "text_encoders.t5xxl"),
}
"""Component -> its names in files: of diffusers, kohya, ComfyUI, Stability and OMI; "" is PEFT's own."""
MARKS = ("", "lora_", "lycoris_")
"""Prefixes of a component's name: kohya, OneTrainer and LyCORIS write one."""
WRAPPERS = ("base_model.model", "module", "_orig_mod")
"""Names of PEFT's and torch's wrappers around a component, before or after its name."""
_MAX_PREFIX_PARTS = 12
_MAX_COMPARED_LENGTH = 200
_MAX_KEY = 1000
"""Characters beyond which a name is no layer's; the longest of SD3 has about 100."""

SIDES = {
    "down": (".lora_A", ".lora_down", ".lora.down", ".lora_linear_layer.down", "_lora.down", ".down"),
    "up": (".lora_B", ".lora_up", ".lora.up", ".lora_linear_layer.up", "_lora.up", ".up"),
    "mid": (".lora_mid", ".lora.mid", "_lora.mid"),
}
"""Role -> the names of a low-rank factor; an adapter's name (PEFT) or a part's number (kohya) may follow."""
FACTORS = (
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
)
"""Tensors of LoHa and LoKr (LyCORIS, PEFT); each name is its role."""


class Target(NamedTuple):
    """A weight or bias of ours at `path`, or the `part`-th of its `parts`; `transform`: of its rows, theirs to ours."""

    path: str
    part: int
    parts: int
    transform: Transform


class Module(NamedTuple):
    """The leaves of one layer of a file; None for those that it has not."""

    weight: Target | None = None
    bias: Target | None = None


class Key(NamedTuple):
    """A tensor's name taken apart: the layer as it is spelled, and the role; None for the role of anything else."""

    layer: str
    role: str | None


def _alternatives(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


_SUFFIXES = (
    *((re.compile(rf"(.+?)(?:{_alternatives(names)})(?:\.([^.]+))?\.weight"), role) for role, names in SIDES.items()),
    (re.compile(rf"(.+?)(?:{_alternatives(SIDES['up'])})(?:\.([^.]+))?\.bias"), "up_bias"),
    (re.compile(r"(.+?)\.lora_A"), "down"),
    (re.compile(r"(.+?)\.lora_B"), "up"),
    (re.compile(r"(.+)\.alpha"), "alpha"),
    (re.compile(r"(.+?)\.(?:dora_scale|lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?"), "magnitude"),
    (re.compile(r"(.+)\.(?:diff|w_norm)"), "diff"),
    (re.compile(r"(.+)\.(?:diff_b|b_norm)"), "diff_b"),
)
_FACTOR = re.compile(rf"(.+)\.({_alternatives(FACTORS)})(?:\.[^.]+)?(?:\.weight)?")
REFUSED = (
    (re.compile(r".+\.lora_embedding_[AB](\..+)?"), "the LoRA of an embedding"),
    (re.compile(r".+\.(oft_blocks|oft_diag|oft_R|boft_\w+)(\..+)?"), "part of an OFT or BOFT"),
    (re.compile(r".+\.(a1|a2|b1|b2|bm1|bm2)\.weight"), "part of a GLoRA"),
    (re.compile(r".+\.(on_input|ia3_l)(\..+)?"), "part of an (IA)3"),
    (re.compile(r".+\.(vera_\w+|lokr_t1|set_weight|reshape_weight)(\..+)?"), "of a kind without a known formula"),
)
"""Keys that are understood, but are of something that adapters do not hold."""


def parse(key: str) -> Key:
    """The parts of a tensor's name."""
    if len(key) > _MAX_KEY:
        return Key(key, None)
    if match := _FACTOR.fullmatch(key):
        return Key(match[1], match[2])
    for pattern, role in _SUFFIXES:
        if match := pattern.fullmatch(key):
            part = match[2] if len(match.groups()) > 1 else None
            # kohya's split query, key and value: lora_down.0.weight is Stability's layer qkv.0.
            return Key(f"{match[1]}.{part}" if part and part.isdecimal() and "lora_A" not in key else match[1], role)
    return Key(key, None)


def refused(key: str) -> str | None:
    """Description of a tensor that no adapter can hold; None for all others."""
    return next((what for pattern, what in REFUSED if len(key) <= _MAX_KEY and pattern.fullmatch(key)), None)


def adaptable(path: str, ndim: int) -> bool:
    """True for the weight of a linear or convolution layer."""
    *_, owner, name = ("", *path.split("."))
    return name == "weight" and ndim in (2, 4) and not owner.endswith("embedding") and owner != "relative_bias"


def sources(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """Leaves of a whole model (path of ours -> shape) -> their names in diffusers, without the component, and the
    transform."""
    named = _named(shapes)
    swapped = {path.rpartition(".")[0] for path, shape in shapes.items() if _is_shift_and_scale(path, shape)}
    return {
        path: source if path.rpartition(".")[0] in swapped or ".context." not in path else _not_swapped(source)
        for path, source in named.items()
    }


def parts(paths: Collection[str]) -> dict[str, int]:
    """Number of matrices in a file that make up each weight: 3 for query, key and value."""
    return {path: len(source.names) for path, source in _named(paths).items()}


def stability_sources(paths: Collection[str]) -> dict[str, Source]:
    """The sources of leaves of the transformer, in Stability's names; the rest as in `sources`."""
    named = rules.sources_of(stability.TRANSFORMER, [path.removeprefix("transformer.") for path in paths])
    return {path: named[path.removeprefix("transformer.")] for path in paths}


def _named(paths: Collection[str]) -> dict[str, Source]:
    """The sources of paths that may not be a whole model's: then every context counts as the last block's."""
    named: dict[str, Source] = {}
    grouped: dict[str, list[str]] = {}
    for path in paths:
        component, _, rest = path.partition(".")
        if component not in COMPONENTS:
            raise ValueError(f"{path} begins with no component; known are {', '.join(COMPONENTS)}")
        grouped.setdefault(component, []).append(rest)
    for component, rests in grouped.items():
        for rest, source in rules.sources_of(COMPONENTS[component].layout, rests).items():
            named[f"{component}.{rest}"] = source
    return named


def _not_swapped(source: Source) -> Source:
    return source._replace(transform=IDENTITY) if source.transform is SWAP_HALVES else source


class Table(NamedTuple):
    """Component -> spelling of a layer with underscores -> its leaves, for the components of one model."""

    components: Mapping[str, Mapping[str, Module]]

    def find(self, layer: str) -> tuple[str | None, Module | None]:
        """(component, leaves) of a layer with its prefix; the component alone where the model lacks the layer."""
        flat = flatten(layer)
        flat = flat.replace("_processor_", "_", 1)
        component = None
        for prefix, rest in _splits(flat):
            for named in _PREFIXES.get(prefix, ()):
                if module := self.components.get(named, {}).get(rest):
                    return named, module
                component = named if prefix else component
        return component, None

    def closest(self, layer: str) -> str | None:
        """The most similar spelling of a layer with its numbers as `*`, or None."""
        component, _ = self.find(layer)
        known = sorted({_numberless(name) for name in self.components.get(component or "transformer", {})})
        best: tuple[float, str] | None = None
        for prefix, rest in _splits(flatten(layer)[:_MAX_COMPARED_LENGTH]):
            name = _numberless(rest)
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8) if prefix in _PREFIXES else []
            rated = [(difflib.SequenceMatcher(None, one, name).ratio(), one) for one in near]
            best = max([*rated, *([best] if best else [])], default=None)
        return best and best[1]


def table(config: Config) -> Table:
    """Every spelling of every layer that a file can adapt. VAEs have no LoRAs in files."""
    return Table({name: _modules(name, leaves) for name, leaves in _leaves(config).items()})


def leaf_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The weights and biases of all layers, by path of ours."""
    return {path: shape for one in _leaves(config).values() for path, shape in one.items()}


def flatten(name: str) -> str:
    """A name with underscores for dots."""
    return name.replace(".", "_")


def prefixes(component: str) -> list[str]:
    """Every prefix of a component's layers, with dots where it has names of its own; "" is among the transformer's."""
    marked = [mark + name if name else mark.rstrip("_") for name in COMPONENT_NAMES[component] for mark in MARKS]
    # Below an encoder's name ComfyUI and Stability write "transformer.", which before it would mean another component.
    before, after = WRAPPERS, (*WRAPPERS, *(["transformer"] if component != "transformer" else []))
    pairs = [(name, wrapper) for name in marked for wrapper in after]
    pairs += [(wrapper, name) for name in marked for wrapper in before]
    return list(dict.fromkeys([*marked, *(".".join(filter(None, pair)) for pair in pairs)]))


def _prefix_table() -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    for component in COMPONENT_NAMES:
        for prefix in map(flatten, prefixes(component)):
            table[prefix] = tuple(dict.fromkeys((*table.get(prefix, ()), component)))
    return table


_PREFIXES = _prefix_table()


def _splits(flat: str) -> Iterator[tuple[str, str]]:
    """Every way to take a prefix off, the shortest first."""
    yield "", flat
    place = -1
    for _ in range(_MAX_PREFIX_PARTS):
        place = flat.find("_", place + 1)
        if place < 0:
            return
        yield flat[:place], flat[place + 1 :]


def _numberless(name: str) -> str:
    return re.sub(r"(?<=_)\d+(?=_)", "*", name)


def _leaves(config: Config) -> dict[str, dict[str, tuple[int, ...]]]:
    described = {name: part for name, part in spec(config).items() if name in KOHYA}
    return {
        name: {
            f"{name}.{path}": leaf.shape
            for path, leaf in specs.paths(part).items()
            if path.rpartition(".")[2] in ("weight", "bias")
        }
        for name, part in described.items()
    }


def _modules(component: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Module]:
    modules: dict[str, Module] = {}

    def add(name: str, target: Target) -> None:
        layer, _, leaf = name.rpartition(".")
        for spelling in _spellings(component, layer):
            flat = flatten(spelling)
            modules[flat] = modules.get(flat, Module())._replace(**{leaf: target})

    for path, source in sources(shapes).items():
        for part, name in enumerate(source.names):
            transform = IDENTITY if len(source.names) > 1 else source.transform
            add(name, Target(path, part, len(source.names), transform))
    if component == "transformer":
        split = parts(shapes)
        for path, source in stability_sources(shapes).items():
            layer, _, leaf = source.names[0].rpartition(".")
            add(source.names[0], Target(path, 0, 1, source.transform))
            for part in range(split[path] if split[path] > 1 else 0):
                add(f"{layer}.{part}.{leaf}", Target(path, part, split[path], IDENTITY))
    return modules


def _spellings(component: str, layer: str) -> Iterator[str]:
    """A layer in today's names and in those of older files."""
    yield layer
    if component == "transformer":
        yield layer.removesuffix(".0") if layer.endswith(".to_out.0") else layer
        return
    yield layer.removeprefix("text_model.")
    head, attention, name = layer.partition(".self_attn.")
    if attention:
        old = head + attention + {"out_proj": "to_out"}.get(name, "to_" + name.removesuffix("_proj"))
        yield from (old, old.removeprefix("text_model."))


def _is_shift_and_scale(path: str, shape: tuple[int, ...]) -> bool:
    """True for the last block's modulation of the context: shift and scale alone, which diffusers has the other way
    round."""
    return path.endswith(".context.modulation.weight") and shape[0] == 2 * shape[1]
