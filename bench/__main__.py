"""`python -m bench [ROW...]`: times the rows and writes bench/RESULTS.md."""

import argparse
import platform
from pathlib import Path

import torch

from bench import rows, timing


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("row", nargs="*", help=f"rows to time, by default all: {', '.join(rows.ROWS)}")
    parser.add_argument("--threads", type=int, default=2)
    parsed = parser.parse_args()
    unknown = [name for name in parsed.row if name not in rows.ROWS]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; rows are {', '.join(rows.ROWS)}")
    torch.set_num_threads(parsed.threads)
    found = rows.run(parsed.row or list(rows.ROWS))
    text = timing.table(found)
    print(text)
    if not parsed.row:
        head = f"{parsed.threads} threads, float32, torch {torch.__version__}, Python {platform.python_version()}"
        note = "Medians of interleaved runs in one process; trust the ratios. Remeasure with `make bench`."
        Path(__file__).with_name("RESULTS.md").write_text(f"# Side by side\n\n{head}. {note}\n\n{text}\n")


if __name__ == "__main__":
    main()
