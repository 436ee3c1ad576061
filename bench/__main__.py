"""`python -m bench [-k ROWS] [pytest's options]`: times the rows; all of them write bench/RESULTS.md and its JSON."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def main(options: list[str]) -> int:
    """Runs the rows under pytest-benchmark and returns its exit status."""
    written = [] if options else [f"--results={HERE / 'RESULTS.md'}", f"--benchmark-json={HERE / 'results.json'}"]
    fixed = ["-o", "python_files=bench_*.py", "-o", "addopts=--import-mode=importlib", "-W", "ignore", "-p", "no:xdist"]
    quiet = ["-q", "--benchmark-columns=median,iqr,rounds", "--benchmark-disable-gc", "-p", "no:cacheprovider"]
    return pytest.main([str(HERE), *fixed, *quiet, *written, *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
