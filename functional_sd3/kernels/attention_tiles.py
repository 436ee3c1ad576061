"""Derivatives of attention tile by tile: tensors in, fresh contiguous tensors out, no autograd, linear memory.

q (batch, heads, tokens, head_dim), k and v (batch, heads, others, head_dim); mask, additive, of four dimensions, any of
them 1, or None. With P = softmax(scale q k^T + mask), o = P v, g the cotangent of o, dx the gradient in x, x' the
tangent of x, * the product of elements, and rowsum keeping its dimension:

    S' = scale (q' k^T + q k'^T) + mask'               tangent of the scores
    o' = (P * S') v - rowsum(P * S') o + P v'          tangent of attention
    G  = g v^T - rowsum(g * o),  dS = P * G            FlashAttention's backward pass
    P' = P * (S' - rowsum(P * S'))
    X  = P' * G + P * (g' v^T + g v'^T)
    dS' = X - P rowsum(X)                              tangents of the gradients
    dq' = scale (dS' k + dS k')
    dk' = scale (dS'^T q + dS^T q')
    dv' = P'^T g + P^T g'
    dmask' = dS'

dS: Dao et al. 2022, "FlashAttention" (arXiv:2205.14135), appendix B. o': Lu and Song 2024, "Simplifying, Stabilizing
and Scaling Continuous-Time Consistency Models" (arXiv:2410.11081), appendix F. The tangents of the gradients follow by
differentiating both. A tile has all keys of its rows, so its softmax is complete; unlike the fused kernels these need
no logarithms of its sums.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import attention

TILE_SCORES = 1 << 19
"""Scores of a tile: 2 MiB of float32. The tangent of 8 heads of 64 at 4,096 tokens takes 1.64 s in tiles of 2^18, 1.41
in tiles of 2^19, 1.31 in tiles of 2^20 (one thread of an AMD EPYC with 1 MiB of cache a core), in memory as large."""


class Part(NamedTuple):
    """Position of a tile in the scores (batch * heads, tokens, others)."""

    heads: slice
    rows: slice
    keys: slice


class Tiles:
    """The scores of an attention: some heads, some rows and all keys, or with `causal` all that these rows see.

    Operands are (batch * heads, tokens, head_dim), at least float32.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float):
        self.batch_heads = q.shape[:2]
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = self.flat(q), self.flat(k), self.flat(v)
        self.causal, self.scale = causal, scale
        self.mask = None if mask is None else self.flat_mask(mask)
        self.blind = None if self.mask is None else _blind_rows(self.mask)

    def flat(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *x.shape[2:]).to(self.dtype)

    def flat_mask(self, mask: Tensor) -> Tensor:
        """(1 or batch * heads, 1 or tokens, 1 or others)"""
        mask = mask if mask.shape[:2] == (1, 1) else mask.expand(*self.batch_heads, *mask.shape[2:])
        return mask.reshape(-1, *mask.shape[2:]).to(self.dtype)

    def __iter__(self) -> Iterator[Part]:
        """Many rows of few heads, in large products; all rows of a head in turn, whose keys then stay in the cache."""
        heads, tokens, others = len(self.q), self.q.shape[1], self.k.shape[1]
        rows_at_once = min(tokens, max(attention.MIN_ROWS, TILE_SCORES // max(1, others)))
        heads_at_once = max(1, TILE_SCORES // max(1, rows_at_once * others))
        for head in range(0, heads, heads_at_once):
            for row in range(0, tokens, rows_at_once):
                stop = min(row + rows_at_once, tokens)
                seen = min(stop, others) if self.causal else others
                yield Part(slice(head, head + heads_at_once), slice(row, stop), slice(0, seen))

    def probabilities(self, part: Part) -> Tensor:
        """P"""
        scores = _scaled_product(self.q[part.heads, part.rows], self.k[part.heads, part.keys].mT, self.scale)
        if self.mask is not None:
            scores += of_part(self.mask, part)
        if self.causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            scores.masked_fill_(future.triu_(1 + part.rows.start), -math.inf)
        weights = torch.softmax(scores, -1)
        return weights if self.blind is None else weights.masked_fill_(of_part(self.blind, part), 0.0)


class ScoreTangent:
    """S', tile by tile, of the tangents of q, k and the mask, each None where it does not vary."""

    def __init__(self, tiles: Tiles, q_tangent: Tensor | None, k_tangent: Tensor | None, mask_tangent: Tensor | None):
        self.scale = tiles.scale
        self.mask = None if mask_tangent is None else tiles.flat_mask(mask_tangent)
        self.q_tangent = None if q_tangent is None else tiles.flat(q_tangent)
        self.k_tangent = None if k_tangent is None else tiles.flat(k_tangent)
        pairs = [(self.q_tangent, tiles.k), (tiles.q, self.k_tangent)]
        self.pairs = [(left, right) for left, right in pairs if left is not None and right is not None]
        self.heads, self.keys = slice(0, 0), tiles.k[:0]

    def __call__(self, part: Part, scores: Tensor) -> Tensor | None:
        """S' of a tile, like `scores`; None where no score varies."""
        tangent = None
        if self.pairs:
            # Both products as one, [q', q] [k, k']^T; joined for these heads, as all would be four times the inputs.
            if part.heads != self.heads:
                self.heads, self.keys = part.heads, torch.cat([right[part.heads] for _, right in self.pairs], -1)
            left = torch.cat([left[part.heads, part.rows] for left, _ in self.pairs], -1)
            tangent = _scaled_product(left, self.keys[:, part.keys].mT, self.scale)
        if self.mask is not None:
            mask = of_part(self.mask, part)
            tangent = mask.expand(scores.shape).clone() if tangent is None else tangent.add_(mask)
        return tangent


def tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    mask_tangent: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """o', the tangent of attention along those of its inputs, None for those that do not vary."""
    tiles = Tiles(q, k, v, mask, causal, scale)
    score_tangent, outputs = ScoreTangent(tiles, q_tangent, k_tangent, mask_tangent), tiles.flat(o)
    v_tangent = None if v_tangent is None else tiles.flat(v_tangent)
    result = torch.zeros_like(outputs)
    for part in tiles:
        p = tiles.probabilities(part)
        weighted = score_tangent(part, p)
        rows = None
        if weighted is not None:
            rows = torch.bmm(weighted.mul_(p), tiles.v[part.heads, part.keys])
            rows.addcmul_(weighted.sum(-1, keepdim=True), outputs[part.heads, part.rows], value=-1)
        if v_tangent is not None:
            moving = v_tangent[part.heads, part.keys]
            rows = torch.bmm(p, moving) if rows is None else rows.baddbmm_(p, moving)
        if rows is not None:
            result[part.heads, part.rows] = rows
    return result.view(o.shape).to(o.dtype)


def gradients_tangent(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    g_tangent: Tensor | None,
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    mask_tangent: Tensor | None,
    causal: bool,
    scale: float,
    of_mask: bool,
) -> list[Tensor]:
    """dq', dk', dv' and, if `of_mask`, dmask': tangents of the gradients for the cotangent g, itself of tangent g'."""
    tiles = Tiles(q, k, v, mask, causal, scale)
    score_tangent = ScoreTangent(tiles, q_tangent, k_tangent, mask_tangent)
    cotangent, outputs = tiles.flat(g), tiles.flat(o)
    q_tangent, k_tangent = score_tangent.q_tangent, score_tangent.k_tangent
    g_tangent, v_tangent = (None if x is None else tiles.flat(x) for x in (g_tangent, v_tangent))
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (tiles.q, tiles.k, tiles.v))
    grad_mask = torch.zeros_like(tiles.mask) if of_mask and tiles.mask is not None else None
    for part in tiles:
        heads, rows, keys = part
        p = tiles.probabilities(part)
        row_g = cotangent[heads, rows]
        centred = _centred_gradient(tiles, part, row_g, outputs)
        x = None
        if g_tangent is not None:
            x = torch.bmm(g_tangent[heads, rows], tiles.v[heads, keys].mT)
            grad_v[heads, keys].baddbmm_(p.mT, g_tangent[heads, rows])
        if v_tangent is not None:
            product = torch.bmm(row_g, v_tangent[heads, keys].mT)
            x = product if x is None else x.add_(product)
        if x is not None:
            x.mul_(p)
        dp = score_tangent(part, p)
        if dp is not None:
            dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p)
            grad_v[heads, keys].baddbmm_(dp.mT, row_g)
            x = dp.mul_(centred) if x is None else x.addcmul_(dp, centred)
        if x is None:
            continue
        dscores = x.addcmul_(p, x.sum(-1, keepdim=True), value=-1)
        grad_q[heads, rows].baddbmm_(dscores, tiles.k[heads, keys], alpha=scale)
        grad_k[heads, keys].baddbmm_(dscores.mT, tiles.q[heads, rows], alpha=scale)
        if grad_mask is not None:
            _add_to_mask(grad_mask, part, dscores)
        if q_tangent is not None or k_tangent is not None:
            centred.mul_(p)
        if k_tangent is not None:
            grad_q[heads, rows].baddbmm_(centred, k_tangent[heads, keys], alpha=scale)
        if q_tangent is not None:
            grad_k[heads, keys].baddbmm_(centred.mT, q_tangent[heads, rows], alpha=scale)
    gradients = [x.view(like.shape).to(like.dtype) for x, like in ((grad_q, q), (grad_k, k), (grad_v, v))]
    return gradients if grad_mask is None or mask is None else [*gradients, _sum_to_mask(grad_mask, q, mask)]


def mask_gradient(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, o: Tensor, causal: bool, scale: float
) -> Tensor:
    """dS summed to the mask's shape, which no fused kernel of a CPU gives."""
    tiles = Tiles(q, k, v, mask, causal, scale)
    cotangent, outputs = tiles.flat(g), tiles.flat(o)
    grad_mask = torch.zeros_like(tiles.flat_mask(mask))
    for part in tiles:
        centred = _centred_gradient(tiles, part, cotangent[part.heads, part.rows], outputs)
        _add_to_mask(grad_mask, part, centred.mul_(tiles.probabilities(part)))
    return _sum_to_mask(grad_mask, q, mask)


def of_part(mask: Tensor, part: Part) -> Tensor:
    """A flat mask in a tile; dimensions of 1 stay so."""
    slices = [chosen if size > 1 else slice(None) for size, chosen in zip(mask.shape, part, strict=True)]
    return mask[tuple(slices)]


def _centred_gradient(tiles: Tiles, part: Part, row_g: Tensor, outputs: Tensor) -> Tensor:
    """G"""
    product = torch.bmm(row_g, tiles.v[part.heads, part.keys].mT)
    return product.sub_((row_g * outputs[part.heads, part.rows]).sum(-1, keepdim=True))


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _blind_rows(mask: Tensor) -> Tensor | None:
    """True for the rows that may attend to nothing, (.., 1); None where every row has a key."""
    blind = (mask == -math.inf).all(-1, keepdim=True)
    return blind if blind.any() else None


def _add_to_mask(grad_mask: Tensor, part: Part, scores: Tensor) -> None:
    target = of_part(grad_mask, part)
    target.add_(scores.sum_to_size(target.shape))


def _sum_to_mask(grad_mask: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    """A flat mask's gradient, in the mask's shape."""
    batch_heads = (1, 1) if len(grad_mask) == 1 else q.shape[:2]
    return grad_mask.view(*batch_heads, *grad_mask.shape[1:]).sum_to_size(mask.shape).to(mask.dtype)
