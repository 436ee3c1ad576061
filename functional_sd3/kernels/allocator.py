"""Freed memory kept by the process for the tensors of the next operations, where the C library is glibc.

glibc gives large blocks back to the system when they are freed, and each page of the next one costs 2 microseconds of
the kernel: blocks above 32 MiB always, smaller ones when enough is free at the end of the heap. A step of a transformer
of width 512 whose weights are mapped from a file touched 18,300 new pages and took 1.12 of the time that it takes with
kept memory; a product of 2,048 rows of 1,024 -> 4,096 and one operation on its 34 MB took 1.2 (Zen 4, a virtual
machine). A program that has freed one large block before, as one that has loaded weights into memory, keeps up to 64
MiB by itself.
"""

import ctypes
import os
from typing import Any

KEPT = 1 << 30
"""Bytes: blocks up to this size are kept, and so much free memory at the end of the heap."""
OLD_LIMIT = 1 << 25
"""Largest block that glibc before 2.35 keeps."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables by which a user chooses such limits."""


def keep_freed_memory(size: int = KEPT) -> bool:
    """Have this process keep freed blocks of up to `size` bytes for its next ones, instead of the system.

    For programs that compute on a CPU and have memory enough: what was held at once stays with the process. It holds
    for the whole process and cannot be taken back, so no function of this library calls it; the commands that draw do,
    but with --offload and --block-swap. Returns whether it is so: False without glibc, and where the environment
    chooses limits itself.
    """
    if any(name in os.environ for name in _CHOSEN):
        return False
    mallopt = _mallopt()
    if mallopt is None:
        return False
    blocks = any(mallopt(_MMAP_THRESHOLD, limit) for limit in (size, min(size, OLD_LIMIT)))
    return bool(blocks and mallopt(_TRIM_THRESHOLD, size))


def _mallopt() -> Any:
    """The C library's function that sets limits of its allocator; None where it is not glibc."""
    try:
        libc = ctypes.CDLL(None)
        return libc.mallopt if hasattr(libc, "gnu_get_libc_version") else None
    except (OSError, TypeError, AttributeError):
        return None
