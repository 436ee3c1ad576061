"""Kernels of `core.attention.softmax_attention`: PyTorch's fused ones, and those with every derivative."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from functional_sd3.kernels import attention_functions, attention_fused

fits = attention_fused.fits


def untracked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`softmax_attention` as PyTorch computes it, on any device."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)


def fits_always(*_: Any) -> bool:
    """True: any arguments of `softmax_attention`."""
    return True


def differentiable(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """`softmax_attention` by the functions of `attention_functions`."""
    return attention_functions.attention(query, key, value, mask, causal, scale)


def in_graph(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`differentiable` as one call in a compiled graph. A compiler that read it would ignore the functions' rules."""
    # Imported while a compiler traces: the mark that it sets imports the compiler.
    from functional_sd3.kernels import graph_calls

    return graph_calls.attention(query, key, value, mask, causal, scale)
