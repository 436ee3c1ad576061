"""The course: every page of docs/learn/ runs, prints what it shows and makes its figures, and has the same form."""

import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

import functional_sd3 as sd3
from tests.docs import markdown
from tests.docs.course import COURSE, PAGES, RUNNER, runner


def difference(first, second) -> float:
    """Mean absolute difference of two figures, of 255; that of figures of different sizes is 255."""
    with Image.open(first) as one, Image.open(second) as other:
        if one.size != other.size:
            return 255.0
        pixels = [sd3.pixels.from_pil(image.convert("RGB")) for image in (one, other)]
    return 255 * (pixels[0] - pixels[1]).abs().mean().item()


def test_all_pages_run_in_order_and_make_their_figures_again(tmp_path):
    paths = os.pathsep.join([str(markdown.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(RUNNER), "--figures", str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^\d\d-.*processor time$", done.stdout, re.MULTILINE)) == len(PAGES)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in runner().figures(text):
            # What a training of fewer steps draws is another image of the same size.
            limit = 255 if "  # the test takes " in text else 6
            assert difference(tmp_path / name, COURSE / "figures" / name) < limit, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_a_prediction_two_exercises_a_figure_and_a_check(page):
    text = page.read_text(encoding="utf-8")
    blocks = runner().blocks(text)
    assert re.search(r"^\[Index\]\(README\.md\).* · (?:[1-9]|1[0-5]) minutes", text, re.MULTILINE)
    assert "**Predict.**" in text and runner().figures(text)
    exercises, check = text.split("\n## Exercises\n")[1].split("\n## Check\n")
    assert re.findall(r"^(\d)\. ", exercises, re.MULTILINE) == ["1", "2"]
    assert exercises.count("<details><summary>Answer</summary>") == exercises.count("```python") == 2
    assert text.count("<details>") == text.count("</details>")
    assert check.count("```python") == 1 and "assert " in blocks[-1].code
    assert max(len(block.code.splitlines()) for block in blocks) <= 25
    assert all(path.stat().st_size < 100_000 for path in (COURSE / "figures").glob("*"))


EVERYDAY = {
    "Block", "Density", "Emphasis", "Flow", "Key", "Leaf", "Mask", "Method", "Order", "Path", "Residual", "Sample",
    "Sampler", "Score", "Shift", "State", "Step", "Trajectory", "Turbo", "Value", "Weight",
}  # fmt: skip
"""Terms that are everyday words too, or have several meanings: linked where they are explained, not at first use."""


def prose(text: str) -> str:
    """A page with all but its prose and its links to the glossary replaced by blanks, at the same offsets."""
    other = (
        r"(?s:^```.*?^```$)", r"^ {4}.*$", r"^#.*$", r"^\[Index\].*$", r"`[^`\n]+`", r"!\[[^\]]*\]\([^)]*\)",
        r"<[^>]+>", r"\[[^\]]*\]\((?!glossary)[^)]*\)",
    )  # fmt: skip
    for pattern in other:
        text = re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.MULTILINE)
    return text


def first_uses(text: str, terms: list[str]) -> dict[str, tuple[int, int, bool]]:
    """Term -> span of its first use in the prose of a page, and whether that is a link to the glossary."""
    left, links = prose(text), {}
    for link in re.finditer(r"\[[^\]]*\]\(glossary\.md#([\w-]+)\)", left):
        links.setdefault(link[1], (*link.span(), True))
        left = left[: link.start()] + " " * len(link[0]) + left[link.end() :]
    uses = {}
    # The longest first: "joint attention" is no use of "attention".
    for term in sorted(terms, key=len, reverse=True):
        case = 0 if re.search("[A-Z0-9]", term[1:]) else re.IGNORECASE
        words = re.escape(term).replace(r"\ ", r"[\s-]")
        plural = f"(?:{words}|{words[:-1]}ies)" if words.endswith("y") else f"{words}(?:e?s)?"
        slug = re.sub(r"[^\w -]", "", term.lower()).replace(" ", "-")
        candidates = [links[slug]] if slug in links else []
        for match in re.finditer(rf"(?<![\w/.-]){plural}(?![\w/-])", left, case):
            candidates.append((*match.span(), False))
            left = left[: match.start()] + " " * len(match[0]) + left[match.end() :]
        if candidates:
            uses[term] = min(candidates)
    return uses


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_links_every_term_of_the_glossary_where_it_first_uses_it(page):
    terms = re.findall(r"^### (.*)$", (COURSE / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    uses = first_uses(text, [term for term in terms if term not in EVERYDAY])
    assert len(uses) > 8
    assert not [f"{term}: {text[start - 30 : end + 10]!r}" for term, (start, end, linked) in uses.items() if not linked]


def test_every_term_that_the_pages_link_stands_in_the_glossary_in_order():
    terms = re.findall(r"^### (.*)$", (COURSE / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert terms == sorted(terms, key=str.lower) and len(set(terms)) == len(terms) > 100
    index = (COURSE / "README.md").read_text(encoding="utf-8")
    assert all(f"]({page.name})" in index for page in PAGES)


@pytest.mark.parametrize(
    "body, problem",
    [
        ("```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n", ""),
        ("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n", "but prints\n2"),
        ("```python\nprint(0.5004)\n```\n\n```text\n0.500\n```\n", ""),
        ("```python\nprint(0.52)\n```\n\n```text\n0.500\n```\n", "but prints\n0.52"),
        ("```python\nprint('red')\n```\n\n```text\nblue\n```\n", "but prints\nred"),
        ("```python\nx = 1\n```\n\nText.\n\n```python\nassert x == 2\n```\n", "AssertionError"),
        ("![A figure](figures/absent.png)\n", "does not make it"),
        ("```python\nsteps = 100  # the test takes 3\nprint(steps)\n```\n\n```text\n3\n```\n", ""),
    ],
)
def test_the_runner_says_what_is_wrong(body, problem, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(body)
    problems = "\n".join(runner().run(page, tmp_path / "figures"))
    assert problem in problems and bool(problem) == bool(problems)


def test_the_runner_writes_what_is_printed_into_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(2)\n```\n\n```text\n```\n\n```python\nprint(3)\n```\n\n```text\n4\n```\n")
    assert not runner().run(page, tmp_path / "figures", update=True)
    assert re.findall(r"^\d$", page.read_text(), re.MULTILINE) == ["2", "3"]
    assert torch.is_grad_enabled()


def test_the_figures_of_a_shortened_training_replace_none_of_the_whole_ones(tmp_path, monkeypatch):
    module, course = runner(), tmp_path / "docs" / "learn"
    (course / "figures").mkdir(parents=True)
    monkeypatch.setattr(module, "HERE", course)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    save = (
        "from pathlib import Path\nPath('out/learn').mkdir(parents=True)\nPath('out/learn/{}.png').write_text('{}')\n"
    )
    for name, line in (("01-whole", ""), ("02-short", "steps = 9  # the test takes 1\n")):
        code = line + save.format(name, "new")
        (course / f"{name}.md").write_text(f"```python\n{code}```\n\n![A figure](figures/{name}.png)\n")
        (course / "figures" / f"{name}.png").write_text("old")
    assert module.main([]) == 0
    assert (course / "figures" / "01-whole.png").read_text() == "new"
    assert (course / "figures" / "02-short.png").read_text() == "old"
    assert (tmp_path / "out" / "learn" / "02-short.png").read_text() == "new"
