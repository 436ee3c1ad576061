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
    assert "distilled for 4 steps and has guidance folded in: drawn in 4 steps, --cfg 1" in said
    assert (tmp_path / "image.png").is_file()


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
