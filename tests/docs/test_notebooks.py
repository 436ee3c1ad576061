"""`make notebooks`: pages of the course as notebooks that run, with links that resolve and answers that are closed."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.docs import markdown
from tests.docs.course import PAGES, program, runner


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like the checkout, with notebooks in out/notebooks."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("docs", "bench", "functional_sd3"):
        (root / name).symlink_to(markdown.ROOT / name)
    program("notebooks").write(root / "out" / "notebooks")
    return root


def read(checkout, page):
    import nbformat

    made = nbformat.read(checkout / "out" / "notebooks" / f"{page.stem}.ipynb", as_version=4)
    nbformat.validate(made)
    return made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_notebook_has_every_block_as_a_cell_with_its_output(page, checkout):
    text = page.read_text(encoding="utf-8")
    blocks = runner().blocks(text)
    cells = [cell for cell in read(checkout, page).cells if cell.cell_type == "code"][1:]
    assert [cell.source.strip() for cell in cells] == [block.code.strip() for block in blocks]
    shown = [text[slice(*block.printed)] if block.printed else None for block in blocks]
    assert [cell.outputs[0].text if cell.outputs else None for cell in cells] == shown
    prose = "\n".join(cell.source for cell in read(checkout, page).cells if cell.cell_type == "markdown")
    assert "```text" not in prose and "```python" not in prose and "%%" not in prose


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_answers_are_closed_in_their_cell_and_their_code_is_collapsed(page, checkout):
    text = page.read_text(encoding="utf-8")
    made = read(checkout, page)
    prose = [cell.source for cell in made.cells if cell.cell_type == "markdown"]
    assert all(source.count("<details>") == source.count("</details>") for source in prose)
    answers = re.findall(r"<details>.*?</details>", text, re.DOTALL)
    assert sum(source.count("<details>") for source in prose) == len(answers)
    collapsed = [cell for cell in made.cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert len(collapsed) == sum(answer.count("```python") for answer in answers) >= 2


def test_links_and_figures_resolve_from_the_folder_of_the_notebooks(checkout):
    folder = checkout / "out" / "notebooks"
    sources = {page.name: "\n".join(cell.source for cell in read(checkout, page).cells) for page in PAGES}
    sources["README.md"] = "\n".join(cell.source for cell in read(checkout, Path("README.md")).cells)
    sources["glossary.md"] = (folder / "glossary.md").read_text(encoding="utf-8")
    for name, source in sources.items():
        targets = [
            target for target in re.findall(r"\]\(([^)\s]+)\)", source) if re.match(r"[\w.]+[/.][\w./#-]+$", target)
        ]
        assert targets, name
        for target in targets:
            assert (folder / target.partition("#")[0]).exists(), f"{name}: {target}"
    assert "](07-patches.ipynb)" in sources["08-joint-attention.md"]


def test_the_cells_of_a_notebook_run_where_a_kernel_starts_them(checkout, monkeypatch):
    monkeypatch.chdir(checkout / "out" / "notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace, gradients = {"__name__": "__main__"}, torch.is_grad_enabled()
    try:
        for cell in read(checkout, PAGES[0]).cells:
            if cell.cell_type == "code":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(cell.source, "cell", "exec"), namespace)
                assert runner().agrees(cell.outputs[0].text if cell.outputs else "", printed.getvalue())
    finally:
        torch.set_grad_enabled(gradients)
    assert Path.cwd().samefile(checkout) and list((checkout / "out" / "learn").glob("01-*.png"))


def test_without_jupytext_a_message_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "jupytext", None)
    assert program("notebooks").main(["--out", str(tmp_path / "new")]) == 1
    assert 'pip install -e ".[docs]"' in capsys.readouterr().err and not (tmp_path / "new").exists()
