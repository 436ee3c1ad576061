"""Memory of a training step, from the specs of a model alone.

Parameters, gradients, moments and averages are counted. Activations are measured on one block of each kind with two
heads, by what autograd keeps of it, and scaled: every one of them has a size of samples x tokens x width, or samples x
width. The backward pass is then followed block by block, since gradients grow while activations are freed.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3 import lora
from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.types import Params, Tree
from functional_sd3.layouts.components import SPECS, Config, require
from functional_sd3.training.optim import adam8, blockwise, by_leaf
from functional_sd3.training.update_rule import UpdateRule, is_hidden
from functional_sd3.transformer import joint_block, mmdit


@dataclass(frozen=True)
class Choice:
    """What a run computes. batch: images of a step, in `accumulate` parts. side: of the latents. tokens: of the
    context. rule, dtype, lora, text_encoders: as of `tasks.Settings`. stored: dtype of what is frozen. remat, base (a
    dtype of one byte), swapped (blocks that stay on the host): of the options --remat, --base and --block-swap.
    encoders: whether frozen text encoders are in memory."""

    batch: int
    side: int
    tokens: int
    accumulate: int = 1
    rule: UpdateRule = UpdateRule()
    dtype: torch.dtype | None = None
    stored: torch.dtype = torch.bfloat16
    lora: int = 0
    text_encoders: bool = False
    remat: bool = False
    base: bool = False
    swapped: int = 0
    encoders: bool = True


class Memory(NamedTuple):
    """Bytes on the device: of parameters that learn and that are frozen, averages and moments, which all stay; and at
    the peak of a step of gradients and of activations, copies and temporary results."""

    learned: int
    frozen: int
    average: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


Measured = dict[tuple, list[float]]
"""Bytes per sample and image token, per sample and context token, and per sample, of width 1, by kinds of blocks."""


def memory(config: Config, choice: Choice, measured: Measured | None = None) -> Memory:
    """The memory of a step of the flow loss at its peak. measured: of earlier calls, to which this one adds."""
    names = ["transformer"]
    if choice.text_encoders:
        names += [name for name in ("clip_l", "clip_g", "t5") if getattr(config, name) is not None]
    whole = {name: SPECS[name](getattr(config, name)) for name in names}
    spec = whole
    if choice.lora:
        spec = lora.spec(whole, choice.lora, [f"{name}.blocks.*attention*" for name in names])
    learned_size = torch.float32.itemsize if choice.lora else choice.rule.weights.itemsize
    learned = specs.count(spec) * learned_size
    trainable = {path: param for path, param in specs.paths(spec).items() if param.trainable}
    gradients, activations = _peak(config, choice, trainable, learned_size, {} if measured is None else measured)
    return Memory(
        learned,
        _frozen(config, choice, names),
        learned,
        _moments(choice.rule.optimizer, trainable),
        gradients,
        activations,
    )


def _frozen(config: Config, choice: Choice, learning: list[str]) -> int:
    """Bytes of what is on the device and does not learn."""
    total = 0
    for name, make in SPECS.items():
        sizes = getattr(config, name)
        is_encoder = name in ("clip_l", "clip_g", "t5")
        if sizes is None or name == "taesd" or (is_encoder and not choice.encoders and name not in learning):
            continue
        if name not in learning:
            total += specs.count(make(sizes)) * choice.stored.itemsize
        elif choice.lora:
            total += _base(make(sizes), choice, choice.swapped if name == "transformer" else 0)
    return total


def _base(spec: Tree, choice: Choice, swapped: int) -> int:
    """Bytes of the base of a LoRA: with `base` weights of matrices in blocks of one byte, and a scale for each row."""
    size = (choice.dtype or torch.float32).itemsize
    total, depth = 0, len(spec["blocks"])
    for path, param in specs.paths(spec).items():
        parts = path.split(".")
        if "blocks" in parts and int(parts[parts.index("blocks") + 1]) >= depth - swapped:
            continue
        count = math.prod(param.shape)
        if choice.base and "blocks" in parts and path.endswith("weight") and len(param.shape) >= 2:
            total += count + param.shape[0] * size
        else:
            total += count * size
    return total


def _moments(optimizer: str, trainable: dict[str, specs.Param]) -> int:
    total = 0
    for path, param in trainable.items():
        count = math.prod(param.shape)
        if optimizer == "adamw8bit" and adam8.is_stored(param.shape):
            total += 2 * (count + 4 * math.prod(blockwise.scale_shape(param.shape, blockwise.row_block(param.shape))))
        elif optimizer == "muon" and "blocks" in path.split(".") and len(param.shape) >= 2:
            total += 4 * count
        else:
            total += 8 * count
    return total


def _peak(
    config: Config, choice: Choice, trainable: dict[str, specs.Param], size: int, measured: Measured
) -> tuple[int, int]:
    """Bytes of gradients and of all else at the moment at which a step holds most."""
    sizes = require(config, "transformer")
    batch, rule = choice.batch // choice.accumulate, choice.rule
    computed = _computed(choice).itemsize
    image, context = (choice.side // sizes.patch_size) ** 2, choice.tokens
    of_blocks = [0] * sizes.depth
    outside = 0
    for path, param in trainable.items():
        parts, count = path.split("."), math.prod(param.shape)
        if parts[0] == "transformer" and "blocks" in parts:
            of_blocks[int(parts[parts.index("blocks") + 1])] += count
        else:
            outside += count
    largest = max(math.prod(param.shape) for param in trainable.values())
    kinds = [(index in sizes.dual_attention_layers, index == sizes.depth - 1) for index in range(sizes.depth)]
    kept = {kind: _kept(sizes, choice, kind, (batch, image, context), measured) for kind in set(kinds)}
    # Copies of weights in another dtype, or dequantised ones, live as long as the activations of their block.
    is_cast = choice.base or (not choice.lora and computed != size)
    weights = [specs.count(block) * computed for block in mmdit.spec(sizes)["blocks"]]
    swaps = [index >= sizes.depth - choice.swapped for index in range(sizes.depth)]
    copies = [weight if is_cast or swap else 0 for weight, swap in zip(weights, swaps, strict=True)]
    inputs = batch * (image + context) * sizes.width * computed
    full = [kept[kind] + copy for kind, copy in zip(kinds, copies, strict=True)]
    remat = choice.remat or choice.base or choice.swapped > 0
    held = [inputs] * sizes.depth if remat else full
    # Text and its projection, latents and noise in float32 and in the dtype of the computation, embedded patches.
    around = batch * (context * sizes.context_width * (4 + computed) + 10 * sizes.in_channels * choice.side**2 * 4)
    around += batch * (image * 3 + context) * sizes.width * computed
    working = batch * (image + context) * sizes.width * 2 * computed
    grads_of = [count * size for count in of_blocks]
    accumulated = sum(grads_of) + outside * size if choice.accumulate > 1 else 0
    update = min(largest, by_leaf.PART) * 4 * (_PARTS + (_ROUNDING if rule.weights == torch.bfloat16 else 0))
    moments: list[tuple[int, int]] = []
    for current in reversed(range(sizes.depth)):
        gathered = 0 if rule.fused else sum(grads_of[current:])
        more = full[current] if remat else 0
        moments.append((gathered + accumulated, around + sum(held[: current + 1]) + more + working))
        if rule.fused:
            # A parameter is updated when much of its block's activations is free again.
            moments.append((0, around + sum(held[:current]) + inputs + more // 2 + largest * size + update))
    every = 0 if rule.fused else sum(grads_of) + outside * size
    lean = rule.optimizer == "adamw8bit" or rule.weights != torch.float32
    temporary = update if lean else 0
    if rule.optimizer == "muon":
        hidden = sum(
            math.prod(p.shape)
            for path, p in trainable.items()
            if is_hidden(path, torch.empty(p.shape, dtype=torch.float32, device="meta"))
        )
        temporary += 5 * hidden * 4
    # Parts are summed leaf by leaf.
    gathered = every if choice.accumulate == 1 else 2 * every + largest * size
    moments.append((gathered, temporary))
    return max(moments, key=sum)


_PARTS, _ROUNDING = 6, 7
"""Parts of `by_leaf.PART` numbers in float32 that an update by leaf holds at once, and random words for rounding."""
_PROBES = ((2, 64, 32), (2, 144, 32), (2, 64, 96))
"""Samples, image and context tokens of three measurements, from which the three factors follow."""


def _kept(
    sizes: mmdit.Config,
    choice: Choice,
    kind: tuple[bool, bool],
    counts: tuple[int, int, int],
    measured: Measured,
) -> int:
    """Bytes that autograd keeps of a block for its backward pass, parameters not counted; counts: samples, tokens of
    the image and of the context."""
    name = (kind, sizes.head_dim, sizes.qk_norm, _computed(choice), choice.lora)
    if name not in measured:
        small = replace(sizes, heads=2)
        rows = torch.tensor([[b * i, b * c, b] for b, i, c in _PROBES], dtype=torch.float64, device="cpu")
        kept = [_measured(small, choice, *kind, *probe) for probe in _PROBES]
        sums = torch.tensor(kept, dtype=torch.float64, device="cpu")
        measured[name] = (torch.linalg.solve(rows, sums) / small.width).tolist()
    batch, image, context = counts
    per_image, per_context, per_sample = measured[name]
    return int(batch * (image * per_image + context * per_context + per_sample) * sizes.width)


def _computed(choice: Choice) -> torch.dtype:
    return choice.dtype or (torch.float32 if choice.lora else choice.rule.weights)


def _measured(sizes: mmdit.Config, choice: Choice, dual: bool, last: bool, batch: int, image: int, context: int) -> int:
    dtype = _computed(choice)
    spec = joint_block.spec(sizes.width, sizes.head_dim, qk_norm=sizes.qk_norm, dual=dual, last=last)
    nested = {"transformer": {"blocks": [spec]}}
    params = tree.cast(specs.init(prng.key(0), nested), dtype)
    learned: Params = params
    if choice.lora:
        learned = specs.init(prng.key(1), lora.spec(nested, choice.lora, "*.blocks.*attention*"))
    learned = tree.map(lambda leaf: leaf.requires_grad_(), learned)
    block = (lora.apply(params, learned, lazy=True) if choice.lora else learned)["transformer"]["blocks"][0]
    own = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves([params, learned])}
    saved: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    def stream(tokens: int) -> Tensor:
        return torch.zeros(batch, tokens, sizes.width, dtype=dtype, device="cpu").requires_grad_()

    streams = {"image": stream(image), "context": stream(context)}
    # What the modulations are computed from learns with the transformer, not with a LoRA of its attentions.
    condition = torch.zeros(batch, sizes.width, dtype=dtype, device="cpu").requires_grad_(not choice.lora)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        joint_block.apply(block, sizes.heads, streams, condition)
    return sum(saved.values())
