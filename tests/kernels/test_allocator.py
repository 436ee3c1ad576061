"""Freed memory stays with a process that asked for it, and only with such a one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from functional_sd3.kernels import allocator

PROGRAM = """
import resource, runpy, sys
kept = runpy.run_path(sys.argv[1])["keep_freed_memory"]() if sys.argv[2] == "keep" else False
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(40 << 20)
    block[:] = b"x" * len(block)
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
print(int(kept), second)
"""


def run(choice):
    own = {name: value for name, value in os.environ.items() if name not in allocator._CHOSEN}
    source = str(Path(allocator.__file__))
    command = [sys.executable, "-c", PROGRAM, source, choice]
    result = subprocess.run(command, env=own, capture_output=True, text=True, timeout=60, check=True)
    return [int(word) for word in result.stdout.split()]


def glibc():
    """(2, 36) or so; None where the C library is another."""
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ") if hasattr(os, "confstr") else ("",) * 3
    return tuple(map(int, version.split(".")[:2])) if name == "glibc" else None


@pytest.mark.skipif((glibc() or (0, 0)) < (2, 35), reason="needs glibc 2.35")
def test_pages_of_a_freed_block_are_used_again_where_memory_is_kept():
    pages = (40 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert run("leave")[1] > pages
    kept, faults = run("keep")
    assert kept and faults < pages / 10


@pytest.mark.parametrize("name", allocator._CHOSEN)
def test_limits_that_the_environment_chooses_stay(monkeypatch, name):
    monkeypatch.setattr(allocator, "_mallopt", lambda: lambda parameter, value: 1)
    for other in allocator._CHOSEN:
        monkeypatch.delenv(other, raising=False)
    assert allocator.keep_freed_memory()
    monkeypatch.setenv(name, "131072")
    assert not allocator.keep_freed_memory()


def test_without_glibc_nothing_is_changed(monkeypatch):
    for name in allocator._CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "_mallopt", lambda: None)
    assert allocator.keep_freed_memory() is False


def test_an_older_glibc_keeps_what_it_can(monkeypatch):
    for name in allocator._CHOSEN:
        monkeypatch.delenv(name, raising=False)
    calls = []

    def mallopt(parameter, value):
        calls.append((parameter, value))
        return int(parameter != allocator._MMAP_THRESHOLD or value <= allocator.OLD_LIMIT)

    monkeypatch.setattr(allocator, "_mallopt", lambda: mallopt)
    assert allocator.keep_freed_memory()
    assert calls[-2:] == [(-3, allocator.OLD_LIMIT), (-1, allocator.KEPT)]
