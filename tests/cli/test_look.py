"""`functional-sd3 look`: a folder with the page, the same image as `generate`, and a message for every bad input."""

import pytest
from PIL import Image

from functional_sd3 import cli
from functional_sd3.cli import look

PROMPT = "a large red circle on a white background"


@pytest.mark.filterwarnings("ignore:weights stored in")
def test_the_page_is_of_the_image_that_generate_draws(tmp_path, capsys):
    words = [PROMPT, "--seed", "3", "--steps", "2", "--cfg", "3", "--guidance", "rescaled", "--cache", "hold:every=2"]
    options = ["--attention-steps", "1", "--attention-blocks", "1,0", "--frames", "1"]
    assert cli.main(["look", *words, *options, "--out", f"{tmp_path}/look/"]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[0] == f"{tmp_path}/look/index.html" and "by block and step" in open(printed[0]).read()
    assert cli.main(["generate", *words, "--out", f"{tmp_path}/x.png"]) == 0
    ours, theirs = (Image.open(tmp_path / name) for name in ("look/image.png", "x.png"))
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
        ([PROMPT, "--frames", "0"], "--frames 0 must be at least 1"),
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
