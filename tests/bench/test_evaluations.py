"""The table of errors against evaluations, in miniature."""

import pytest
import torch
from PIL import Image

from bench import evaluations, plot
from functional_sd3.flow import ode
from tests import models

MARKS = "<!-- evaluations: written by bench.evaluations -->", "<!-- end of evaluations -->"


@pytest.fixture(scope="module")
def drawn():
    with torch.no_grad():
        return evaluations.case(models.random_model(), 2, 0)


def test_a_budget_is_spent_as_far_as_whole_steps_go_and_never_passed():
    for method in ode.METHODS.values():
        for budget in evaluations.BUDGETS:
            steps = evaluations.steps_within(method, budget)
            assert ode.evaluations(method, steps) <= budget < ode.evaluations(method, steps + 1)
    assert evaluations.steps_within(ode.RK4, 3) == 0
    assert (evaluations.steps_within(ode.EULER, 28), evaluations.steps_within(ode.HEUN_EDM, 28)) == (28, 14)


@torch.no_grad()
def test_errors_are_of_the_run_against_the_converged_one_and_fall_with_the_budget(drawn):
    exact = evaluations.converged(drawn, 3.0, 1e-4).x[-1]
    rows = evaluations.stepped(drawn, [ode.EULER, ode.HEUN], 3.0, exact, (4, 16))
    assert [(row.method, row.steps, row.spent) for row in rows] == [
        ("euler", 4, 4), ("euler", 16, 16), ("heun", 2, 4), ("heun", 8, 16),
    ]  # fmt: skip
    errors = [row.error for row in rows]
    assert errors[0] > 1.5 * errors[1] > 0 and errors[2] > 2 * errors[3] > 0
    loose = evaluations.controlled(drawn, [ode.BOSH3], 3.0, exact, (1e-2, 1e-3))
    assert loose[0].error > loose[1].error and loose[0].spent < loose[1].spent
    assert loose[1].error < 3e-2


def test_the_error_is_the_mean_of_relative_norms():
    exact = torch.tensor([[[3.0, 4.0]], [[0.0, 10.0]]])
    assert evaluations.error(exact + torch.tensor([[[0.0, 1.0]]]), exact) == pytest.approx((1 / 5 + 1 / 10) / 2)


def test_the_tables_have_every_error_in_percent_and_the_best_in_bold():
    rows = [
        evaluations.Row("euler", 5.0, 4, 4, 4, 0.5),
        evaluations.Row("euler", 5.0, 8, 8, 8, 0.25),
        evaluations.Row("rk4", 5.0, 8, 2, 8, 0.0123),
        evaluations.Row("bosh3", 5.0, 1e-3, 9, 30.4, 0.001),
    ]
    text = evaluations.tables(rows)
    assert "Guidance scale 5:" in text and "| method | 4 | 8 |" in text
    assert "| euler | **50** | 25 |" in text and "| rk4 |  | **1.2** |" in text
    assert "| bosh3 | 1e-03 | 30: 0.1 |" in text
    image = evaluations.image(rows).convert("RGB")
    assert image.size == (plot.WIDTH + plot.LEGEND, plot.HEIGHT)
    assert {plot.COLOURS[0], plot.COLOURS[1], plot.COLOURS[2]} <= {colour for _, colour in image.getcolors(10_000)}


def test_lines_fall_where_their_values_fall():
    image = plot.panels({"one": {"falling": [(4, 0.1), (56, 0.001)]}}, "x", "y").convert("RGB")
    corner = plot.LEFT, plot.TOP
    far = plot.WIDTH - plot.RIGHT, plot.HEIGHT - plot.BOTTOM
    assert image.getpixel(corner) == image.getpixel((far[0] - 1, far[1] - 1)) == plot.COLOURS[0]
    assert image.getpixel((plot.LEFT + 40, far[1] - 40)) == (255, 255, 255)
    with pytest.raises(ValueError, match="no points"):
        plot.panels({"one": {}}, "x", "y")


def test_only_what_stands_between_the_marks_is_written_anew():
    page = f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n"
    assert evaluations.with_section(page, "new") == f"before\n{MARKS[0]}\nnew\n{MARKS[1]}\nafter\n"
    with pytest.raises(ValueError, match="has no"):
        evaluations.with_section("no marks", "new")


def test_labelled_tiles_maps_points_and_bars_stand_where_they_should(tmp_path):
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 4, 6)
    sheet = plot.tiles([red, 1 - red], ["a", "b"], scale=2, gap=4)
    assert sheet.size == (2 * 12 + 4, plot.LABEL + 8)
    assert sheet.getpixel((1, plot.LABEL)) == (255, 0, 0) and sheet.getpixel((17, plot.LABEL + 7)) == (0, 255, 255)
    colours = plot.heat(torch.tensor([[0.0, 2.0, -2.0, 1.0]]))
    assert colours[:, 0].T.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 1], [1, 0.5, 0.5]]
    middle = 120, plot.LABEL + 120
    assert plot.plane({"": torch.zeros(1, 2)}).getpixel((middle[0] - 1, middle[1] - 1)) == plot.COLOURS[6]
    right = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    assert plot.plane({}, arrows=right).getpixel((180, middle[1])) == (0, 0, 0)
    both = plot.beside([plot.bars({"one": 1.0, "two": 2.0}), sheet])
    assert both.getpixel((30 + 319, 30)) == plot.COLOURS[6] != both.getpixel((30 + 319, 10))
    plot.save(both, tmp_path / "new" / "figure.png")
    with Image.open(tmp_path / "new" / "figure.png") as written:
        assert written.size == both.size
