"""Memory of drawing images, from the specs of a model alone: of its stages, on the device and on the host.

Weights are counted by their specs, where `swap_blocks` and `offload` put them. The computation is run on the device
"meta" (`core.live_bytes`), in blocks of true size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import live_bytes, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.types import Params, Tree
from functional_sd3.image import vae
from functional_sd3.layouts import registry, rules
from functional_sd3.layouts.components import SPECS, Config, require
from functional_sd3.pipeline.swapping import NAMES
from functional_sd3.text import clip, t5
from functional_sd3.transformer import mmdit


@dataclass(frozen=True)
class Choice:
    """Sizes of a run on which its memory depends.

    images: at once; rows: evaluations of each, 2 with guidance. height, width: of the latents. texts: distinct ones,
    the negative prompt too; tokens: of T5. stored, computed: dtypes of the files and of the computation; quantized:
    weights of layers inside blocks have one byte. offload, swapped: of the options --offload and --block-swap (None:
    not given). on_device: the device has memory of its own, so that what is not on it takes the host's. fused: whether
    the files have queries, keys and values as one matrix (our own layout), so that nothing is copied to join them.
    """

    height: int
    width: int
    images: int = 1
    rows: int = 2
    texts: int = 2
    tokens: int = 256
    steps: int = 28
    stored: torch.dtype = torch.bfloat16
    computed: torch.dtype = torch.bfloat16
    quantized: bool = False
    offload: bool = False
    swapped: int | None = None
    on_device: bool = True
    fused: bool = False


class Stage(NamedTuple):
    """Bytes while a component is computed: weights and results on the device; weights on the host that the system
    cannot drop, in pinned memory or joined from several tensors; and those mapped from files, of which it drops pages
    that other programs need."""

    name: str
    weights: int
    results: int
    host: int
    mapped: int

    @property
    def device(self) -> int:
        return self.weights + self.results


def stages(config: Config, choice: Choice) -> list[Stage]:
    """The stages of a run in their order: text encoders, modulations, steps, decoding."""
    return list(_stages(config, choice))


def peak(stages: list[Stage], *, on_device: bool = True) -> tuple[int, int]:
    """The most bytes on the device and on the host; without a device of its own all are the host's."""
    device, host = max(each.device for each in stages), max(each.host for each in stages)
    return (device, host) if on_device else (0, max(each.device + each.host for each in stages))


def _stages(config: Config, choice: Choice) -> Iterator[Stage]:
    places = {name: _place(name, config, choice) for name in SPECS if name != "taesd" and getattr(config, name)}
    for name in [name for name in places if name in ("clip_l", "clip_g", "t5")]:
        yield _stage(name, name, places, choice, _of_encoder(name, getattr(config, name), choice))
    sizes = require(config, "transformer")
    table, evaluation = _of_transformer(sizes, config, choice)
    yield _stage("modulations", "transformer", places, choice, table)
    yield _stage("steps", "transformer", places, choice, evaluation)
    latents = _empty((choice.images, sizes.in_channels, choice.height, choice.width), choice.computed)
    decoder = _meta(SPECS["vae"](require(config, "vae")), choice.computed)
    decoded = _peak(lambda: vae.decode(decoder, require(config, "vae"), latents), decoder, latents)
    yield _stage("decoding", "vae", places, choice, decoded + _images(config, choice))


class _Place(NamedTuple):
    """Bytes of a component: on the device, on the host, mapped; and of the copies of blocks that are computed."""

    device: int
    host: int
    mapped: int
    copies: int = 0


def _place(name: str, config: Config, choice: Choice) -> _Place:
    params = _meta(SPECS[name](getattr(config, name)), choice.stored, choice.quantized and name != "vae")
    joined = set() if choice.fused else _joined(name, config)
    swaps, first = choice.swapped is not None and name in NAMES, 0
    if swaps:
        first = max(0, len(params["blocks"]) - (choice.swapped or 0))
    device = host = mapped = 0
    copies: dict[int, int] = {}
    for path, leaf in tree.flatten_paths(params).items():
        block, once = _block(path), name == "transformer" and ".modulation." in path
        computed = leaf.numel() * (choice.computed.itemsize if leaf.is_floating_point() else 1)
        is_copy = choice.on_device or (leaf.is_floating_point() and leaf.dtype != choice.computed)
        if not (swaps and block is not None and (block >= first or once)):
            if is_copy or path in joined:
                device += computed
            else:
                mapped += leaf.nbytes
            continue
        if path in joined or (choice.on_device and name == "transformer" and not once):
            host += leaf.nbytes
        else:
            mapped += leaf.nbytes
        if is_copy and not once:
            copies[block] = copies.get(block, 0) + computed
    # On a GPU the next block is copied while one is computed.
    return _Place(device, host, mapped, max(copies.values(), default=0) * (2 if choice.on_device else 1))


def _stage(stage: str, name: str, places: dict[str, _Place], choice: Choice, results: int) -> Stage:
    own = [places[name]] if choice.offload or choice.swapped is not None else list(places.values())
    copies = 0 if stage == "modulations" else places[name].copies
    return Stage(
        stage,
        sum(each.device for each in own) + copies,
        results,
        sum(each.host for each in own),
        sum(each.mapped for each in own),
    )


def _of_encoder(name: str, sizes: Any, choice: Choice) -> int:
    small = replace(sizes, layers=min(2, sizes.layers))
    network = t5 if name == "t5" else clip
    params = _meta(network.spec(small), choice.computed)
    ids = _empty((choice.texts, choice.tokens if name == "t5" else sizes.length), torch.int64)
    return _peak(lambda: network.apply(params, small, ids), params, ids) + _dequantized(params, choice)


def _of_transformer(sizes: mmdit.Config, config: Config, choice: Choice) -> tuple[int, int]:
    """Bytes of the modulations of a run while they are made, and of an evaluation beside them.

    Of three blocks, one of each kind, as an evaluation holds what one block does.
    """
    dual = (0,) if sizes.dual_attention_layers else ()
    small = replace(sizes, depth=min(3, sizes.depth), dual_attention_layers=dual)
    params, batch = _meta(mmdit.spec(small), choice.computed), choice.images * choice.rows
    tokens = choice.tokens * (config.t5 is not None) + max(
        (each.length for each in (config.clip_l, config.clip_g) if each), default=0
    )
    latents = _empty((batch, sizes.in_channels, choice.height, choice.width), torch.float32)
    text = _empty((batch, tokens, sizes.context_width), choice.computed)
    pooled = _empty((batch, sizes.pooled_width), choice.computed)
    t = _empty((batch,), torch.float32)
    with torch.no_grad():
        rows = mmdit.modulations(params, small, t, pooled)
    arguments = latents, None, text, None
    velocity = _peak(
        lambda: mmdit.apply(params, small, *arguments, modulations=rows), params, [latents, text, *tree.leaves(rows)]
    )
    block = _modulations(sizes)
    table = choice.steps * batch * block.total * choice.computed.itemsize
    copied = block.largest * choice.computed.itemsize if choice.swapped is not None else 0
    # Of the prompts and of the negative ones, then joined; a state, a velocity and its halves in float32.
    state = 4 * latents.nbytes + _dequantized(params, choice)
    return 2 * table + copied + text.nbytes, table + velocity + text.nbytes + state


def _dequantized(params: Params, choice: Choice) -> int:
    """Bytes of the largest weight while it is dequantised: in floats, and multiplied by its scale."""
    largest = max(leaf.numel() for leaf in tree.leaves(params["blocks"][0]))
    return 2 * largest * choice.computed.itemsize if choice.quantized else 0


class _Modulations(NamedTuple):
    """Numbers of all modulations of a row, and of the parameters of the largest block's."""

    total: int
    largest: int


def _modulations(sizes: mmdit.Config) -> _Modulations:
    shapes = {path: param.shape for path, param in specs.paths(mmdit.spec(sizes)).items() if "modulation" in path}
    blocks: dict[int | None, int] = {}
    for path, shape in shapes.items():
        blocks[_block(path)] = blocks.get(_block(path), 0) + math.prod(shape)
    return _Modulations(sum(shape[0] for path, shape in shapes.items() if path.endswith("bias")), max(blocks.values()))


def _images(config: Config, choice: Choice) -> int:
    """Bytes of the images in float32, in the VAE's range and in [0, 1]."""
    return 2 * 4 * 3 * choice.images * choice.height * choice.width * vae.factor(require(config, "vae")) ** 2


def _joined(name: str, config: Config) -> set[str]:
    """Leaves that are no tensors of a diffusers folder: copies on the host."""
    sizes = getattr(config, name)
    layout = registry.DIFFUSERS[name].layout(sizes)
    sources = rules.sources(layout, SPECS[name](sizes))
    return {path for path, source in sources.items() if source.transform.name != "identity"}


def _meta(spec: Tree, dtype: torch.dtype, quantized: bool = False) -> Params:
    """Parameters without values; quantized: weights of layers inside blocks in one byte, scales not counted."""

    def leaf(path: str, param: specs.Param) -> Tensor:
        is_small = quantized and _block(path) is not None and path.endswith("weight") and len(param.shape) > 1
        return _empty(param.shape, torch.int8 if is_small else dtype)

    return specs.map_params(leaf, spec)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _peak(run: Callable[[], Any], *given: Any) -> int:
    return live_bytes.peak_bytes(run, tree.leaves(list(given)))


def _block(path: str) -> int | None:
    parts = path.split(".")
    return int(parts[parts.index("blocks") + 1]) if "blocks" in parts else None
