"""`python docs/gallery.py` makes the images of docs/gallery.md anew, by the page's programs and commands, in its order.

They are run in the top folder and write to out/gallery; the images that the page shows are then copied to docs/gallery.
"""

import argparse
import re
import shlex
import shutil
from pathlib import Path

from functional_sd3 import cli

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gallery.md"
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_IMAGE = re.compile(r"!\[[^]]+\]\((gallery/[\w-]+\.png)\)")


def sections(page: str) -> dict[str, list[tuple[str, str]]]:
    """Heading -> its programs and commands in order: ("python", text) and ("sh", a command line of this project)."""
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)[1:]
    return {heading: list(_steps(text)) for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def _steps(text: str):
    for language, block in _BLOCK.findall(text):
        if language == "python":
            yield language, block
        else:
            yield from ((language, line) for line in block.splitlines())


def images(page: str) -> list[str]:
    """The images that the page shows, relative to docs/."""
    return list(dict.fromkeys(_IMAGE.findall(page)))


def run(steps: list[tuple[str, str]]) -> None:
    """Raises SystemExit at the first command that fails."""
    for language, text in steps:
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {"__name__": "__main__"})
        elif status := cli.main([*shlex.split(text)[1:], "--quiet"]):
            raise SystemExit(f"{text}\nended with {status}")


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    parts = sections(page)
    parser = argparse.ArgumentParser(description="Make the images of docs/gallery.md anew.")
    parser.add_argument("--only", action="append", choices=list(parts), help="a section of the page; may be repeated")
    chosen = parser.parse_args().only or list(parts)
    for heading in chosen:
        run(parts[heading])
    made = [ROOT / "docs" / image for image in images(page) if f"out/{image}" in str([parts[each] for each in chosen])]
    for image in made:
        shutil.copy(ROOT / "out" / "gallery" / image.name, image)
    print(f"{len(made)} images in {PAGE.with_suffix('').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
