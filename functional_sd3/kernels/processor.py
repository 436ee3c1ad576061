"""Identity of the processor: vendor, family and instruction set, as far as the system tells without privileges."""

import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

CPUINFO = Path("/proc/cpuinfo")
AMD, INTEL = "AuthenticAMD", "GenuineIntel"


class Processor(NamedTuple):
    """vendor: CPUID's, such as `AMD`, "" where unknown; family: CPUID's, with its extension (Zen 4 is 25, Zen 5 is 26),
    0 where unknown; capability: PyTorch's name of the widest instructions that it uses, such as "AVX512"."""

    vendor: str
    family: int
    capability: str


def identify(cpuinfo: Path = CPUINFO) -> Processor:
    """This machine's processor. Arm, macOS and everything that names no vendor have vendor "" and family 0."""
    vendor, family = _from_cpuinfo(cpuinfo) or _from_name(platform.processor()) or ("", 0)
    return Processor(vendor, family, torch.backends.cpu.get_cpu_capability())


def _from_cpuinfo(path: Path) -> tuple[str, int] | None:
    """Linux: the lines of the first processor."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            facts = dict(_facts(lines))
    except OSError:
        return None
    vendor, family = facts.get("vendor_id", ""), facts.get("cpu family", "")
    return (vendor, int(family)) if vendor and family.isdecimal() else None


def _facts(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if not line.strip():
            return
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def _from_name(name: str) -> tuple[str, int] | None:
    """Windows: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD"."""
    match = re.fullmatch(r".* Family (\d+) .*, (\w+)", name)
    return (match[2], int(match[1])) if match else None
