"""Every command line of README.md and docs/*.md runs: with small inputs in place of those it names, and few steps.

A command that nothing in `known` makes runnable fails, as one with a flag or a file that does not exist does.
"""

import re
import runpy
import shlex
import subprocess
import sys

import pytest

from functional_sd3 import cli
from functional_sd3.cli import parser
from tests.docs import known, markdown

_DRAWING = ("generate", "edit", "interpolate", "likelihood")
_OPTION = re.compile(r"(?<!\S)--[a-z][a-z0-9-]*+(?!_)")


def failure(run, capsys) -> str:
    """What went wrong, or nothing."""
    capsys.readouterr()
    try:
        status = run()
    except SystemExit as exit:
        status = exit.code
    except Exception as error:  # A traceback is a failure as any other.
        status = repr(error)
    said = capsys.readouterr().err.strip().splitlines()
    return "" if status in (0, None) else f"exit status {status}: {said[-1] if said else ''}"


def program(words: list[str], monkeypatch):
    """Runs `python ...` here: a module or a file with its arguments."""
    monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
    if words[0] == "-m":
        # A module that another test imported before would be run a second time with a warning.
        for name in (words[1], f"{words[1]}.__main__"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(markdown.ROOT / words[0]), run_name="__main__")


def recipe(target: str) -> list[str]:
    """The commands that make runs for a target once everything is installed."""
    installed = [each for stamp in ("installed", "installed-test") for each in ("-o", f".venv/{stamp}")]
    words = ["make", "-s", "-n", *installed, target]
    return subprocess.run(words, cwd=markdown.ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("page", markdown.PAGES, ids=lambda page: page.name)
def test_every_command_line_of_the_page_runs(page, folder, monkeypatch, capsys):
    failures = []
    for line, text in markdown.commands(page.read_text(encoding="utf-8")):
        words = shlex.split(text)
        if words[0] == "make":
            commands = known.MAKE[words[1]](recipe(words[1]))
        elif words[0] == "functional-sd3":
            commands = known.runs(text)
        else:
            commands = known.OTHERS[text]
        for each in commands:
            if each[0] == "python":
                said = failure(lambda words=each[1:]: program(words, monkeypatch), capsys)
            else:
                said = failure(lambda words=each: cli.main(words), capsys)
            if said:
                failures.append(f"{page.name}:{line}: {text}\n  run as {shlex.join(each)}\n  {said}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("page", markdown.PAGES, ids=lambda page: page.name)
def test_every_option_that_the_page_names_is_one_of_the_programs(page):
    known = {option for leaf in parser.leaves(parser.build()) for option in leaf._option_string_actions}
    known |= {"--nnodes", "--nproc-per-node", "--max-restarts", "--rdzv-id"}  # torchrun's
    spans = markdown.spans(page.read_text(encoding="utf-8"))
    named = {option for _, text in spans if not text.startswith("python ") for option in _OPTION.findall(text)}
    assert not named - known


@pytest.mark.parametrize("page", markdown.PAGES, ids=lambda page: page.name)
def test_every_prompt_for_the_shipped_model_names_a_background(page):
    """Without one params/tiny fills the image with the object's colour."""
    commands = [shlex.split(text) for _, text in markdown.commands(page.read_text(encoding="utf-8"))]
    drawing = [words for words in commands if "--params" not in words and words[1] in _DRAWING]
    prompts = [word for words in drawing for word in words[2:] if " " in word]
    assert not [prompt for prompt in prompts if not prompt.endswith(" background")]


def test_every_usage_that_is_known_stands_in_a_page():
    there = {text for page in markdown.PAGES for _, text in markdown.commands(page.read_text(encoding="utf-8"))}
    assert not (known.USAGES.keys() | known.OTHERS.keys()) - there
    assert not {f"make {target}" for target in known.MAKE} - there


@pytest.mark.parametrize(
    "text, said",
    [
        ("functional-sd3 inspect NOWHERE", "NOWHERE does not exist"),
        ("functional-sd3 inspect MODEL --quickly", "unrecognized arguments: --quickly"),
        ("functional-sd3 draw PROMPT", "invalid choice: 'draw'"),
    ],
)
def test_a_command_that_does_not_run_is_a_failure(text, said, folder, capsys):
    (words,) = known.runs(text)
    assert said in failure(lambda: cli.main(words), capsys)
