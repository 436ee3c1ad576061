"""Error of every method against evaluations of the velocity: `python -m bench.evaluations`, about a quarter of an hour.

Runs every method of `ode` within budgets of evaluations at several guidance scales, on prompts that were never trained
on, each with noise of its own, and compares the latents with those of a converged run. Writes the tables into
docs/sampling.md and the plot beside it. Stochastic methods are left out: they end elsewhere.
"""

import argparse
import bisect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench import plot
from functional_sd3 import pipeline, weights
from functional_sd3.core import prng
from functional_sd3.flow import ode
from functional_sd3.flow.ode import adaptive
from functional_sd3.formats import files
from functional_sd3.pipeline import Conditions
from functional_sd3.recipes import shapes
from functional_sd3.weights import Model, shipped

BUDGETS = (4, 8, 16, 28, 56)
SCALES = (1.0, 3.0, 5.0, 7.0)
TOLERANCES = (1e-2, 1e-3)
CONVERGED = 1e-6
DOCS = Path(__file__).resolve().parents[1] / "docs"


class Row(NamedTuple):
    """One run: how many evaluations it took (a mean over samples for adaptive methods) and how far off it ended."""

    method: str
    scale: float
    allowed: float
    """The budget, or the tolerance of an adaptive method."""
    steps: int
    spent: float
    error: float
    """Mean over the samples of |x - converged| / |converged|."""


class Case(NamedTuple):
    """What is drawn."""

    model: Model
    conditions: Conditions
    noise: Tensor


def case(model: Model, pairs: int, seed: int) -> Case:
    """`pairs` held-out captions, half of them of two things, each with its own noise."""
    captions = [
        caption
        for things, count in ((1, pairs - pairs // 2), (2, pairs // 2))
        for caption in _spread([text for text, _ in shapes.held_out_captions(things)], count)
    ]
    conditions = pipeline.encode(model.params, model.config, model.tokenizers, captions)
    return Case(model, conditions, pipeline.initial_noise(prng.key(seed), model.config, pairs))


def steps_within(method: ode.Method, budget: int) -> int:
    """The most steps whose run takes at most `budget` evaluations; 0 where one step takes more."""
    return bisect.bisect_right(range(1, budget + 1), budget, key=lambda steps: ode.evaluations(method, steps))


def converged(case: Case, scale: float, tolerance: float = CONVERGED) -> adaptive.Solution:
    """The run that the others are compared with."""
    return _adaptive(case, ode.DOPRI5, scale, tolerance)


def stepped(case: Case, methods: Sequence[ode.Method], scale: float, exact: Tensor, budgets=BUDGETS) -> list[Row]:
    """Every method within every budget that lets it take a step."""
    rows = []
    for method in methods:
        for budget in budgets:
            if steps := steps_within(method, budget):
                latents = pipeline.sample(
                    case.model.params, case.model.config, case.conditions, case.noise,
                    steps=steps, cfg=scale, method=method,
                )  # fmt: skip
                spent = ode.evaluations(method, steps)
                rows.append(Row(method.name, scale, budget, steps, spent, error(latents, exact)))
    return rows


def controlled(case: Case, methods, scale: float, exact: Tensor, tolerances=TOLERANCES) -> list[Row]:
    """Every adaptive method at every tolerance, relative and absolute alike."""
    rows = []
    for method in methods:
        for tolerance in tolerances:
            solution = _adaptive(case, method, scale, tolerance)
            spent, steps = solution.evaluations.float().mean().item(), int(solution.accepted.max())
            rows.append(Row(method.name, scale, tolerance, steps, spent, error(solution.x[-1], exact)))
    return rows


def error(latents: Tensor, exact: Tensor) -> float:
    """Mean over the samples of the relative norm of the difference."""
    return ((latents - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean().item()


def tables(rows: Sequence[Row]) -> str:
    """Markdown: for each scale the errors in percent by method and budget, the best in bold; then the adaptive ones."""
    fixed = [row for row in rows if row.allowed >= 1]
    parts = []
    for scale in sorted({row.scale for row in fixed}):
        here = {(row.method, row.allowed): row for row in fixed if row.scale == scale}
        budgets = sorted({budget for _, budget in here})
        best = {budget: min(row.error for (_, b), row in here.items() if b == budget) for budget in budgets}
        lines = [f"Guidance scale {scale:g}:", "", f"| method | {' | '.join(f'{b:g}' for b in budgets)} |"]
        lines.append("|---" * (len(budgets) + 1) + "|")
        for name in dict.fromkeys(method for method, _ in here):
            cells = [_cell(here.get((name, budget)), best[budget]) for budget in budgets]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    if loose := [row for row in rows if row.allowed < 1]:
        scales, tolerances = sorted({r.scale for r in loose}), sorted({r.allowed for r in loose}, reverse=True)
        lines = [f"| method | tolerance | {' | '.join(f'scale {scale:g}' for scale in scales)} |"]
        lines.append("|---" * (len(scales) + 2) + "|")
        for name in dict.fromkeys(row.method for row in loose):
            for tolerance in tolerances:
                row_of_scale = {r.scale: r for r in loose if r.method == name and r.allowed == tolerance}
                cells = [f"{row_of_scale[s].spent:.0f}: {percent(row_of_scale[s].error)}" for s in scales]
                lines.append(f"| {name} | {tolerance:.0e} | {' | '.join(cells)} |")
        parts.append("Adaptive methods, evaluations (mean over the samples): error:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def read_tables(text: str) -> list[Row]:
    """The rows of `tables`, with the digits that are written there; the steps of adaptive methods are not: 0."""
    methods = {method.name: method for method in ode.METHODS.values()}
    rows, scale, columns = [], 0.0, [""]
    for line in text.splitlines():
        name, *cells = (cell.strip(" *") for cell in line.strip("|").split("|"))
        if line.startswith("Guidance scale"):
            scale = float(line.split()[-1].rstrip(":"))
        elif name == "method":
            columns = cells
        elif name in methods:
            for budget, cell in zip(map(int, columns), cells, strict=True):
                if cell:
                    steps = steps_within(methods[name], budget)
                    spent = ode.evaluations(methods[name], steps)
                    rows.append(Row(name, scale, budget, steps, spent, float(cell) / 100))
        elif cells and columns[0] == "tolerance" and not name.startswith("-"):
            for column, cell in zip(columns[1:], cells[1:], strict=True):
                spent, percents = map(float, cell.split(":"))
                rows.append(Row(name, float(column.split()[-1]), float(cells[0]), 0, spent, percents / 100))
    return rows


def image(rows: Sequence[Row]):
    """Error against evaluations, a panel for each scale."""
    scales = sorted({row.scale for row in rows})
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {f"scale {scale:g}": {} for scale in scales}
    for row in rows:
        lines[f"scale {row.scale:g}"].setdefault(row.method, []).append((row.spent, max(row.error, 1e-9)))
    return plot.panels(lines, "evaluations", "relative error of the latents")


def percent(value: float) -> str:
    """Two digits that count: 0.00123 is 0.12."""
    return f"{100 * value:.2g}" if value < 0.1 else f"{100 * value:.0f}"


def with_section(page: str, text: str, name: str = "evaluations") -> str:
    """The page with what stands between the two marks of `name` replaced. Raises ValueError where they are missing."""
    start, stop = _bounds(page, name)
    return f"{page[:start]}\n{text}\n{page[stop:]}"


def _bounds(page: str, name: str) -> tuple[int, int]:
    """Where the text between the two marks starts and stops."""
    start, stop = f"<!-- {name}: written by bench.{name} -->", f"<!-- end of {name} -->"
    if not 0 <= page.find(start) < page.find(stop):
        raise ValueError(f"the page has no {start} followed by {stop}")
    return page.index(start) + len(start), page.index(stop)


def section(page: str, name: str = "evaluations") -> str:
    """The text of a page between the two marks of `name`. Raises ValueError where they are missing."""
    return page[slice(*_bounds(page, name))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=None)
    parser.add_argument("--pairs", type=int, default=4, help="prompts, each with noise of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, default=DOCS / "sampling.md", help="the page whose section is written")
    parser.add_argument("--redraw", action="store_true", help="only draw the plot again, of the numbers on the page")
    parsed = parser.parse_args(arguments)
    if parsed.redraw:
        written = section(parsed.page.read_text(encoding="utf-8"))
        return plot.save(image(read_tables(written)), parsed.page.parent / "evaluations.png")
    begun, rows = time.process_time(), []
    model = weights.load(parsed.params or shipped.folder(), dtype=torch.float32)
    with torch.no_grad():
        drawn = case(model, parsed.pairs, parsed.seed)
        for scale in SCALES:
            exact = converged(drawn, scale)
            rows += stepped(drawn, list(ode.METHODS.values()), scale, exact.x[-1])
            rows += controlled(drawn, list(ode.ADAPTIVE.values()), scale, exact.x[-1])
            print(f"scale {scale:g}: converged in {exact.evaluations.float().mean():.0f} evaluations", flush=True)
            print("\n".join(f"{row}" for row in rows if row.scale == scale), flush=True)
        checked = error(converged(drawn, SCALES[-1], 10 * CONVERGED).x[-1], exact.x[-1])
    minutes = (time.process_time() - begun) / 60
    text = (
        f"Errors in percent, of {parsed.pairs} held-out prompts with noise of their own. The runs they are compared\n"
        f"with have a tolerance of {CONVERGED:.0e}; at scale {SCALES[-1]:g} one of {10 * CONVERGED:.0e} ends "
        f"{percent(checked)} % away. Made in {minutes:.0f} minutes of one core.\n\n{tables(rows)}"
    )
    plot.save(image(rows), parsed.page.parent / "evaluations.png")
    files.write_atomic(parsed.page, with_section(parsed.page.read_text(encoding="utf-8"), text).encode())
    print(text)


def _adaptive(case: Case, method: ode.Adaptive, scale: float, tolerance: float) -> adaptive.Solution:
    velocity = pipeline.velocity(case.model.params, case.model.config, case.conditions, scale)
    return adaptive.solve(method, velocity, case.noise, [1.0, 0.0], rtol=tolerance, atol=tolerance)


def _spread(listed: Sequence[str], count: int) -> list[str]:
    return [listed[index * len(listed) // count] for index in range(count)]


def _cell(row: Row | None, best: float) -> str:
    if row is None:
        return ""
    return f"**{percent(row.error)}**" if row.error == best else percent(row.error)


if __name__ == "__main__":
    main()
