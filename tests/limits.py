"""Limits of memory for tests."""

import resource
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def address_space(more):
    """At most `more` bytes beyond what the process has mapped."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
