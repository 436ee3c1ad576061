"""Memory of a training step, from the specs of a model alone, of one process of a mesh.

Parameters, gradients, moments and averages are counted, by the layouts of the mesh. The memory that autograd keeps of
blocks is measured on small ones (`activations`). The backward pass is then followed block by block, since gradients
grow while activations are freed, and blocks are gathered and their gradients sent.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from functional_sd3 import lora
from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.core.spec import Param
from functional_sd3.core.types import Tree
from functional_sd3.layouts.components import SPECS, Config, require
from functional_sd3.parallel import sharding
from functional_sd3.parallel.mesh import BATCH_AXES, ONE_PROCESS, Mesh
from functional_sd3.training import division
from functional_sd3.training import step_segments as segments
from functional_sd3.training.activations import Measured
from functional_sd3.training.memory_choice import Choice
from functional_sd3.training.optim import adam8, blockwise, by_leaf
from functional_sd3.training.step_segments import Segment
from functional_sd3.training.update_rule import is_hidden
from functional_sd3.transformer import controlnet


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


def memory(config: Config, choice: Choice, measured: Measured | None = None) -> Memory:
    """The memory of a step of one process at its peak. measured: of earlier calls, to which this one adds."""
    spec, is_divided = _learned(config, choice)
    local = _local(spec, choice.mesh if is_divided else ONE_PROCESS)
    size = torch.float32.itemsize if choice.is_base_frozen else choice.rule.weights.itemsize
    learned = sum(map(math.prod, local.values())) * size
    chosen = "vae.decoder." if choice.decoder_only else ""
    trainable = {
        path: local[path] for path, param in specs.paths(spec).items() if param.trainable and path.startswith(chosen)
    }
    if choice.autoencoder:
        parts, held = segments.of_autoencoder(config, choice, spec, trainable, size)
    else:
        parts = segments.of_blocks(config, choice, spec, trainable, size, {} if measured is None else measured)
        held = segments.around(config, choice, size)
    gradients, working = _peak(choice, parts, held, trainable, size, is_divided)
    moments = _moments(choice.rule.optimizer, trainable)
    return Memory(learned, _frozen(config, choice), learned, moments, gradients, working)


def _learned(config: Config, choice: Choice) -> tuple[Tree, bool]:
    """Spec of what learns, of a process's part over "tensor", and whether it is divided over "fsdp" too."""
    if choice.autoencoder:
        return {"vae": SPECS["vae"](require(config, "vae"))}, True
    if choice.control:
        return {"controlnet": controlnet.spec(choice.control)}, True
    names = segments.in_loss(config, choice)
    if not choice.is_base_frozen:
        return {name: division.part_spec(name, getattr(config, name), choice.mesh) for name in names}, True
    spec: Tree = {}
    if choice.lora:
        adapted = names if choice.text_encoders else ["transformer"]
        whole = {name: SPECS[name](getattr(config, name)) for name in adapted}
        spec = lora.spec(whole, choice.lora, [f"{name}.blocks.*attention*" for name in adapted])
        spec = division.adapter_spec(spec, config, choice.mesh)[0]
    if choice.word:
        shapes = {name: (count, getattr(config, name).width) for name, count in choice.word.items()}
        vectors = {name: Param(shape, specs.zeros, ("vocab", "width")) for name, shape in shapes.items()}
        spec = {**spec, "word": vectors}
    return spec, False


def _local(spec: Tree, mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """Shapes of a process's part of leaves by their paths."""
    placements = tree.flatten_paths(sharding.layout(spec, mesh))
    return {path: placement.local_shape(mesh) for path, placement in placements.items()}


def _frozen(config: Config, choice: Choice) -> int:
    """Bytes of what is on the device and does not learn."""
    total, in_loss = 0, [] if choice.autoencoder else segments.in_loss(config, choice)
    for name, make in SPECS.items():
        sizes = getattr(config, name)
        if sizes is None or name == "taesd" or (choice.autoencoder and name == "vae"):
            continue
        if choice.autoencoder or (name in segments.ENCODERS and not choice.encoders and name not in in_loss):
            continue
        if name not in in_loss:
            total += specs.count(make(sizes)) * choice.stored.itemsize
        elif choice.is_base_frozen:
            # The encoders of a word stay whole, as their tables get rows.
            mesh = ONE_PROCESS if name in choice.word else choice.mesh
            swapped = choice.swapped if name == "transformer" else 0
            total += _base(division.part_spec(name, sizes, mesh), choice, swapped, mesh)
    return total


def _base(spec: Tree, choice: Choice, swapped: int, mesh: Mesh) -> int:
    """Bytes of what is frozen in the loss: with `base` weights of matrices in blocks of one byte, and a scale for each
    row."""
    size = choice.computed.itemsize
    total, depth = 0, len(spec["blocks"])
    for path, shape in _local(spec, mesh).items():
        block = segments.block_of(path)
        if block is not None and block >= depth - swapped:
            continue
        if choice.base and block is not None and path.endswith("weight") and len(shape) >= 2:
            total += math.prod(shape) + shape[0] * size
        else:
            total += math.prod(shape) * size
    return total


def _moments(optimizer: str, trainable: Mapping[str, tuple[int, ...]]) -> int:
    total = 0
    for path, shape in trainable.items():
        count = math.prod(shape)
        if optimizer == "adamw8bit" and adam8.is_stored(shape):
            total += 2 * (count + 4 * math.prod(blockwise.scale_shape(shape, blockwise.row_block(shape))))
        elif optimizer == "muon" and segments.block_of(path) is not None and len(shape) >= 2:
            total += 4 * count
        else:
            total += 8 * count
    return total


def _peak(
    choice: Choice,
    parts: list[Segment],
    around: tuple[int, int],
    trainable: Mapping[str, tuple[int, ...]],
    size: int,
    is_divided: bool,
) -> tuple[int, int]:
    """Bytes of gradients and of all else at the moment at which a step holds most."""
    rule, (held, forward) = choice.rule, around
    largest = max(map(math.prod, trainable.values()))
    total = sum(map(math.prod, trainable.values())) * size
    accumulated = total if choice.accumulate > 1 else 0
    update = min(largest, by_leaf.PART) * 4 * (_PARTS + (_ROUNDING if rule.weights == torch.bfloat16 else 0))
    stays = [segment.stays for segment in parts]
    moments: list[tuple[int, int]] = [(accumulated, held + forward + sum(stays))]
    for number in reversed(range(len(parts))):
        segment = parts[number]
        later = sum(each.gradients for each in parts[number + 1 :])
        own = 0 if segment.sent else segment.gradients
        gathered = 0 if rule.fused else later + own
        moments.append((gathered + accumulated, held + sum(stays[: number + 1]) + segment.works))
        moments.append((gathered + accumulated, held + sum(stays[:number]) + segment.sent))
        if rule.fused:
            # A parameter is updated when much of its block's activations is free again.
            freed = held + sum(stays[:number]) + segment.works // 2
            moments.append((0, freed + largest * size + update))
    every = 0 if rule.fused else total
    lean = rule.optimizer == "adamw8bit" or rule.weights != torch.float32
    temporary = update if lean else 0
    if rule.optimizer == "muon":
        temporary += 5 * 4 * sum(
            math.prod(shape) for path, shape in trainable.items()
            if is_hidden(path, torch.empty(shape, dtype=torch.float32, device="meta"))
        )  # fmt: skip
    # Parts are summed leaf by leaf.
    gathered = every if choice.accumulate == 1 else 2 * every + largest * size
    moments.append((gathered, temporary))
    moments.append((every, _summing(choice.mesh, every, size, is_divided)))
    return max(moments, key=sum)


def _summing(mesh: Mesh, gradients: int, size: int, is_divided: bool) -> int:
    """Bytes of a sum of gradients over processes, at most `sharding.BUCKET` numbers at once: what is sent, what comes
    back, which gloo holds twice, and the sum of a part."""
    axes = ("data",) if is_divided and mesh.size("fsdp") > 1 else BATCH_AXES
    count = mesh.size(*axes)
    return 0 if count == 1 else int(min(gradients, sharding.BUCKET * size) * (3 + 1 / count))


_PARTS, _ROUNDING = 6, 7
"""Parts of `by_leaf.PART` numbers in float32 that an update by leaf holds at once, and random words for rounding."""
