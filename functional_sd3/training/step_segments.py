"""A training step as segments: blocks in the order of the forward pass, with the bytes that each has in memory when.

`estimate.memory` follows them backwards.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from functional_sd3.core import spec as specs
from functional_sd3.core.types import Tree
from functional_sd3.layouts.components import SPECS, Config, require
from functional_sd3.text import clip
from functional_sd3.training import activations, division
from functional_sd3.training.activations import Kind, Measured
from functional_sd3.training.memory_choice import Choice

ENCODERS = ("clip_l", "clip_g", "t5")


class Segment(NamedTuple):
    """A block, in the order of the forward pass, in bytes. stays: from its forward pass to its backward pass; works:
    what its backward pass has besides; gradients: of this process's part; sent: while the gradients of a block that is
    divided are put together and sent."""

    stays: int
    works: int
    gradients: int
    sent: int = 0


def in_loss(config: Config, choice: Choice) -> list[str]:
    """Components that learn, or are frozen in the loss."""
    with_text = choice.text_encoders or bool(choice.word)
    return ["transformer", *(name for name in ENCODERS if with_text and getattr(config, name) is not None)]


def block_of(path: str) -> int | None:
    """The number of the block that a leaf is in."""
    parts = path.split(".")
    return int(parts[parts.index("blocks") + 1]) if "blocks" in parts else None


def of_blocks(
    config: Config,
    choice: Choice,
    spec: Tree,
    trainable: Mapping[str, tuple[int, ...]],
    size: int,
    measured: Measured,
) -> list[Segment]:
    """The blocks of the encoders through which gradients flow, of a ControlNet, and of the transformer."""
    sizes, samples = require(config, "transformer"), choice.samples
    mesh, computed = choice.mesh, choice.computed.itemsize
    image = -(-((choice.side // sizes.patch_size) ** 2) // mesh.size("sequence"))
    segments: list[Segment] = []

    def add(name: str, blocks: Tree, kept: int, number: int, inputs: int) -> None:
        whole = specs.count(blocks[number])
        learned = [shape for path, shape in trainable.items() if path.startswith(f"{name}.blocks.{number}.")]
        segments.append(_segment(choice, name, number, len(blocks), kept, inputs, whole, learned, size))

    for name in in_loss(config, choice)[1:]:
        encoder = getattr(config, name)
        tokens = encoder.length if isinstance(encoder, clip.Config) else _t5_tokens(config, choice)
        flows = not choice.word or name in choice.word
        kept = activations.of_encoder_block(encoder, samples, tokens, choice.computed) if flows else 0
        blocks = SPECS[name](encoder)["blocks"]
        for number in range(len(blocks)):
            add(name, blocks, kept, number, samples * tokens * encoder.width * computed if flows else 0)

    def add_joint(name: str, sizes: Any, blocks: Tree, learns: Literal["parameters", "lora", "nothing"]) -> None:
        inputs = samples * (image + choice.tokens) * sizes.width * computed
        for number in range(len(blocks)):
            kind = Kind(
                number in sizes.dual_attention_layers,
                "mlp" not in blocks[number]["context"],
                learns,
                choice.lora,
                # The embeddings of time and pooled text learn with the transformer, not with a LoRA of its attentions.
                learns == "parameters" or bool(choice.word) or choice.text_encoders,
                choice.computed,
                mesh.size("sequence") if name == "transformer" else 1,
                mesh.size("tensor"),
            )
            kept = activations.of_block(sizes, kind, (samples, image, choice.tokens), measured)
            # Before the first residual of a ControlNet nothing that learns is read.
            flows = not (choice.control and name == "transformer" and number == 0)
            add(name, blocks, kept if flows else 0, number, inputs if flows else 0)

    if choice.control:
        add_joint("controlnet", choice.control, spec["controlnet"]["blocks"], "parameters")
    learns: Literal["parameters", "lora", "nothing"] = (
        "lora" if choice.lora else "nothing" if choice.is_base_frozen else "parameters"
    )
    add_joint("transformer", sizes, division.part_spec("transformer", sizes, mesh)["blocks"], learns)
    return segments


def _t5_tokens(config: Config, choice: Choice) -> int:
    return choice.tokens - (config.clip_l.length if config.clip_l else config.clip_g.length if config.clip_g else 0)


def _segment(
    choice: Choice,
    name: str,
    number: int,
    depth: int,
    kept: int,
    inputs: int,
    whole: int,
    learned: list[tuple[int, ...]],
    size: int,
) -> Segment:
    """A block of `whole` numbers. kept: bytes that autograd keeps of it; learned: shapes of the own parts of leaves."""
    computed, count = choice.computed.itemsize, sum(map(math.prod, learned))
    is_base = choice.is_base_frozen and name != "controlnet"
    swaps = is_base and name == "transformer" and number >= depth - choice.swapped
    is_gathered = choice.mesh.size("fsdp") > 1 and name not in choice.word
    # Copies of weights in another dtype, dequantised or swapped ones live as long as the activations of their block.
    is_cast = swaps or (choice.base if is_base else computed != size)
    copies = whole * computed if is_cast else 0
    stored = (1 if choice.base else computed) if is_base else size
    gathered = whole * stored if is_gathered else 0
    remat = choice.remat or choice.base or choice.swapped > 0
    # Parameters that are materialised for a block are so again in its backward pass.
    is_kept = not remat and not is_gathered and not swaps
    stays = inputs if remat else kept + (copies if is_kept else 0)
    works = (kept if remat else 0) + (0 if is_kept else copies) + gathered
    sent = whole * size * 2 + count * size if is_gathered and count and not is_base else 0
    return Segment(stays, works, count * size, sent)


def around(config: Config, choice: Choice, size: int) -> tuple[int, int]:
    """Bytes of what is held besides blocks through forward and backward pass, and at the end of the forward pass."""
    sizes, computed = require(config, "transformer"), choice.computed.itemsize
    image, samples = (choice.side // sizes.patch_size) ** 2, choice.samples
    # Text and its projection, latents and noise in float32 and in the dtype of the computation, embedded patches.
    total = samples * (
        choice.tokens * sizes.context_width * (4 + computed) + 10 * sizes.in_channels * choice.side**2 * 4
    )
    total += samples * (image * 3 + choice.tokens) * sizes.width * computed
    forward = 0
    if choice.mesh.size("fsdp") > 1:
        # Parameters outside of blocks are gathered for the whole pass; the backward pass does not read the table of
        # positions.
        rest = [p for path, p in specs.paths(SPECS["transformer"](sizes)).items() if block_of(path) is None]
        stored = computed if choice.is_base_frozen else size
        total += sum(math.prod(p.shape) for p in rest if p.trainable) * stored
        forward = sum(math.prod(p.shape) for p in rest if not p.trainable) * stored
    if choice.control:
        # The residuals.
        total += samples * image * sizes.width * computed * choice.control.depth
    own = -(-image // choice.mesh.size("sequence"))
    working = samples * (own + choice.tokens) * sizes.width * 2 * computed
    return total + working, forward


def of_autoencoder(
    config: Config, choice: Choice, spec: Tree, trainable: Mapping[str, tuple[int, ...]], size: int
) -> tuple[list[Segment], tuple[int, int]]:
    """The autoencoder as one block, and what is held beside it: three of its largest activations."""
    sizes = require(config, "vae")
    kept = activations.of_autoencoder(
        sizes, choice.samples, choice.side, choice.dtype, decoder_only=choice.decoder_only
    )
    whole = specs.count(spec) * size if choice.mesh.size("fsdp") > 1 else 0
    copies = specs.count(spec) * choice.computed.itemsize if choice.computed.itemsize != size else 0
    gradients = sum(map(math.prod, trainable.values())) * size
    largest = choice.samples * choice.side**2 * sizes.channels[0] * choice.computed.itemsize
    return [Segment(kept + copies + whole, 0, gradients, 2 * whole)], (3 * largest, 0)
