"""Which narrow numbers a processor multiplies: by its instruction sets, then by the table."""

import pytest
import torch

from functional_sd3.kernels import narrow
from functional_sd3.kernels.narrow import Narrow
from functional_sd3.kernels.processor import AMD, INTEL, Processor

ZEN4, XEON, ARM = Processor(AMD, 25, "AVX512"), Processor(INTEL, 6, "AVX512"), Processor("", 0, "SVE256")
LINE = Narrow(100, 200, 300)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, Narrow(None, None)),
        ({"avx512_f": True, "avx512_bf16": False, "avx512_vnni": False}, Narrow(None, None)),
        ({"avx512_vnni": True}, Narrow(None, 200, 200)),
        ({"avx512_vnni": True, "avx512_bf16": True}, LINE),
        ({"amx_bf16": True, "amx_int8": True}, LINE),
        ({"neon": True, "bf16": True, "i8mm": False}, Narrow(100, None)),
        ({"sve_bf16": True, "i8mm": True, "sve_max_length": 32}, LINE),
    ],
    ids=["nothing", "AVX512 alone", "VNNI", "Zen 4", "AMX", "Arm", "SVE"],
)
def test_what_is_not_multiplied_in_hardware_never_pays(capabilities, expected):
    assert narrow.of(ZEN4, capabilities, {ZEN4: LINE}) == expected


def test_the_line_is_the_processors_own_or_that_of_the_measured_ones():
    instructions = {"avx512_bf16": True, "avx512_vnni": True}
    assert narrow.of(ZEN4, instructions, {ZEN4: LINE, XEON: Narrow(None, 5, 6)}) == LINE
    assert narrow.of(XEON, instructions, {ZEN4: LINE, XEON: Narrow(None, 5, 6)}) == Narrow(None, 5, 6)
    assert narrow.of(ARM, instructions, {ZEN4: LINE}) == narrow.MEASURED


def test_nothing_pays_here_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_bf16": True})
    assert narrow.here().bfloat16 is not None
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert narrow.here() == Narrow(None, None)


def test_arm_needs_the_arm_compute_library(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64", "bf16": True})
    for there in (False, True):
        monkeypatch.setattr(torch.backends.mkldnn, "is_acl_available", lambda there=there: there)
        assert (narrow.here().bfloat16 is not None) == there
