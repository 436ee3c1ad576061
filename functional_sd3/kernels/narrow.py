"""Narrow numbers (bfloat16, int8) that a processor multiplies in hardware, and the sizes from which that is faster.

bfloat16 without such instructions is emulated and takes about three times as long as float32; int8 likewise.
Measurements are in `TABLE`; an unmeasured processor that has the instructions takes `MEASURED`.
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

    bfloat16: width of a network, of which everything is computed in bfloat16. int8: inputs x outputs of a layer of
    float32 whose product alone is of int8, of many rows. int8_bfloat16: of a layer of bfloat16, beside the same weight
    dequantised; beside a weight that is stored in bfloat16 it takes four times as many.
    """

    bfloat16: int | None
    int8: int | None
    int8_bfloat16: int | None = None


# Zen 4 at 2.6 GHz, 1 thread, processor time. Time in bfloat16 / float32 of two MMDiT blocks, batch 2, 64 + 24, 256 + 77
# and 1,024 + 154 tokens (`python -m bench.products --narrow --cpu-time`): width 64 1.05, 0.97, 0.88; 128 0.84, 0.93,
# 0.89; 192 1.01, 0.76, 0.87; 256 0.69, 0.77, 0.83; 384 0.68, 0.73, 0.79; 512 0.61, 0.64, 0.73; 768 0.62, 0.63.
# CLIP, 77 tokens: 96 1.24, 192 0.72, 768 0.59, 1,280 0.56. T5, 256 tokens: 192 0.78, 1,024 0.60. VAE of true size:
# decode 0.58 of 64 x 64 pixels, 0.75 of 128 x 128, encode 0.53 and 0.68.
# int8, geometric mean over 77, 154, 512 and 1,024 rows of its time / that of the weight in float32, in bfloat16 and
# dequantised to bfloat16 (`python -m bench.products --narrow --cpu-time`, a busy machine): 128 -> 512 1.09, 1.48, 1.17;
# 160 -> 160 1.18, 2.26, 1.82; 256 -> 256 0.72, 1.44, 1.21; 160 -> 480 0.90, 1.43, 1.15; 160 -> 640 0.83, 1.36, 1.09;
# 256 -> 768 0.61, 1.12, 0.83; 512 -> 512 0.52, 0.98, 0.82; 384 -> 1,536 0.45, 0.89, 0.78; 1,024 -> 1,024 0.44, 0.84,
# 0.67; 1,024 -> 4,096 0.36, 0.67, 0.56. Of 2 rows: 256 -> 768 1.75, 1.35, 0.74; 1,024 -> 4,096 0.37, 0.64, 0.24.
_ZEN4 = Narrow(bfloat16=256, int8=1 << 16, int8_bfloat16=1 << 17)
MEASURED = _ZEN4
"""Sizes for processors that have the instructions and were not measured."""
TABLE: dict[Processor, Narrow] = {Processor(AMD, 25, "AVX512"): _ZEN4}
"""Processor -> what pays on it, measured with PyTorch 2.13."""


def of(
    processor: Processor, capabilities: Mapping[str, Any], table: Mapping[Processor, Narrow] | None = None
) -> Narrow:
    """Least sizes on a processor with these instruction sets: name -> True if it has them."""
    line = (TABLE if table is None else table).get(processor, MEASURED)
    if not _has_any(capabilities, BFLOAT16):
        # A layer in bfloat16 takes at least as long as in float32 there.
        line = line._replace(bfloat16=None, int8_bfloat16=line.int8)
    return line if _has_any(capabilities, INT8) else line._replace(int8=None, int8_bfloat16=None)


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
