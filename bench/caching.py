"""Error of every cache against what it computes: `python -m bench.caching`, a few minutes.

Draws held-out captions with params/tiny, one image at a time, by Euler's method with fewer steps and with each cache,
and compares the latents with those of all steps and with a converged run; the shapes' reader says which images are
right. Counts evaluations of the transformer and of its blocks, and takes processor time. Writes the table into
docs/sampling.md and the plot beside it.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import plot
from bench.evaluations import DOCS, Case, case, error, percent, section, with_section
from functional_sd3 import pipeline, weights
from functional_sd3.flow import caches, guidance, ode
from functional_sd3.flow.ode import adaptive
from functional_sd3.formats import files
from functional_sd3.recipes import shapes
from functional_sd3.recipes.shapes import prompts
from functional_sd3.transformer import block_cache
from functional_sd3.weights import shipped

STEPS, SCALE, CONVERGED = 28, 5.0, 1e-3
NAME = "caching"


class Row(NamedTuple):
    """One way to draw, its means over the images; errors are relative norms of the latents' difference."""

    name: str
    family: str
    evaluations: float
    """Of the transformer, a mean over the images."""
    blocks: float
    """Rows of blocks computed, as a share of those of the exact run."""
    time: float
    """Processor time of sampling, as a share of the exact run's."""
    error: float
    """To the exact run."""
    median: float
    to_converged: float
    converged_median: float
    right: float
    """Share of images of which the reader finds everything right."""


class Drawn(NamedTuple):
    """The latents of a way to draw, and what they took."""

    latents: Tensor
    evaluations: int
    block_rows: int
    seconds: float


def ways(polynomial: Sequence[float]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, family, options of `pipeline.sample`) of every row; the first is the exact run."""
    fitted = "/".join(f"{coefficient:.3g}" for coefficient in polynomial)
    words = [
        ("hold", "hold:every=2"), ("hold", "hold:every=3"),
        ("extrapolate", "extrapolate:every=2"), ("extrapolate", "extrapolate:every=3"),
        ("order 2", "extrapolate:every=2,order=2"),
        ("extrapolate, warm-up", "extrapolate:every=2,warmup=0.25,final=2"),
        ("extrapolate, warm-up", "extrapolate:every=3,warmup=0.25,final=2"),
        ("fast", "fast"),
        *(("adaptive", f"adaptive:tolerance={tolerance}") for tolerance in (0.1, 0.2, 0.4)),
        *(("first-block", f"first-block:threshold={threshold}") for threshold in (0.06, 0.1, 0.15)),
        *(("teacache", f"teacache:threshold={threshold},polynomial={fitted}") for threshold in (0.2, 0.4, 0.6)),
    ]  # fmt: skip
    interval = guidance.interval(guidance.cfg(SCALE), 0.0, 0.5)
    return [
        (f"{STEPS} steps", "fewer steps", {}),
        *((f"{steps} steps", "fewer steps", {"steps": steps}) for steps in (20, 14, 10)),
        (f"{STEPS // 2} steps of adams_bashforth_2", "fewer steps, AB2", {"steps": STEPS // 2, "method": ode.AB2}),
        ("`--guidance interval:stop=0.5`", "guidance interval", {"guidance": interval}),
        *((f"`{'--fast' if text == 'fast' else f'--cache {text}'}`", family, {"cache": caches.parse(text)})
          for family, text in words),
    ]  # fmt: skip


def draw(drawn: Case, options: dict[str, Any]) -> Drawn:
    """Every image alone, so that a cache decides for it alone."""
    counts = {"evaluations": 0, "rows": 0}

    def counting(apply: Callable) -> Callable:
        counts["evaluations"] += 1

        def block(params: Any, heads: int, streams: Any, *rest: Any, **given: Any) -> Any:
            counts["rows"] += len(streams["image"])
            return apply(params, heads, streams, *rest, **given)

        return block

    latents, seconds = [], 0.0
    for index in range(len(drawn.noise)):
        rows = slice(index, index + 1)
        begun = time.process_time()
        latents.append(
            pipeline.sample(
                drawn.model.params, drawn.model.config, pipeline.slice_batch(drawn.conditions, rows),
                drawn.noise[rows], block_transform=counting, **{"steps": STEPS, "cfg": SCALE, **options},
            )
        )  # fmt: skip
        seconds += time.process_time() - begun
    return Drawn(torch.cat(latents), counts["evaluations"], counts["rows"], seconds)


def measure(
    drawn: Case, scenes: Sequence[shapes.Scene], listed: Sequence[tuple[str, str, dict[str, Any]]], converged: Tensor
) -> list[Row]:
    """A row for each way; the first is what the others are compared with."""
    rows: list[Row] = []
    exact: Drawn | None = None
    for name, family, options in listed:
        own = draw(drawn, options)
        exact = exact or own
        errors, others = (
            [error(one[None], other[None]) for one, other in zip(own.latents, reference, strict=True)]
            for reference in (exact.latents, converged)
        )
        images = pipeline.decode(drawn.model.params, drawn.model.config, own.latents)
        rows.append(
            Row(
                name, family, own.evaluations / len(errors), own.block_rows / exact.block_rows,
                own.seconds / exact.seconds, statistics.mean(errors), statistics.median(errors),
                statistics.mean(others), statistics.median(others), prompts.table(images, scenes)["right"],
            )
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def fitted(drawn: Case, degree: int = 2) -> tuple[float, ...]:
    """The polynomial of TeaCache: from the change of the first block's modulated input between neighbouring steps of
    the exact run to that of the guided velocity."""
    model, samples = drawn.model, len(drawn.noise)
    guiding = guidance.cfg(SCALE)
    fields = pipeline.velocities(model.params, model.config, drawn.conditions, guiding.needs)
    state, before, pairs = {}, None, []
    x, times = drawn.noise, pipeline.sigmas(model.config, drawn.noise, STEPS)
    for t, following in zip(times[:-1], times[1:], strict=True):
        seen = block_cache.Evaluation(state, 0.0, after_first=False, samples=samples, is_computed=True)
        velocity = guiding.combine(fields(x, t, lambda index, seen=seen: seen.transform), x, t, [])[0]
        if before is not None:
            distance = block_cache.relative_distance(seen.state["signal"], state["signal"])
            pairs.append((distance.reshape(-1, samples).amax(0), block_cache.relative_distance(velocity, before)))
        state, before = seen.state, velocity
        x = x + (following - t) * velocity
    distances, changes = (torch.cat(each) for each in zip(*pairs, strict=True))
    return block_cache.fit(distances, changes, degree)


def tables(rows: Sequence[Row]) -> str:
    """Markdown of the rows in their order."""
    lines = [
        "| way | evaluations | blocks, % | time, % | error, % (median) | to the converged run, % (median) | right, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.evaluations:.1f} | {100 * row.blocks:.0f} | {100 * row.time:.0f} | "
            f"{percent(row.error)} ({percent(row.median)}) | "
            f"{percent(row.to_converged)} ({percent(row.converged_median)}) | {100 * row.right:.0f} |"
        )
    return "\n".join(lines)


def read_tables(text: str) -> list[Row]:
    """The rows of `tables`, with the digits that are written there."""
    (polynomial,) = {match for match in re.findall(r"polynomial=([^`]*)`", text)} or {"0"}
    families = {name: family for name, family, _ in ways([float(word) for word in polynomial.split("/")])}
    rows = []
    for line in text.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name in families:
            evaluations, blocks, time, *percents = (float(word) for word in re.findall(r"[\d.]+", " ".join(cells)))
            rows.append(Row(name, families[name], evaluations, *(each / 100 for each in (blocks, time, *percents))))
    return rows


def image(rows: Sequence[Row], steps: int = STEPS):
    """Median error against blocks computed, in evaluations' worth, to the exact and to the converged run."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {"to all steps": {}, "to the converged run": {}}
    for row in rows:
        worth = steps * row.blocks
        if row.error:
            lines["to all steps"].setdefault(row.family, []).append((worth, row.median))
        lines["to the converged run"].setdefault(row.family, []).append((worth, row.converged_median))
    return plot.panels(lines, "evaluations' worth of blocks", "median error")


def captions(pairs: int) -> list[tuple[str, shapes.Scene]]:
    """The held-out captions of `evaluations.case`, with their scenes."""
    counts = (1, pairs - pairs // 2), (2, pairs // 2)
    return [
        listed[index * len(listed) // count]
        for things, count in counts
        for listed in [shapes.held_out_captions(things)]
        for index in range(count)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=None)
    parser.add_argument("--pairs", type=int, default=16, help="prompts, each with noise of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, default=DOCS / "sampling.md", help="the page whose section is written")
    parser.add_argument("--redraw", action="store_true", help="only draw the plot again, of the numbers on the page")
    parsed = parser.parse_args(arguments)
    if parsed.redraw:
        written = section(parsed.page.read_text(encoding="utf-8"), NAME)
        return plot.save(image(read_tables(written)), parsed.page.parent / "caching.png")
    begun = time.process_time()
    model = weights.load(parsed.params or shipped.folder(), dtype=torch.float32)
    with torch.no_grad():
        drawn = case(model, parsed.pairs, parsed.seed)
        # On prompts and noise of their own.
        other = case(model, 4, parsed.seed + 1)
        polynomial = fitted(other)
        velocity = pipeline.velocity(model.params, model.config, drawn.conditions, SCALE)
        converged = adaptive.solve(ode.BOSH3, velocity, drawn.noise, [1.0, 0.0], rtol=CONVERGED, atol=CONVERGED).x[-1]
        scenes = [scene for _, scene in captions(parsed.pairs)]
        rows = measure(drawn, scenes, ways(polynomial), converged)
    minutes = (time.process_time() - begun) / 60
    text = (
        f"{STEPS} steps of Euler's method at guidance scale {SCALE:g}, {parsed.pairs} held-out prompts with noise of\n"
        "their own, each image drawn alone; errors are means of |x - exact| / |exact| over the latents. Made in "
        f"{minutes:.0f} minutes of one core by `python -m bench.caching`.\n\n{tables(rows)}"
    )
    plot.save(image(rows), parsed.page.parent / "caching.png")
    page = with_section(parsed.page.read_text(encoding="utf-8"), text, NAME)
    files.write_atomic(parsed.page, page.encode())
    print(text)


if __name__ == "__main__":
    main()
