"""`python bench/compare.py OLD.json NEW.json`: fails when a row got slower against its peer in the same run.

Two machines, or two hours of one, are not to be compared by seconds; a row's ratio to its peer is.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import table  # noqa: E402


def slower(old: dict, new: dict, limit: float) -> list[str]:
    """One line for each row whose ratio grew by more than the share `limit`, and for each that is no longer there."""
    before = {row.name: row.ratio for row in table.rows(old) if row.ratio}
    after = {row.name: row.ratio for row in table.rows(new) if row.ratio}
    lines = [f"{name}: not in the new run" for name in before if name not in after]
    for name in before.keys() & after.keys():
        change = after[name] / before[name] - 1
        if change > limit:
            lines.append(f"{name}: ratio {before[name]:.2f} -> {after[name]:.2f}, {100 * change:.0f} % slower")
    return sorted(lines)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 when a row got slower, 2 when a file is not a run."""
    parser = argparse.ArgumentParser(prog="bench/compare.py", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--limit", type=float, default=0.15, help="growth of the ratio that fails (default 0.15)")
    parsed = parser.parse_args(arguments)
    try:
        old, new = (json.loads(path.read_text()) for path in (parsed.old, parsed.new))
        lines = slower(old, new, parsed.limit)
    except (OSError, ValueError, KeyError) as error:
        print(f"not a run of `python -m bench`: {type(error).__name__} {error}", file=sys.stderr)
        return 2
    for line in lines:
        print(line)
    print(f"{len(lines)} of {len(table.rows(old))} rows slower by more than {100 * parsed.limit:.0f} %")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
