"""`--params tiny-4` on the command line: four steps without guidance by default, from any folder."""

import pytest

from functional_sd3.cli import main, options, prompt_words
from functional_sd3.weights import shipped

PROMPT = "a small red circle on a white background"


def test_the_names_are_those_of_the_weights():
    assert options.SHIPPED == shipped.NAMES


def test_the_student_draws_in_four_steps_without_guidance(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "--params", "tiny-4", "--out", "image.png"]) == 0
    said = capsys.readouterr().err
    assert "distilled for 4 or 2 steps and has guidance folded in: drawn in 4 steps, --cfg 1" in said
    assert (tmp_path / "image.png").is_file()


@pytest.mark.parametrize(
    ("steps", "status", "said"),
    [
        ("2", 0, None),
        ("4", 0, None),
        ("1", 0, "--steps 1 of a model distilled for 4 or 2: each spans 2 of the steps"),
        ("3", 1, "it is drawn in 4 or 2 steps"),
    ],
)
def test_the_student_is_for_four_steps_and_for_two(tmp_path, capsys, monkeypatch, steps, status, said):
    monkeypatch.chdir(tmp_path)
    words = ["generate", PROMPT, "--params", "tiny-4", "--cfg", "1", "--steps", steps, "--out", "image.png"]
    assert main(words) == status
    lines = capsys.readouterr().err
    assert said in lines if said else "distilled" not in lines and "trained" not in lines
    assert (tmp_path / "image.png").is_file() == (status == 0)


def test_inspection_names_both_folders(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "tiny-4", "--quick"]) == 0
    said = capsys.readouterr().out
    assert str(shipped.folder("tiny-4") / "transformer") in said and str(shipped.folder("tiny") / "vae") in said


@pytest.mark.parametrize("params", [None, ["tiny"], ["tiny-4"], [str(shipped.folder("tiny-4"))]])
def test_the_words_of_both_models_are_known(params):
    assert prompt_words.is_shipped(params)


@pytest.mark.parametrize("params", [["elsewhere"], ["tiny", "tiny-4"]])
def test_other_models_know_other_words(params):
    assert not prompt_words.is_shipped(params)


def test_a_misspelt_name_is_corrected(capsys):
    assert main(["generate", PROMPT, "--params", "tiny4"]) != 0
    said = capsys.readouterr().err
    assert "tiny-4" in said
