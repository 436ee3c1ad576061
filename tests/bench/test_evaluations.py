"""The table of errors against evaluations, in miniature."""

import numpy
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


def places(image, colour, left=0, right=None):
    """(row, column) of each pixel of nearly that colour, in order of columns."""
    levels = numpy.asarray(image.convert("RGB"), dtype=int)[:, left:right]
    return sorted(numpy.argwhere(abs(levels - colour).max(-1) < 8).tolist(), key=lambda place: place[1])


def test_lines_fall_where_their_values_fall():
    # Black is the colour of the axes too: the second line is red.
    lines = {"flat": [(4, 0.01), (56, 0.01)], "falling": [(4, 0.1), (56, 0.001)]}
    image = plot.panels({"one": lines}, "x", "y")
    red = places(image, plot.COLOURS[1], right=plot.WIDTH)
    black = places(image, plot.COLOURS[0], 60, plot.WIDTH - 10)
    (top, left), (bottom, right) = red[0], red[-1]
    assert bottom > top + plot.HEIGHT / 2 and right > left + plot.WIDTH / 2
    # On logarithmic axes the middle of both lines is the same point.
    row, column = (top + bottom) / 2, (left + right) / 2
    assert min(abs(each[0] - row) + abs(each[1] - column) for each in red) <= 6
    assert min(abs(each[0] - row) + abs(each[1] + 60 - column) for each in black) <= 6
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
    point = places(plot.plane({"": torch.zeros(1, 2)}), plot.COLOURS[6])
    middle = torch.tensor([plot.LABEL * 2 + 120 - 2.4, 120.0])
    assert point and (torch.tensor(point).float() - middle).abs().max() <= 4
    right = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    arrow = plot.plane({}, arrows=right)
    row = arrow.convert("L").crop((125, 40, 195, 240))
    assert row.getextrema()[0] < 100 and arrow.convert("L").crop((10, 40, 110, 240)).getextrema()[0] > 200
    one = plot.bars({"one": 1.0, "two": 2.0})
    both = plot.beside([one, sheet])
    assert both.size == (one.width + 8 + sheet.width, max(one.height, sheet.height))
    blue = places(one, plot.COLOURS[6])
    lengths = [sum(place[0] == at for place in blue) for at in (one.height // 3, one.height * 2 // 3)]
    assert lengths[1] == pytest.approx(2 * lengths[0], rel=0.02) and lengths[0] > 100
    plot.save(both, tmp_path / "new" / "figure.png")
    with Image.open(tmp_path / "new" / "figure.png") as written:
        assert written.size == both.size
