"""The study of post-training in miniature: runs that are killed and go on, what is measured of them, the page."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from bench import plot
from bench.study import __main__ as command
from bench.study import memory, page, results, runs, scoring, training
from bench.study.results import Row
from functional_sd3 import weights
from functional_sd3.cli import parser
from functional_sd3.core import tree
from functional_sd3.training import recorder
from functional_sd3.weights import shipped
from tests import models

SMALL = "--batch-size 4 --group 2 --sampling-steps 2 --draws 1 --reward shapes --weight partial=1"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "model"
    weights.save(folder, models.random_model())
    return folder


@pytest.fixture
def seconds(monkeypatch):
    """Every update takes one second."""
    readings = iter(range(10_000))
    monkeypatch.setattr(training, "time", SimpleNamespace(process_time=lambda: float(next(readings))))


def prepared(start, folder):
    words = f"reward --method nft {SMALL} --device cpu --resume"
    return training.prepare([*words.split(), "--params", str(start), "--out", str(folder)])


def test_a_run_that_is_killed_goes_on_to_the_same_bits(start, tmp_path, seconds):
    def run(folder, on_mark, **options):
        return training.advance(prepared(start, folder), folder, [2.0, 5.0], on_mark, **options)

    whole, parts = [], []
    assert run(tmp_path / "whole", lambda *mark: whole.append(mark), save_seconds=1.0)
    assert [mark[:3] for mark in whole] == [(2.0, 2.0, 2), (5.0, 5.0, 5)]

    def stopped(mark, *_):
        os.kill(os.getpid(), signal.SIGTERM)

    assert not run(tmp_path / "parts", stopped)

    def killed(*_):
        raise MemoryError

    with pytest.raises(MemoryError):
        run(tmp_path / "parts", killed)
    assert run(tmp_path / "parts", lambda *mark: parts.append(mark))
    assert [mark[:3] for mark in parts] == [mark[:3] for mark in whole]
    for one, other in zip(whole, parts, strict=True):
        pairs = zip(tree.leaves(one[3]), tree.leaves(other[3]), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert (tmp_path / "parts" / "model_index.json").exists()
    assert len((tmp_path / "parts" / "log.csv").read_text().splitlines()) == 1 + 2
    # A larger budget goes on: what was measured before is not measured again, but for the mark it ended at.
    setup = prepared(start, tmp_path / "parts")
    assert training.advance(setup, tmp_path / "parts", [2.0, 5.0, 6.0], lambda *mark: parts.append(mark))
    assert [mark[2] for mark in parts[2:]] == [5, 6]


def test_a_run_that_started_from_another_model_is_refused(start, tmp_path, seconds):
    training.advance(prepared(start, tmp_path), tmp_path, [1.0], lambda *mark: None)
    other = prepared(start, tmp_path)
    settings = {**other.settings, "lr": 0.5}
    differing = other._replace(settings=settings, differences=lambda saved: ["lr 0.0001 -> 0.5"])
    with pytest.raises(ValueError, match="other settings: lr"):
        training.advance(differing, tmp_path, [2.0], lambda *mark: None)


def small_runs():
    reward = f"reward --method nft {SMALL}"
    distill = "distill --to 2 --method segments --pictures 4 --batch-size 2 --inner 2 --warmup 1 --cfg 1"
    return [
        runs.Run("NFT", runs.REWARDED, reward, 2.0, (runs.REWARD_STEPS,)),
        runs.Run("segments to 4", runs.DISTILLED, distill, 1.0, (2, 1)),
        runs.Run("segments to 2", runs.DISTILLED, distill.replace("--to 2", "--to 1").replace("--inner 2 ", ""), 1.0,
                 (1,), start="segments to 4"),
        runs.Run("unheard of", runs.DISTILLED, distill.replace("segments", "none"), 1.0, (1,)),
    ]  # fmt: skip


def test_the_study_measures_every_run_at_its_marks_and_makes_none_twice(start, tmp_path, monkeypatch, capsys):
    measured_scores = {"images": 2, "right": 0.5, "colours": 0.75}
    monkeypatch.setattr(scoring, "scores", lambda model, drawing: measured_scores)
    rows_file, out = tmp_path / "rows.csv", tmp_path / "out"
    assert command.study(small_runs(), start, out, rows_file, captions=2, unit=1e-6)
    rows = results.read(rows_file)
    measured = {row.of for row in rows}
    assert len(measured) == len(rows)
    alone = {("start", 0, 0.0, 2, steps, 1.0) for steps in (8, 4, 2, 1)}
    final = {(1, 8, 1.0), (2, 28, 5.0)}
    assert measured == (
        alone
        | {("start", 0, 0.0, *each) for each in final}
        | {("NFT", 0, mark, 2, 8, 1.0) for mark in (1.0, 2.0)}
        | {("NFT", 0, 2.0, *each) for each in final}
        | {("segments to 4", 0, 1.0, 2, steps, 1.0) for steps in (2, 1)}
        | {("segments to 2", 0, 1.0, 2, 1, 1.0)}
    )
    assert all((row.right, row.colours, row.images) == (0.5, 0.75, 2) and row.processor for row in rows)
    assert [row.updates for row in rows if row.run == "NFT"][:2] == [1, 1]
    assert "unheard of, seed 0: passed over" in capsys.readouterr().out

    def none_is_made(words):
        raise AssertionError(words)

    monkeypatch.setattr(training, "prepare", none_is_made)
    assert command.study(small_runs()[:3], start, out, rows_file, captions=2, unit=1e-6)
    assert results.read(rows_file) == rows


def test_a_model_is_measured_by_both_readers_the_proxy_and_the_spread():
    model = weights.load(shipped.folder(), dtype=torch.float32)
    good = scoring.scores(model, scoring.Drawing(1, 8, 1.0, 4))
    assert good["images"] == 4 and good["right"] >= 0.5 and good["outlines"] >= 0.5 and good["colours"] > 0.9
    assert 0 <= good["distance"] <= 1
    bad = scoring.scores(model, scoring.Drawing(2, 1, 1.0, 2))
    assert bad["right"] == 0 and bad["place"] is None and bad["colours"] < good["colours"]


def test_a_run_that_diverges_is_a_row_and_the_next_run_is_made(start, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_measure", lambda *arguments: None)
    made = []

    def advance(setup, folder, *rest):
        made.append(folder.name)
        if len(made) == 1:
            raise recorder.DivergedError("loss is nan at step 3")
        return True

    monkeypatch.setattr(training, "advance", advance)
    first, second = small_runs()[0], small_runs()[0]._replace(seed=1)
    assert command.study([first, second], start, tmp_path, tmp_path / "rows.csv", captions=2)
    assert made == ["nft-0", "nft-1"]
    (row,) = results.read(tmp_path / "rows.csv")
    assert (row.run, row.seed, row.note) == ("NFT", 0, "diverged: loss is nan at step 3")
    assert "NFT, seed 0: diverged" in page.tables([row])


def test_marks_are_regular_and_end_with_the_budget():
    assert command.marks(4.0) == [1.0, 2.0, 4.0] and command.marks(5.0) == [1.0, 2.0, 4.0, 5.0]
    assert command.marks(0.5) == [0.5] and command.marks(12.0)[-2:] == [10.0, 12.0]


def test_every_run_is_a_command_line_and_the_first_are_one_seed_of_each_method():
    table = runs.table()
    for run in table:
        if runs.is_known(run):
            options = parser.parse([*run.words.split(), "--out", "x"]).options
            assert options.method == run.method
        assert run.start is None or run.start in {each.name for each in table[: table.index(run)]}
    assert [run.name for run in table[: len(runs.METHODS)]] == list(runs.METHODS)
    assert len({run.folder for run in table}) == len(table) == 3 * len({run.name for run in table})
    assert {run.name for run in runs.chosen(table, ["NFT"], 2)} == {"NFT"}
    with pytest.raises(ValueError, match="'nft' must be one of NFT, AWM"):
        runs.chosen(table, ["nft"], 2)


def rows_of_a_study():
    start = [Row("start", 0, 0.0, 0.0, 0, 2, steps, 1.0, 200, right, right, 0.9, 1.0, 1.0, 0.1, processor="P (avx2)")
             for steps, right in ((8, 0.7), (4, 0.5), (2, 0.3), (1, 0.0))]  # fmt: skip
    nft = [
        Row("NFT", seed, mark, 60 * mark, int(10 * mark), 2, 8, 1.0, 200, right, 0.6, 0.95, 0.8, 0.9, 0.2,
            command="reward --method nft")
        for seed, mark, right in ((0, 1.0, 0.8), (0, 2.0, 0.9), (1, 1.0, 0.7), (1, 2.0, 0.8), (1, 4.0, 0.85))
    ]  # fmt: skip
    proxy = Row("NFT by colours", 0, 4.0, 240.0, 50, 2, 8, 1.0, 200, 0.6, 0.5, 0.99)
    student = [Row("MeanFlow", 0, 12.0, 720.0, 70, 2, n, 1.0, 200, right) for n, right in ((4, 0.8), (1, 0.1))]
    return [*start, *nft, proxy, *student]


def test_rows_are_kept_as_they_are(tmp_path):
    path = tmp_path / "rows.csv"
    for row in rows_of_a_study():
        results.add(path, row)
    assert results.read(path) == rows_of_a_study()
    results.add(path, rows_of_a_study()[0]._replace(right=0.25))
    assert len(results.read(path)) == len(rows_of_a_study()) and results.read(path)[-1].right == 0.25
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="must name the columns run, seed"):
        results.read(path)


def test_the_tables_have_means_over_seeds_after_equal_time():
    text = page.tables(rows_of_a_study(), [memory.Peak(memory.PLAIN, 70.0, 100.0), memory.Peak("NFT", 90.0, 150.0)])
    assert "| start | 1 | 0 | 70.0 |  |  |  | 70.0 |  |  | 1.00 | 1.00 |" in text
    # The last mark that both seeds reached is 2 minutes.
    assert "| NFT | 2 | 20 |  | 75.0 (70.0 to 80.0) | 85.0 (80.0 to 90.0) | 85.0 | 60.0 |" in text
    assert "| NFT | 1 | 4 | 99.00 | 60.0 | 50.0 |  |" in text
    assert "| start | 1 | 0 | 0 | 50.0 | 30.0 | 0.0 |" in text and "| MeanFlow | 1 | 12 | 70 | 80.0 |  | 10.0 |" in text
    assert f"Begun or done: 4 of {len(runs.table())} runs" in text
    assert "| NFT | 90 | 150 | 1.50 |" in text and "P (avx2)" in text and "| NFT | reward | `--method nft` |" in text


def test_the_plot_is_small_and_has_a_line_for_each_method(tmp_path):
    drawn = page.image(rows_of_a_study())
    assert drawn.size == (2 * plot.WIDTH + plot.LEGEND, 2 * plot.HEIGHT)
    colours = {colour for _, colour in drawn.convert("RGB").getcolors(10_000)}
    assert {plot.COLOURS[0], plot.COLOURS[1]} <= colours
    with pytest.raises(ValueError, match="no points"):
        page.image([])
    guide = tmp_path / "guide.md"
    guide.write_text("before\n<!-- study: written by bench.study -->\nold\n<!-- end of study -->\nafter\n")
    command.draw(guide, rows_of_a_study(), [])
    assert guide.read_text().startswith("before\n") and "### By rewards" in guide.read_text()
    assert "old" not in guide.read_text() and guide.with_suffix(".png").stat().st_size < 60_000


def test_every_line_has_a_colour_of_its_own():
    lines = {f"line {index}": [(1, index + 1), (2, index + 3), (4, 2 * index + 4)] for index in range(14)}
    drawn = plot.panels({"all": lines}, "x", "y").convert("RGB")
    assert {*plot.COLOURS} <= {colour for _, colour in drawn.getcolors(10_000)}


def test_linear_axes_place_values_evenly():
    points = [(0.0, 0.0), (1.0, 50.0), (4.0, 100.0)]
    image = plot.panels({"one": {"": points[:1], "line": points}}, "x", "y", linear=True).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)
    # Left of the legend, where the line is too.
    rows, columns = (pixels[:, :480] == torch.tensor(plot.COLOURS[1])).all(-1).nonzero().unbind(1)
    middle = columns[(rows - (rows.min() + rows.max()) / 2).abs() < 2].float().mean()
    assert abs(middle - columns.min() - (columns.max() - columns.min()) / 4) < 8
    assert columns.max() - columns.min() > plot.WIDTH / 2 and rows.max() - rows.min() > plot.HEIGHT / 2


def test_the_slow_copy_is_what_a_method_keeps_beside_a_plain_steps_state(start, tmp_path):
    commands = memory.commands(batch=4)
    assert {memory.PLAIN, *runs.METHODS, *runs.STUDENTS} == set(commands)
    plain = memory.measure(memory.PLAIN, commands[memory.PLAIN], start)
    nft = memory.measure("NFT", f"{commands['NFT']} --group 2 --sampling-steps 2 --weight partial=1", start)
    assert nft.state / plain.state == pytest.approx(5 / 4, rel=0.02)
    assert plain.update > 0 and nft.update > 0
    for peak in (plain, nft, plain):
        memory.add(tmp_path / "peaks.csv", peak)
    assert [peak.name for peak in memory.read(tmp_path / "peaks.csv")] == ["NFT", memory.PLAIN]
