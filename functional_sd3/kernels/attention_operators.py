"""The functions of `attention_tiles` as operators of PyTorch: one node of a compiled graph instead of an unrolled loop.

Only the functions of `attention_functions` call them, below autograd.
"""

from torch import Tensor

from functional_sd3.kernels import attention_tiles
from functional_sd3.kernels.operators import define


def _like_gradients(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object) -> list[Tensor]:
    inputs = [q, k, v] if mask is None or not rest[-1] else [q, k, v, mask]
    return [x.new_empty(x.shape) for x in inputs]


tangent = define(
    "attention_tangent",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor o, Tensor? q_tangent, Tensor? k_tangent, Tensor? v_tangent, "
    "Tensor? mask_tangent, bool causal, float scale) -> Tensor",
    attention_tiles.tangent,
    lambda q, k, v, mask, o, *_: o.new_empty(o.shape),
)
gradients_tangent = define(
    "attention_gradients_tangent",
    "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor o, Tensor? g_tangent, Tensor? q_tangent, "
    "Tensor? k_tangent, Tensor? v_tangent, Tensor? mask_tangent, bool causal, float scale, bool of_mask) -> Tensor[]",
    attention_tiles.gradients_tangent,
    _like_gradients,
)
mask_gradient = define(
    "attention_mask_gradient",
    "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor mask, Tensor o, bool causal, float scale) -> Tensor",
    attention_tiles.mask_gradient,
    lambda g, q, k, v, mask, *_: mask.new_empty(mask.shape),
)
