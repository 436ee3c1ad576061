"""Which narrow numbers a processor multiplies in hardware, and from which size on they are faster than float32.

bfloat16 without such instructions is emulated and takes about three times as long as float32; int8 likewise. What was
measured is in `TABLE`; an unmeasured processor that has the instructions takes `MEASURED`.
`python -m bench.products` measures the machine at hand and prints its line.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

from functional_sd3.kernels.processor import AMD, Processor, identify

BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"})
"""Instruction sets, by PyTorch's names, that multiply bfloat16; the last two are Arm's."""
INT8 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "i8mm"})
"""Instruction sets that multiply int8 and sum in int32."""


class Narrow(NamedTuple):
    """Least sizes from which products of narrow numbers are worth their rounding; None where they never are.

    bfloat16: width of a network, of which everything is computed in bfloat16. int8: inputs x outputs of a layer whose
    product alone is of int8.
    """

    bfloat16: int | None
    int8: int | None


# Zen 4 at 2.6 GHz, 1 thread, processor time. Time in bfloat16 / float32 of two MMDiT blocks, batch 2, 64 + 24, 256 + 77
# and 1,024 + 154 tokens (`python -m bench.products --narrow --cpu-time`): width 64 1.05, 0.97, 0.88; 128 0.84, 0.93,
# 0.89; 192 1.01, 0.76, 0.87; 256 0.69, 0.77, 0.83; 384 0.68, 0.73, 0.79; 512 0.61, 0.64, 0.73; 768 0.62, 0.63.
# CLIP, 77 tokens: 96 1.24, 192 0.72, 768 0.59, 1,280 0.56. T5, 256 tokens: 192 0.78, 1,024 0.60. VAE of true size:
# decode 0.58 of 64 x 64 pixels, 0.75 of 128 x 128, encode 0.53 and 0.68.
_ZEN4 = Narrow(bfloat16=256, int8=1 << 16)
MEASURED = _ZEN4
"""Sizes for processors that have the instructions and were not measured."""
TABLE: dict[Processor, Narrow] = {Processor(AMD, 25, "AVX512"): _ZEN4}
"""Processor -> what pays on it, measured with PyTorch 2.13."""


def of(
    processor: Processor, capabilities: Mapping[str, Any], table: Mapping[Processor, Narrow] | None = None
) -> Narrow:
    """Least sizes on a processor with these instruction sets: name -> True if it has them."""
    line = (TABLE if table is None else table).get(processor, MEASURED)
    return Narrow(
        line.bfloat16 if _has_any(capabilities, BFLOAT16) else None, line.int8 if _has_any(capabilities, INT8) else None
    )


def here() -> Narrow:
    """Least sizes on this machine: None where PyTorch cannot reach the instructions, for want of oneDNN."""
    backend = torch.backends.mkldnn
    # On Arm oneDNN multiplies by the Arm Compute Library, which not every build of PyTorch has.
    reaches = backend.is_available() and backend.enabled and (_is_x86() or backend.is_acl_available())
    return of(identify(), torch.cpu.get_capabilities()) if reaches else Narrow(None, None)


def _is_x86() -> bool:
    return torch.cpu.get_capabilities().get("architecture") in ("x86_64", "x86", "AMD64")


def _has_any(capabilities: Mapping[str, Any], names: Collection[str]) -> bool:
    return any(bool(capabilities.get(name)) for name in names)
