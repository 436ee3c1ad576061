"""Attention in bfloat16 on CPUs by oneDNN's products, where PyTorch's fused kernel, which has MKL multiply, is slower.

oneDNN rounds scores to bfloat16, whose error grows with the scores. So what is rounded is not the score but its
distance from nearly the largest of its row: softmax is the same, and the weights that count are of small distances,
which bfloat16 holds well. The largest score of every `SAMPLED`th key is near enough, at a sixteenth of a product.
The error of the output for 589 tokens, PyTorch's / by plain scores / so: 2.2e-3 / 4.4e-3 / 3.0e-3 for standard normal
queries and keys, 1.5e-3 / 1.8e-2 / 6.1e-3 for both 4 times as large.
"""

import torch
from torch import Tensor

from functional_sd3.kernels import products

SAMPLED = 16
SCORES = 1 << 19
"""Scores of a thread at once: 1 MiB, a core's cache. 1 << 18 takes 1.1 times as long for 1,357 tokens, 1 << 20 as
long."""
MIN_ROWS = 64
SMALLEST = 1 << 19
"""Least rows x keys x heads x batch, beyond which a call's overhead is small."""


def fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> bool:
    """Bfloat16 on a CPU of whose products oneDNN's are faster, without a mask."""
    return (
        products.CHOICE.attention
        and mask is None
        and not causal
        and all(x.ndim == 4 and x.is_cpu and x.dtype is torch.bfloat16 for x in (query, key, value))
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[:3].numel() * key.shape[2] >= SMALLEST
        and products.is_enabled()
    )


def untracked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`softmax_attention` in blocks of heads and rows; laid out in memory as (batch, tokens, heads, head_dim)."""
    batch, heads, tokens, _ = query.shape
    keys = key.shape[2]
    out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    rows = min(tokens, max(MIN_ROWS, SCORES // keys))
    together = min(heads, max(1, SCORES // (rows * keys)) * torch.get_num_threads())
    scores = query.new_empty(together * rows * keys)
    for sample in range(batch):
        for first in range(0, heads, together):
            own = (sample, slice(first, first + together))
            _attend(query[own], key[own], value[own], scale, rows, scores, out[own])
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, rows: int, scores: Tensor, out: Tensor) -> None:
    """Attention of some heads, each (heads, tokens, head_dim), into `out`; `scores`: memory for those of `rows`."""
    keys, sampled = key.mT, key[:, ::SAMPLED].contiguous().mT
    zero = query.new_zeros(1, 1, 1)
    for start in range(0, query.shape[1], rows):
        part = query[:, start : start + rows]
        weights = scores[: part.shape[0] * part.shape[1] * key.shape[1]].view(*part.shape[:2], key.shape[1])
        # Via float32, which PyTorch reduces in half the time.
        lowest = torch.baddbmm(zero, part, sampled, beta=0, alpha=-scale).float().amin(-1, keepdim=True).to(part.dtype)
        torch.baddbmm(lowest, part, keys, alpha=scale, out=weights)
        torch.softmax(weights, -1, out=weights)
        out[:, start : start + rows] = torch.bmm(weights, value)
