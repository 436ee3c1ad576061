"""Calls of a GPU's fused kernels fit their operators: by PyTorch's shape rules, on fake tensors, without a GPU."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from functional_sd3.kernels import attention_fused


@pytest.mark.parametrize(
    ("backend", "masked", "saved"),
    [
        (SDPBackend.FLASH_ATTENTION, False, [(2, 3, 40), (2,), ()]),
        (SDPBackend.EFFICIENT_ATTENTION, False, [(2, 3, 64), (), ()]),
        (SDPBackend.EFFICIENT_ATTENTION, True, [(2, 3, 64), (), ()]),
        (SDPBackend.CUDNN_ATTENTION, False, [(2, 3, 40, 1), (), ()]),
        (SDPBackend.CUDNN_ATTENTION, True, [(2, 3, 40, 1), (), ()]),
    ],
    ids=str,
)
def test_what_a_kernel_saves_goes_back_to_it(backend, masked, saved, monkeypatch):
    called = []
    for name in ("_flash", "_efficient", "_cudnn"):
        pair = getattr(attention_fused, name)
        recorded = [
            lambda *given, own=own, name=name, **options: called.append(name) or own(*given, **options) for own in pair
        ]
        monkeypatch.setattr(attention_fused, name, tuple(recorded))
    monkeypatch.setattr(attention_fused, "_choice", lambda *_, **__: backend.value)
    with FakeTensorMode():
        q, g = (torch.empty(2, 3, 40, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        k, v = (torch.empty(2, 3, 48, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        mask = torch.empty(1, 1, 40, 48, dtype=torch.bfloat16, device="cuda") if masked else None
        assert attention_fused.fits(q, k, v, mask, False, 0.1)
        o, *kept = attention_fused.forward(q, k, v, mask, False, 0.1)
        assert o.shape == q.shape and [tuple(x.shape) for x in kept] == saved
        gradients = attention_fused.backward(g, q, k, v, mask, o, tuple(kept), False, 0.1)
        assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    assert len(called) == 2 and len(set(called)) == 1
