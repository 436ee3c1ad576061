"""`python -m bench [NAME...] [-k ROW] [--list] [--cpu-time] [pytest's options]`: times rows and prints ours, theirs and
their ratio; each is written to RESULTS.md as soon as it is measured.

NAME: files bench/bench_NAME.py, all by default; `--list` prints them with their rows and runs nothing. `-k ROW`: rows
whose test's name has this word, such as forward, decode or clip. `--cpu-time`: one thread and processor time, for
machines that do other things too. `--quick` runs each row once and writes nothing.
"""

import sys
from pathlib import Path

import pytest

from bench import table

HERE = Path(__file__).parent


def main(options: list[str]) -> int:
    """Runs the rows under pytest-benchmark and returns its exit status."""
    if {"-h", "--help"} & set(options):
        # pytest would print its own, of hundreds of lines.
        print(__doc__.strip())
        return 0
    names, rest = select(options)
    files = {name: HERE / f"bench_{name}.py" for name in names or table.groups()}
    if "--list" in rest:
        for name, path in files.items():
            print("\n    ".join([name, *(row.label for row in table.rows_of_file(path))]))
        return 0
    if unknown := [name for name, path in files.items() if not path.exists()]:
        print(f"no rows named {', '.join(unknown)}; there are: {', '.join(table.groups())}", file=sys.stderr)
        return 2
    written = [] if "--quick" in rest else [f"--results={HERE / 'RESULTS.md'}"]
    if not options:
        written.append(f"--benchmark-json={HERE / 'results.json'}")
    if "--cpu-time" in rest:
        rest = ["--threads=1", "--benchmark-timer=bench.timing.processor_time", *rest]
    fixed = ["-o", "python_files=bench_*.py", "-o", "addopts=--import-mode=importlib", "-W", "ignore", "-p", "no:xdist"]
    # Its table has our times alone, under the names of the tests; conftest.py prints the rows instead.
    quiet = ["-q", "--benchmark-quiet", "--benchmark-disable-gc", "-p", "no:cacheprovider"]
    # The folder, for its conftest.py, is the root of what pytest collects.
    return pytest.main([*map(str, files.values()), f"--rootdir={HERE.parent}", *fixed, *quiet, *written, *rest])


def select(options: list[str]) -> tuple[list[str], list[str]]:
    """Names in front, and everything from the first option on."""
    first = next((index for index, option in enumerate(options) if option.startswith("-")), len(options))
    return options[:first], options[first:]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
