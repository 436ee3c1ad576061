"""A run of the rows, from pytest-benchmark's JSON, as a page of Markdown."""

import statistics
from typing import Any, NamedTuple


class Row(NamedTuple):
    """Seconds are medians of one call; `spread` is the middle half of our times over their median."""

    name: str
    peer: str
    ours: float
    theirs: float | None
    spread: float
    facts: dict[str, Any]

    @property
    def ratio(self) -> float | None:
        """Our time over theirs: below 1 is faster."""
        return None if self.theirs is None else self.ours / self.theirs


def rows(run: dict[str, Any]) -> list[Row]:
    """The rows of one run."""
    lines = []
    for each in run["benchmarks"]:
        facts, stats = dict(each["extra_info"]), each["stats"]
        theirs, repeat = facts.pop("theirs"), facts.pop("repeat", 1)
        if least := facts.pop("least", None):
            facts["products_alone"] = f"{statistics.median(least) / statistics.median(theirs):.2f}"
        lines.append(
            Row(
                facts.pop("row"),
                facts.pop("peer", ""),
                stats["median"] / repeat,
                statistics.median(theirs) if theirs else None,
                stats["iqr"] / stats["median"] if theirs else 0.0,
                facts,
            )
        )
    return lines


def page(run: dict[str, Any]) -> str:
    """The whole of bench/RESULTS.md."""
    machine = run["machine_info"]
    cpu = machine.get("cpu", {}).get("brand_raw", machine.get("processor", "unknown"))
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# Side by side",
        "",
        f"{cpu}, {run['threads']} threads; Python {machine['python_version']}, {versions}.",
        "Medians of interleaved runs in one process, warm, the same weights, after checking that both sides agree.",
        "Spread is the middle half of our times. Trust the ratios, which are below 1 where this project is faster;",
        "`make bench` remeasures them. *Products alone*: what the other side's matrix products, convolutions and",
        "attention take by themselves, as a share of its time; no ratio of the same arithmetic can be below it.",
        "",
        "| what | ours | theirs | ratio | spread | other side | more |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows(run):
        if row.theirs is None:
            times = "| | | | |"
        else:
            times = f"| {_time(row.ours)} | {_time(row.theirs)} | **{row.ratio:.2f}** | {100 * row.spread:.0f} % |"
        lines.append(f"| {row.name} {times} {row.peer} | {_facts(row.facts)} |")
    return "\n".join([*lines, ""])


def _facts(facts: dict[str, Any]) -> str:
    facts, parts = dict(facts), []
    if (difference := facts.pop("difference", None)) is not None:
        parts.append(f"difference {difference:.0e}")
    peak, their_peak = facts.pop("peak_bytes", None), facts.pop("theirs_peak_bytes", None)
    if peak is not None:
        against = f" / {_bytes(their_peak)}, ratio {peak / their_peak:.2f}" if their_peak else ""
        parts.append(f"peak {_bytes(peak)}{against}")
    first, their_first = facts.pop("first_seconds", None), facts.pop("theirs_first_seconds", None)
    if facts.pop("compiled", False) and first is not None:
        parts.append(f"first call {_time(first)}" + (f" / {_time(their_first)}" if their_first else ""))
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in facts.items()]
    return "; ".join(parts)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


def _bytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
