"""PyTorch's fused attention, forwards and backwards, as two functions for every device that has one.

`forward` returns the output, the logarithm of the softmax's sums and, on a GPU, what else the kernel's backward pass
needs. On a GPU the kernel is the one that PyTorch chooses; which one it was shows in the shapes of what it saved. The
branch for GPUs follows the operators' schemas and shape rules of PyTorch 2.13 and has not run on one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from functional_sd3.core.attention import softmax_attention
from functional_sd3.core.dispatch import private, private_operator

Saved = tuple[Tensor, ...]
SHORT_SEQUENCE = 512
"""Keys below which the CPU's backward pass in bfloat16 takes up to three times as long as in float32 (23 against 76 ms
for 64 x 5 heads of 32 on 112 tokens; 61 against 38 ms for 8 heads of 64 on 1,024: PyTorch 2.13)."""


def fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> bool:
    """Equal batch, heads and head_dim, one floating dtype, on a device with kernels."""
    return (
        _available(query.device.type)
        and query.ndim == key.ndim == value.ndim == 4
        and query.shape[:2] == key.shape[:2]
        and key.shape == value.shape
        and query.shape[3] == key.shape[3]
        and query.dtype == key.dtype == value.dtype
        and query.is_floating_point()
        and 0 not in query.shape
        and 0 not in key.shape
        and (mask is None or (mask.ndim <= 4 and (mask.dtype == torch.bool or mask.is_floating_point())))
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, *tuple[Tensor, ...]]:
    """(o, logarithm of the softmax's sums, anything else that `backward` needs)."""
    if q.device.type == "cuda":
        return _cuda_forward(q, k, v, mask, causal, scale)
    return _cpu_forward(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, o: Tensor, saved: Saved, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for the cotangent g of o."""
    if q.device.type == "cuda":
        return _cuda_backward(g, q, k, v, mask, o, saved, causal, scale)
    if q.dtype == torch.bfloat16 and k.shape[2] < SHORT_SEQUENCE:
        mask = None if mask is None else mask.float()
        gradients = backward(g.float(), q.float(), k.float(), v.float(), mask, o.float(), saved, causal, scale)
        return gradients[0].to(q.dtype), gradients[1].to(q.dtype), gradients[2].to(q.dtype)
    return _cpu_backward(g, q, k, v, o, saved[0], 0.0, causal, attn_mask=mask, scale=scale)


def _available(device: str) -> bool:
    if device == "cpu":
        return _cpu_forward is not None and _cpu_backward is not None
    return device == "cuda" and None not in (_choice, *_flash, *_efficient, *_cudnn)


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float):
    kernel, aligned = _choice(q, k, v, mask, 0.0, causal, scale=scale), q.shape[3] % 8 == 0
    if kernel == SDPBackend.FLASH_ATTENTION.value and mask is None and aligned and q.shape[3] <= 128:
        o, sums, _, _, _, _, seed, offset, _ = _flash[0](q, k, v, 0.0, causal, False, scale=scale)
        return o, sums, seed, offset
    bias = _bias(q, k, mask)
    if kernel == SDPBackend.CUDNN_ATTENTION.value:
        o, sums, _, _, _, _, seed, offset, _ = _cudnn[0](q, k, v, bias, True, 0.0, causal, False, scale=scale)
        return o, sums, seed, offset
    if kernel != SDPBackend.MATH.value and aligned and (bias is None or k.shape[2] % 8 == 0):
        return _efficient[0](q, k, v, bias, True, 0.0, causal, scale=scale)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return o, q.new_empty(q.shape[0])  # Nothing is saved: the gradients are the formula's.


def _cuda_backward(g, q, k, v, mask, o, saved: Saved, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if len(saved) == 1:
        return _formula_gradients(g, q, k, v, mask, causal, scale)
    sums, seed, offset = saved
    bias = _bias(q, k, mask)
    sizes = None, None, q.shape[2], k.shape[2], 0.0, causal
    if sums.ndim == 4:  # cuDNN keeps a last dimension of 1.
        return _cudnn[1](g, q, k, v, o, sums, seed, offset, bias, *sizes, scale=scale)
    if seed.ndim == 1:  # The state of flash attention's generator is one tensor of two numbers.
        return _flash[1](g, q, k, v, o, sums, *sizes, seed, offset, scale=scale)
    needed = [True, True, True, False]
    return _efficient[1](g, q, k, v, bias, o, sums, seed, offset, 0.0, needed, causal, scale=scale)[:3]


def _bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of every head and row, as the kernels of a GPU read it: without copies but for keys that share one."""
    if mask is None:
        return None
    bias = mask.expand(*q.shape[:3], k.shape[2])
    return bias if bias.stride(-1) == 1 else bias.contiguous()


def _formula_gradients(g, q, k, v, mask, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by autograd of the formula, in rematerialised blocks."""
    with torch.enable_grad():
        query, key, value = (x.detach().requires_grad_() for x in (q, k, v))
        output = softmax_attention.formula(query, key, value, mask, causal, scale)
        gradients = torch.autograd.grad(output, (query, key, value), g)
    return gradients[0], gradients[1], gradients[2]


_TRIAL = torch.zeros(1, 1, 2, 4, dtype=torch.float32, device="cpu")
_SUMS = torch.zeros(1, 1, 2, dtype=torch.float32, device="cpu")
_cpu_forward = private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", _TRIAL, _TRIAL, _TRIAL, scale=1.0)
_cpu_backward = private(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", *[_TRIAL] * 5, _SUMS, 0.0, False, scale=1.0
)
_choice = private_operator(
    "torch.ops.aten._fused_sdp_choice", "query key value attn_mask dropout_p is_causal scale enable_gqa"
)
_flash = (
    private_operator(
        "torch.ops.aten._scaled_dot_product_flash_attention",
        "query key value dropout_p is_causal return_debug_mask scale",
    ),
    private_operator(
        "torch.ops.aten._scaled_dot_product_flash_attention_backward",
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal philox_seed "
        "philox_offset scale",
    ),
)
_efficient = (
    private_operator(
        "torch.ops.aten._scaled_dot_product_efficient_attention",
        "query key value attn_bias compute_log_sumexp dropout_p is_causal scale",
    ),
    private_operator(
        "torch.ops.aten._scaled_dot_product_efficient_attention_backward",
        "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset dropout_p grad_input_mask "
        "is_causal scale",
    ),
)
_cudnn = (
    private_operator(
        "torch.ops.aten._scaled_dot_product_cudnn_attention",
        "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask scale",
    ),
    private_operator(
        "torch.ops.aten._scaled_dot_product_cudnn_attention_backward",
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k "
        "dropout_p is_causal scale",
    ),
)
