"""Markdown pages as a reader uses them: the fenced blocks of code and the command lines, each with its line."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from functional_sd3.cli import SUBCOMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTINUES = "# Continues the block above"
"""First line of a block of Python that continues the block above it."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_PROGRAMS = ("functional-sd3 ", "python ", "make ", "pip ")
_SHELL = ("sh", "bash", "")


class Block(NamedTuple):
    """Code of a page: the language after the fence, the number of its first line, the text."""

    language: str
    line: int
    text: str


class Command(NamedTuple):
    """A command line of a page, without its comment; `text` has single spaces."""

    line: int
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    return [Block(each[1], page.count("\n", 0, each.start(2)) + 1, each[2]) for each in _FENCE.finditer(page)]


def programs(page: str) -> list[list[Block]]:
    """The Python blocks of a page as programs: a block with those that continue it."""
    joined: list[list[Block]] = []
    for block in blocks(page):
        if block.language == "python":
            if block.text.startswith(CONTINUES):
                joined[-1].append(block)
            else:
                joined.append([block])
    return joined


def commands(page: str) -> list[Command]:
    """Every command line of a page in order: the lines of shell blocks, and the code within sentences and tables."""
    lines = []
    for block in blocks(page):
        if block.language in _SHELL:
            lines += _lines(block)
    for line, text in spans(page):
        if text.split()[0] in SUBCOMMANDS and len(text.split()) > 1:
            text = f"functional-sd3 {text}"
        if text.startswith(_PROGRAMS):
            lines.append(Command(line, text))
    return sorted(lines, key=lambda command: command.line)


def spans(page: str) -> list[tuple[int, str]]:
    """The code within sentences and tables, with single spaces, and the lines it begins in."""
    prose = _FENCE.sub(lambda each: "\n" * each[0].count("\n"), page)
    return [(prose.count("\n", 0, each.start()) + 1, " ".join(each[1].split())) for each in _SPAN.finditer(prose)]


def _lines(block: Block) -> list[Command]:
    lines, pending = [], ""
    for number, line in enumerate(block.text.splitlines(), block.line):
        pending += line.removesuffix("\\")
        if not line.endswith("\\"):
            words = shlex.split(pending, comments=True)
            lines += [Command(number, shlex.join(words))] if words else []
            pending = ""
    return lines


def named_rows(page: str, heading: str) -> dict[str, list[list[str]]]:
    """The table whose head begins with `heading`: first cell -> the code of each other cell."""
    table = page.split(f"| {heading} |")[1].split("\n\n")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()[2:]]
    return {
        first.strip(): [[span.replace(r"\|", "|") for span in _SPAN.findall(cell)] for cell in others]
        for first, *others in cells
    }
