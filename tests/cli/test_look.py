"""`functional-sd3 look`: a folder with the page, the same image as `generate`, and a message for every bad input."""

import io
from pathlib import Path

import pytest
from PIL import Image

from functional_sd3 import cli
from functional_sd3.cli import look

PROMPT = "a large red circle on a white background"


@pytest.mark.filterwarnings("ignore:weights stored in")
def test_the_page_is_of_the_image_that_generate_draws(tmp_path, capsys):
    words = [PROMPT, "--seed", "3", "--steps", "2", "--cfg", "3", "--guidance", "rescaled", "--cache", "hold:every=2"]
    options = ["--attention-steps", "1", "--attention-blocks", "1,0", "--image-steps", "1"]
    assert cli.main(["look", *words, *options, "--out", f"{tmp_path}/look/"]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[0] == f"{tmp_path}/look/index.html" and "by block and step" in Path(printed[0]).read_text()
    assert cli.main(["generate", *words, "--out", f"{tmp_path}/x.png"]) == 0
    ours, theirs = (Image.open(io.BytesIO((tmp_path / name).read_bytes())) for name in ("look/image.png", "x.png"))
    assert ours.tobytes() == theirs.tobytes() and ours.text == theirs.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no prompt"),
        ([PROMPT, "--out", "look.html"], "must be a folder"),
        ([PROMPT, "--out", "look.png"], "must be a folder"),
        ([PROMPT, "--out", ""], "must be a folder"),
        ([PROMPT, "--out", "FILE"], "is a file; a folder is needed"),
        ([PROMPT, "--attention-steps", "-1"], "--attention-steps -1 must be at least 0"),
        ([PROMPT, "--attention-blocks", "a,b"], "--attention-blocks 'a,b' must be numbers"),
        ([PROMPT, "--image-steps", "0"], "--image-steps 0 must be at least 1"),
        ([PROMPT, "--method", "eulr"], "did you mean euler"),
        ([PROMPT, "--strength", "0.5"], "needs --image"),
        (["a", "red", "circle"], "a text of several words needs quotes around it"),
        ([PROMPT, "--count", "2"], "unrecognized arguments: --count"),
    ],
    ids=str,
)
def test_every_bad_input_has_a_message(words, said, tmp_path, capsys, monkeypatch):
    (tmp_path / "FILE").write_text("x")
    monkeypatch.chdir(tmp_path)
    try:
        assert cli.main(["look", *words]) == 1
    except SystemExit as error:
        assert error.code == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib_nothing_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(look.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["look", PROMPT, "--out", str(tmp_path)]) == 1
    assert 'pip install "functional_sd3[look]"' in capsys.readouterr().err


@pytest.fixture
def logs(tmp_path):
    rows = "step,seconds,loss,grad_norm,rate,bin_0,bin_1,validation,note\n" + "".join(
        f"{step},{step / 2},{1 / step},1.5,0.001,{1 / step},{2 / step},{'' if step % 2 else 0.5},x\n"
        for step in (1, 2, 3)
    )
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "log.csv").write_text(rows + "4,9")
    (tmp_path / "other.csv").write_text("step,loss,reward\n1,2,0.1\n5,1,0.9\n")
    return tmp_path


def test_a_log_has_a_plot_of_every_column(logs, capsys):
    assert cli.main(["look", "--log", f"{logs}/one", "--out", f"{logs}/look"]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == [
        "index.html",
        *(f"{each}.png" for each in ("loss", "bin", "rate", "grad_norm", "seconds", "validation")),
    ]
    page = (logs / "look" / "index.html").read_text()
    assert "not plotted, as it holds no numbers: note" in page and "loss by t over the steps" in page
    assert "at the end: t in [0, 0.5] 0.3333, t in [0.5, 1] 0.6667" in page


def test_logs_are_compared_in_the_same_plots(logs, capsys):
    assert (
        cli.main(["look", "--log", f"{logs}/one/log.csv", "--log", f"{logs}/other.csv", "--out", f"{logs}/look"]) == 0
    )
    page = (logs / "look" / "index.html").read_text()
    assert f"loss over the steps; at the end: {logs}/one/log.csv 0.3333, {logs}/other.csv 1." in page
    assert f"reward over the steps; at the end: {logs}/other.csv 0.9." in page and "loss of t in [0.5, 1]" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--log", "nowhere"], "nowhere: there is no such log"),
        (["--log", "no_step.csv"], "must name each column once, step among them"),
        (["--log", "empty.csv"], "empty.csv: is empty; a log is a CSV with a column step"),
        (["--log", ""], "the path of a log is empty"),
        (["--log", "infinite.csv"], "holds no row with a step"),
        (["--log", "no_rows.csv"], "holds no row with a step"),
        (["--log", "other.csv", "--seed", "3"], "--log plots logs and draws no image: leave out --seed, or --log"),
        (["--log", "other.csv", PROMPT], "leave out PROMPT"),
    ],
    ids=str,
)
def test_every_bad_log_has_a_message(words, said, logs, capsys, monkeypatch):
    monkeypatch.chdir(logs)
    (logs / "no_step.csv").write_text("epoch,loss\n1,2\n")
    (logs / "no_rows.csv").write_text("step,loss\n")
    (logs / "empty.csv").write_text("")
    (logs / "infinite.csv").write_text("step,loss\ninf,1\nnan,1\n")
    assert cli.main(["look", *words]) == 1 and said in capsys.readouterr().err


def test_what_no_chart_shows_of_a_log_is_on_the_page(tmp_path):
    rows = "\ufeffstep,loss,rare\n1,0.5,\n2,nan,3\n3,1e308,\n1e300,1,1\n4,1\n"
    (tmp_path / "log.csv").write_text(rows)
    assert cli.main(["look", "--log", str(tmp_path), "--out", f"{tmp_path}/look"]) == 0
    page = (tmp_path / "look" / "index.html").read_text()
    assert "2 of 3 values of loss are not finite, the first at step 2" in page
    assert "1 of 5 rows have more or fewer values than there are columns" in page
    assert "1 of 5 rows have no step that is a number up to 2^53" in page
    # A column that only some rows have is no fault.
    assert "values of rare" not in page
