"""Every relative link and image of the pages leads to a file of the repository, and its anchor to a heading there."""

import re

import pytest

from tests.docs import markdown

_LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)")


def anchors(page: str) -> set[str]:
    """The anchors that code hosts give the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


PAGES = [*markdown.PAGES, markdown.ROOT / "params" / "tiny" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(markdown.ROOT)))
def test_every_relative_link_leads_somewhere(page):
    for path, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def test_readme_shows_an_image_in_its_first_screen():
    first = (markdown.ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:12]
    assert [line for line in first if re.match(r"!\[.+\]\([\w/.-]+\.png\)", line)]
