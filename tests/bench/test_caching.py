"""The table of caches in miniature: what is counted and compared, and that the page has what the command writes."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import caching, evaluations, plot
from functional_sd3.flow import caches
from tests import models

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sampling.md"
MARKS = "<!-- caching: written by bench.caching -->", "<!-- end of caching -->"


@pytest.fixture(scope="module")
def drawn():
    with torch.no_grad():
        return evaluations.case(models.random_model(), 2, 0)


@torch.no_grad()
def test_evaluations_and_blocks_are_counted_where_they_are_computed(drawn):
    depth, exact = drawn.model.config.transformer.depth, caching.draw(drawn, {"steps": 8})
    assert (exact.evaluations, exact.block_rows) == (2 * 8, 2 * 8 * depth * 2)
    half = caching.draw(drawn, {"steps": 8, "cache": caches.Extrapolate(2)})
    assert (half.evaluations, half.block_rows) == (2 * 5, 2 * 5 * depth * 2)
    first = caching.draw(drawn, {"steps": 8, "cache": caches.FirstBlock(9.0)})
    assert (first.evaluations, first.block_rows) == (2 * 8, 2 * 2 * (2 * depth + 6))


@torch.no_grad()
def test_rows_are_compared_with_the_first(drawn):
    listed = [("all", "a", {"steps": 6}), ("hold", "b", {"steps": 6, "cache": caches.Extrapolate(3, 0)})]
    exact = caching.draw(drawn, {"steps": 6}).latents
    scenes = [scene for _, scene in caching.captions(2)]
    rows = caching.measure(drawn, scenes, listed, exact)
    assert [row.name for row in rows] == ["all", "hold"]
    assert rows[0].error == rows[0].to_converged == 0 and rows[0].blocks == rows[0].time == 1
    # Steps 0, 2, 4 and 5 of 6.
    assert rows[1].evaluations == 4 and rows[1].blocks == pytest.approx(4 / 6)
    assert rows[1].error == pytest.approx(rows[1].to_converged, rel=1e-5) and rows[1].error > 0
    assert all(0 <= row.right <= 1 for row in rows)


@torch.no_grad()
def test_the_polynomial_of_teacache_is_fitted_to_the_exact_run(drawn):
    coefficients = caching.fitted(drawn)
    assert len(coefficients) == 3 and coefficients[-1] == 0
    (name,) = {options["cache"].polynomial for *_, options in caching.ways(coefficients)
               if isinstance(options.get("cache"), caches.TeaCache)}  # fmt: skip
    assert name == pytest.approx(coefficients, rel=1e-2)


def test_captions_are_those_that_are_drawn():
    texts = [text for text, _ in caching.captions(3)]
    assert len(texts) == len(set(texts)) == 3


def test_the_table_and_the_plot_have_every_row():
    rows = [
        caching.Row("28 steps", "fewer steps", 28, 1, 1, 0, 0, 0.04, 0.03, 1.0),
        caching.Row("14 steps", "fewer steps", 14, 0.5, 0.5, 0.123, 0.08, 0.15, 0.1, 0.9),
        caching.Row("`--fast`", "fast", 14, 0.5, 0.51, 0.05, 0.04, 0.06, 0.05, 0.95),
    ]
    text = caching.tables(rows)
    assert "| 28 steps | 28.0 | 100 | 100 | 0 (0) | 4 (3) | 100 |" in text
    assert "| 14 steps | 14.0 | 50 | 50 | 12 (8) | 15 (10) | 90 |" in text
    assert "| `--fast` | 14.0 | 50 | 51 | 5 (4) | 6 (5) |" in text
    assert caching.tables(caching.read_tables(text)) == text and len(caching.read_tables(text)) == 3
    image = caching.image(rows).convert("RGB")
    assert image.size == (2 * plot.WIDTH + plot.LEGEND, plot.HEIGHT)
    assert {plot.COLOURS[0], plot.COLOURS[1]} <= {colour for _, colour in image.getcolors(10_000)}


def test_the_plot_is_drawn_again_of_the_table_of_the_page(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    for bench, name in ((caching, "caching"), (evaluations, "evaluations")):
        table = evaluations.section(page, name)
        # But for the bold of numbers that are alike as far as they are written.
        assert bench.tables(bench.read_tables(table)).replace("**", "") in table.replace("**", "")
        bench.main(["--redraw", "--page", str(tmp_path / "page.md")])
        with Image.open(tmp_path / f"{name}.png") as image, Image.open(PAGE.parent / f"{name}.png") as kept:
            assert image.size == kept.size
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page


def test_the_page_has_a_row_for_every_way_and_its_preset_keeps_its_promise():
    page = PAGE.read_text(encoding="utf-8")
    section = page[page.index(MARKS[0]) + len(MARKS[0]) : page.index(MARKS[1])]
    written = [
        line.split(" | ") for line in section.splitlines() if line.startswith("| ") and "evaluations" not in line
    ]
    names = [row[0].removeprefix("| ") for row in written]
    polynomial = re.findall(r"polynomial=([^`]*)`", section)[0]
    coefficients = [float(word) for word in polynomial.split("/")]
    assert names == [name for name, *_ in caching.ways(coefficients)]
    by_name = dict(zip(names, written, strict=True))

    def error(name):
        return float(by_name[name][4].split(" ")[0])

    assert float(by_name["`--fast`"][1]) <= caching.STEPS / 2
    assert error("`--fast`") <= error("14 steps") / 2
    assert (PAGE.parent / "caching.png").stat().st_size < 60_000
