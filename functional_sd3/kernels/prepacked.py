"""Pre-packed weights of linear layers: in the order in which oneDNN multiplies by them, on CPUs.

oneDNN reads a weight in blocks. Of a plain weight it makes these in every product; of a pre-packed one they are there,
once, in a tensor of the same shape and dtype whose memory only oneDNN reads ("mkldnn" is its layout). The product is
the same to the bit. oneDNN / the same, pre-packed, on a Zen 4, 1 thread, float32: 1.09 for 512 rows of 512 -> 1,536,
1.05 of 512 -> 2,048, 1.03 of 2,048 -> 512; for 96 rows 1.1 to 1.2; in bfloat16 1.06, 1.05, 1.02 and 1.03 to 1.2.

Under autograd and transforms the plain weight is made for each product. A compiler knows nothing of this layout.
"""

import torch
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core.dispatch import private
from functional_sd3.core.types import Params
from functional_sd3.kernels import onednn, products
from functional_sd3.kernels.operators import define

_reorder = private("torch.ops.mkldnn._reorder_linear_weight", torch.ones(2, 2, dtype=torch.float32, device="cpu"))


def fits_pack(params: Params) -> bool:
    """True for a layer of weight and bias that oneDNN multiplies by faster, however many the rows, than other ways.

    Float32 on processors of which `products` says so for all rows; bfloat16, whose products are oneDNN's in any case.
    """
    weight = params.get("weight")
    if params.keys() != {"weight", "bias"} or not isinstance(weight, Tensor) or weight.ndim != 2 or weight.is_mkldnn:
        return False
    if not weight.is_cpu or weight.numel() < onednn.SMALLEST_WEIGHT or _reorder is None or not products.is_enabled():
        return False
    if weight.dtype is torch.bfloat16:
        return onednn.has_bfloat16()
    return weight.dtype is torch.float32 and products.CHOICE.rows.stop == products.ANY


def pack(params: Params) -> Tensor:
    """`layers.packed_weight`: of the shape and dtype of the weight, pre-packed."""
    return _reorder(params["weight"])


# An operator of its own, since `to_dense` of such a tensor fails under transforms.
unpack = define(
    "unpack", "(Tensor weight) -> Tensor", lambda weight: weight.to_dense(), lambda weight: torch.empty_like(weight)
)
"""The plain weight of a pre-packed one."""


def fits(params: Params, x: Tensor) -> bool:
    """True for a layer whose weight is pre-packed."""
    return "weight" in params and params["weight"].is_mkldnn


def fits_product(params: Params, x: Tensor) -> bool:
    """True for a pre-packed weight with a bias and nothing else, and rows of their dtype."""
    if not fits(params, x) or params.keys() != {"weight", "bias"} or x.ndim < 2 or not products.is_enabled():
        return False
    return x.is_cpu and x.dtype is params["weight"].dtype is params["bias"].dtype


def linear(params: Params, x: Tensor) -> Tensor:
    """`layers.linear` by oneDNN."""
    y = products.pointwise()(x.flatten(0, -2), params["weight"], params["bias"], "none", [], "")
    return y.unflatten(0, x.shape[:-1])


def with_plain_weight(params: Params, x: Tensor) -> Tensor:
    """`layers.linear` of the plain weight."""
    return layers.linear.formula({**params, "weight": unpack(params["weight"])}, x)
