"""The site's pages: copies of the repository's Markdown files at their own paths, so that relative links stay valid.

A linked program becomes a page of its text; every other linked file is copied. What a code host reads in Markdown and
the generator does not is written in the generator's way, in the copies alone.
"""

import ast
import posixpath
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "bench", "params/tiny", "params/tiny-4")
"""Folders whose Markdown files, beside those at the top, are pages."""

LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]*)(#[^)\s]+)?(?=\))")
"""A link or an image of a page that does not lead elsewhere: its path and its anchor."""

LANGUAGES = {".py": "python", ".toml": "toml", "Makefile": "makefile", "LICENSE": "text"}
_FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
_LIST = re.compile(r"(?:[-*]|\d+\.) ")


def markdown_files() -> list[str]:
    """Paths of all pages, relative to the repository, with slashes."""
    found = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def write(into: Path, programs: Iterable[str]) -> None:
    """Copies of all pages, of the programs as pages, and of the files that they link.

    Raises FileNotFoundError where a page links a file that does not exist, IsADirectoryError where it links a folder.
    """
    for path in markdown_files():
        text = (ROOT / path).read_text(encoding="utf-8")
        for each in linked(path, text):
            if each.endswith(".md"):
                continue
            if not is_program(each):
                _copy(ROOT / each, into / each)
        _save(into / path, for_generator(text))
    for path in programs:
        _save(into / f"{path}.md", program_page(path))


def linked(path: str, text: str) -> list[str]:
    """Paths of the files that a page links, relative to the repository."""
    folder = posixpath.dirname(path)
    return [posixpath.normpath(posixpath.join(folder, to)) for to, _ in LINK.findall(prose(text)) if to]


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", text)


def is_program(path: str) -> bool:
    """True if a file is shown as a page of its text."""
    return language(path) is not None


def language(path: str) -> str | None:
    """The language of a file's text, for its colours; None for what is no text to be read."""
    return LANGUAGES.get(posixpath.splitext(path)[1]) or LANGUAGES.get(posixpath.basename(path))


def program_page(path: str) -> str:
    """A page with the text of a file, below the first sentence of its docstring."""
    text = (ROOT / path).read_text(encoding="utf-8")
    says = first_sentence(text) if path.endswith(".py") else ""
    return f"# {posixpath.basename(path)}\n\n{says}\n\n````{language(path)}\n{text}````\n"


def first_sentence(source: str) -> str:
    """First paragraph of a module's docstring, in one line; nothing where it has none."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def for_generator(text: str) -> str:
    """A page as Python-Markdown reads it: links to programs lead to their pages, answers and lists are marked."""
    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _for_generator(part) for part in parts)


def _for_generator(text: str) -> str:
    text = LINK.sub(lambda each: f"{each[1]}{'.md' if is_program(each[1]) else ''}{each[2] or ''}", text)
    text = text.replace("<details>", '<details markdown="1">')
    lines: list[str] = []
    for line in text.split("\n"):
        starts = _LIST.match(line) and lines and lines[-1].strip() and not lines[-1].startswith((" ", "-", "*"))
        if starts and not _LIST.match(lines[-1]) and not _in_list(lines):
            lines.append("")  # Python-Markdown starts a list after an empty line only.
        lines.append(line)
    return "\n".join(lines)


def _in_list(lines: list[str]) -> bool:
    """True if the paragraph that the lines end with began as an item of a list."""
    first = next((index for index in range(len(lines) - 1, -1, -1) if not lines[index].strip()), -1) + 1
    return any(_LIST.match(line) for line in lines[first:])


def titles(paths: Iterable[str]) -> Mapping[str, str]:
    """Page -> its first heading."""
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}
    return {path: re.findall(r"^# (.+)$", text, re.MULTILINE)[0] for path, text in texts.items()}


def _copy(path: Path, to: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path.relative_to(ROOT)} is a folder: a page can link files only")
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, to)


def _save(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
