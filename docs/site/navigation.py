"""The site's navigation, read from the pages: README's table of what to read, in order, and the course's own table."""

import re
from pathlib import PurePosixPath

import reference
import sources

HOME = "README.md"
COURSE = "docs/learn/README.md"
HEADING = "## What to read, in this order"

_ROW = re.compile(r"^\| ([^|]+?) \|(.*)\|$", re.MULTILINE)


class NavigationError(ValueError):
    """A page that no table of what to read names."""


def order() -> dict[str, list[str]]:
    """Section -> its pages and programs, as README's table has them."""
    text = (sources.ROOT / HOME).read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    return {title: sources.linked(HOME, pages) for title, pages in _ROW.findall(text) if "](" in pages}


def programs() -> list[str]:
    """Programs that are shown as pages: those that a page links."""
    texts = {path: (sources.ROOT / path).read_text(encoding="utf-8") for path in sources.markdown_files()}
    every = {each for path, text in texts.items() for each in sources.linked(path, text) if sources.is_program(each)}
    return sorted(every)


def build() -> list:
    """The navigation as the generator takes it.

    Raises NavigationError where a page is in no section. Programs that none names are a section of their own.
    """
    sections = {title: [page for each in pages for page in expanded(each)] for title, pages in order().items()}
    named = {HOME, *(page for pages in sections.values() for page in pages)}
    if left := [page for page in sources.markdown_files() if page not in named]:
        raise NavigationError(f"{', '.join(left)}: not linked in the table of README.md, {HEADING.removeprefix('## ')}")
    built: list = [{"Home": HOME}]
    built += [{title: [_entry(page) for page in pages]} for title, pages in sections.items()]
    built.append({"API": reference.navigation()})
    if others := [_entry(each) for each in programs() if each not in named]:
        built.append({"Programs": others})
    return built


def expanded(page: str) -> list[str]:
    """A page, and after the course's the pages that its table lists."""
    if page != COURSE:
        return [page]
    text = (sources.ROOT / COURSE).read_text(encoding="utf-8")
    table = "\n".join(cells for _, cells in _table_rows(text))
    return [page, *sources.linked(COURSE, table)]


def _table_rows(text: str) -> list[tuple[str, str]]:
    return [(row[0], row[0]) for row in _ROW.findall(text) if "](" in row[0]]


def _entry(page: str) -> str | dict:
    return {PurePosixPath(page).name: f"{page}.md"} if sources.is_program(page) else page
