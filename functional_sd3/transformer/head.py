"""Inputs of the blocks that the transformer and its ControlNets compute alike: embedded context and modulations."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core.checks import check_floating
from functional_sd3.core.types import Params, Tree
from functional_sd3.parallel.transport import Group
from functional_sd3.transformer import joint_block
from functional_sd3.transformer.checks import check_shape, check_times


def embed_context(params: Params, width: int, context: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """The layer "context" of params applied to context (batch, tokens, width), in `dtype`: (batch, tokens, hidden)."""
    check_floating("context", context)
    check_shape("context", context, "(batch, tokens, width)", (batch, None, width))
    return layers.linear(params["context"], context.to(dtype))


def modulate_blocks(blocks: Iterable[Params], condition: Tensor, tensor_group: Group = None) -> list[Tree]:
    """Modulations (adaLN-Zero, Peebles and Xie 2023) of each stream of each block:

    condition: `embed_condition`. Returns for each block {stream: ([steps,] batch, n * width)}.
    """
    return [joint_block.modulate(block, condition, tensor_group) for block in blocks]


def resolve_modulations(
    modulations: Tree | None,
    compute: Callable[[Tensor, Tensor], Tree],
    t: Tensor | None,
    pooled: Tensor | None,
    batch: int,
) -> Tree:
    """The given modulations, or `compute(t, pooled)`, which may have conditioning vectors in their place.

    Raises ValueError without modulations and one of t and pooled, and for modulations of another batch or of several
    steps at once.
    """
    if modulations is None:
        if t is None or pooled is None:
            raise ValueError("apply needs t and pooled, or the modulations computed from them")
        check_times(t, batch)
        modulations = compute(t, pooled)
    block = modulations["blocks"][0]
    leaf = block if isinstance(block, Tensor) else block["image"]
    if leaf.ndim == 3:
        raise ValueError(f"modulations of {leaf.shape[0]} steps at once: take one step out with `mmdit.at`")
    if leaf.shape[0] not in (1, batch):
        raise ValueError(f"modulations of a batch of {leaf.shape[0]} do not fit latents with a batch of {batch}")
    return modulations
