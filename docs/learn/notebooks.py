"""The pages of the course as Jupyter notebooks, made by jupytext of the Markdown.

    python docs/learn/notebooks.py                    # into out/notebooks
    python docs/learn/notebooks.py --out elsewhere

A block of Python is a cell, and the block of text after it its output. An answer is a closed <details> with the cells
of its code collapsed below it. The first cell goes to the folder of the checkout, in which the pages run. Figures and
the glossary are copied beside the notebooks; links to other files lead into the checkout.
"""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "out" / "notebooks"

START = """\
import os
import sys
from pathlib import Path

# The pages run in the folder of the checkout, which is above that of the notebooks.
root = next((each for each in (Path.cwd(), *Path.cwd().parents) if (each / "docs/learn/run.py").is_file()), None)
assert root, "start Jupyter in a folder of the checkout of functional_sd3"
os.chdir(root)
sys.path.insert(0, str(root))"""

OPEN, CLOSE = "<details><summary>Answer</summary>", "</details>"
COLLAPSED = {"jupyter": {"source_hidden": True, "outputs_hidden": True}, "tags": ["hide-cell"]}

_OUTPUT = re.compile(r"\A```text\n(.*?)^```\n?", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def relinked(text: str, folder: Path) -> str:
    """Markdown of docs/learn with its links as they lead from the folder of the notebooks."""

    def link(match: re.Match[str]) -> str:
        target, mark, part = match[2].partition("#")
        if not target or ":" in target:
            return match[0]
        if re.match(r"\d\d-|README\.md", target):
            target = target.removesuffix(".md") + ".ipynb"
        elif not target.startswith(("figures/", "glossary.md")):
            target = Path(os.path.relpath(HERE / target, folder)).as_posix()
        return f"{match[1]}{target}{mark}{part}{match[3]}"

    return _LINK.sub(link, text)


def notebook(page: Path, folder: Path):
    """The notebook (nbformat's NotebookNode) of a page, for a file in `folder`."""
    import jupytext
    from nbformat import v4

    # jupytext would make a cell of a block of shell.
    text = page.read_text(encoding="utf-8").replace("```sh\n", "```console\n")
    cells, hidden = [v4.new_code_cell(START)], False
    for cell in jupytext.reads(text, fmt="md").cells:
        if cell.cell_type == "code":
            cells.append(v4.new_code_cell(cell.source.rstrip(), metadata=COLLAPSED if hidden else {}))
            continue
        source = cell.source.strip() + "\n"
        if output := _OUTPUT.match(source):
            cells[-1].outputs = [v4.new_output("stream", name="stdout", text=output[1])]
            source = source[output.end() :].strip() + "\n"
        if hidden and CLOSE in source:
            source, hidden = source.replace(CLOSE, "", 1).strip() + "\n", False
        # A cell of Markdown is closed in itself: an answer that goes on in cells of code is closed before them.
        if source.count(OPEN) > source.count(CLOSE):
            answer = source.rpartition(OPEN)[2].strip()
            source = source.rstrip() if answer else source.rstrip() + "\n\nIt is code alone."
            source, hidden = f"{source}\n\n{CLOSE}\n\nThe code of the answer is the collapsed cell below.\n", True
        if source.strip():
            cells.append(v4.new_markdown_cell(relinked(source.strip(), folder)))
    for index, cell in enumerate(cells):
        cell.id = f"cell-{index}"  # the same in every run
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def write(folder: Path) -> list[Path]:
    """Writes the notebooks of all pages and of the index, the figures and the glossary; the notebooks' paths."""
    import nbformat

    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for page in [HERE / "README.md", *sorted(HERE.glob("[0-9][0-9]-*.md"))]:
        made = notebook(page, folder)
        if page.name == "README.md":
            made.cells = [cell for cell in made.cells if cell.cell_type == "markdown"]
        path = folder / f"{page.stem}.ipynb"
        nbformat.write(made, path)
        written.append(path)
    shutil.copytree(HERE / "figures", folder / "figures", dirs_exist_ok=True)
    glossary = (HERE / "glossary.md").read_text(encoding="utf-8")
    (folder / "glossary.md").write_text(relinked(glossary, folder), encoding="utf-8")
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder (default: out/notebooks)")
    options = parser.parse_args(arguments)
    try:
        import jupytext  # noqa: F401
    except ModuleNotFoundError:
        message = 'notebooks are made by jupytext, which is not installed: pip install -e ".[docs]", or make notebooks'
        print(message, file=sys.stderr)
        return 1
    written = write(options.out)
    print(
        f"{len(written)} notebooks in {options.out}; open {written[0].name} in Jupyter, or in an editor that runs them"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
