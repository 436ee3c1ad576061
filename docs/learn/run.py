"""Runs the pages of the course, compares what their blocks print with what the pages show, and remakes the figures.

    python docs/learn/run.py              # all pages, half a minute of one core; figures into docs/learn/figures
    python docs/learn/run.py 4 5          # some pages
    python docs/learn/run.py 10 --whole   # page 10 with its training in full
    python docs/learn/run.py 5 --update   # writes into page 5 what it prints

A page is one program: its Python blocks in order, in one namespace, answers of the exercises included. A fenced block
of text that follows a Python block is what that block prints. A line `NAME = NUMBER  # the test takes OTHER` is run
with the other number, except with --whole; the figures of such a page then go into out/learn, where they replace none
of the whole training's.
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MADE = "out/learn"
"""Folder, below that where a page runs, into which pages save their figures."""

_CODE = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n?```text\n(?P<printed>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
_SHORTENED = re.compile(r"^(\w+ = )\S+(  # the test takes )(\S+)$", re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


class Echo(io.StringIO):
    """Output that is kept, and shown as it comes."""

    def write(self, text: str) -> int:
        assert sys.__stdout__ is not None
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


class Block(NamedTuple):
    """Python of a page, the number of its first line, and the span of what the page shows of its output, or None."""

    code: str
    line: int
    printed: tuple[int, int] | None


def pages() -> list[Path]:
    """The pages in the order of reading."""
    return sorted(HERE.glob("[0-9][0-9]-*.md"))


def blocks(text: str) -> list[Block]:
    """The Python blocks of a page."""
    return [
        Block(
            each["code"],
            text.count("\n", 0, each.start("code")) + 1,
            each.span("printed") if each["printed"] is not None else None,
        )
        for each in _CODE.finditer(text)
    ]


def shortened(code: str) -> str:
    """The code with the numbers that the test takes."""
    return _SHORTENED.sub(r"\1\3\2\3", code)


def figures(text: str) -> set[str]:
    """The names of the figures that a page shows."""
    return set(re.findall(r"\]\(figures/([\w-]+\.png)\)", text))


def agrees(shown: str, printed: str) -> bool:
    """True if two texts are the same but for the last digits of numbers with a point.

    Those may differ by one unit of the last place that is shown, or by 2 %: processors round differently.
    """
    texts = [_NUMBER.split(text.strip()) for text in (shown, printed)]
    numbers = [_NUMBER.findall(text.strip()) for text in (shown, printed)]
    return texts[0] == texts[1] and all(map(_close, *numbers))


def _close(shown: str, printed: str) -> bool:
    if "." not in shown + printed and "e" not in shown + printed:
        return shown == printed
    mantissa, _, exponent = shown.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(shown) - float(printed)) <= max(1.01 * unit, 0.02 * abs(float(shown)))


def run(page: Path, made: Path, *, whole: bool = False, update: bool = False) -> list[str]:
    """Problems of a page: a block that raises or prints something else, figures that are shown and not made.

    The page's figures are written into the folder `made`. update: what is printed replaces what the page shows.
    """
    import torch

    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    problems, replaced = [], []
    here, gradients = os.getcwd(), torch.is_grad_enabled()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in blocks(text):
                code = block.code if whole else shortened(block.code)
                output = Echo() if whole else io.StringIO()
                with contextlib.redirect_stdout(output):
                    exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)
                if block.printed is None:
                    continue
                shown, printed = text[slice(*block.printed)], output.getvalue()
                if update:
                    replaced.append((block.printed, printed))
                elif not agrees(shown, printed):
                    problems.append(f"{page.name}:{block.line} shows\n{shown}but prints\n{printed}")
        except Exception:
            problems.append(traceback.format_exc())
        finally:
            os.chdir(here)
            torch.set_grad_enabled(gradients)
        names = {path.name for path in Path(folder, MADE).glob("*.png")}
        problems += [f"{page.name} shows {name} and does not make it" for name in sorted(figures(text) - names)]
        problems += [f"{page.name} makes {name} and does not show it" for name in sorted(names - figures(text))]
        made.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(folder, MADE).glob("*")):
            shutil.copy(path, made / path.name)
    for (start, end), printed in reversed(replaced):
        text = text[:start] + printed + text[end:]
    if replaced:
        page.write_text(text, encoding="utf-8")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", type=int, metavar="PAGE", help="numbers of pages (default: all)")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="where figures go")
    parser.add_argument("--whole", action="store_true", help="trainings in full")
    parser.add_argument("--update", action="store_true", help="write what is printed into the pages")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    problems = []
    for page in pages():
        if not options.numbers or int(page.name[:2]) in options.numbers:
            started = os.times()
            text = page.read_text(encoding="utf-8")
            is_whole = options.whole or shortened(text) == text
            made = options.figures or (HERE / "figures" if is_whole else ROOT / MADE)
            problems += run(page, made, whole=options.whole, update=options.update)
            print(f"{page.name}: {os.times().user - started.user:.1f} s of processor time", flush=True)
    print(*problems, sep="\n", end="")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
