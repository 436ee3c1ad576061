"""Dead links of a built site: `python docs/site/check.py SITE` lists what leads nowhere, and ends with 1 if any does.

Links, images, style sheets and scripts of every page are followed within the site, anchors too. Addresses elsewhere are
not fetched; a style sheet, script, font or image from elsewhere is an error, as pages are to work without a network.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

LOADS = {"link": "href", "script": "src", "img": "src", "source": "src", "iframe": "src"}
"""Elements whose address the browser fetches by itself."""


class Page(HTMLParser):
    """The anchors of a page, and its addresses with the elements that have them."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors = {"", "__top"}
        self.addresses: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        name = LOADS.get(tag, "href" if tag == "a" else None)
        if name and values.get(name) is not None:
            self.addresses.append((tag, values[name]))

    handle_startendtag = handle_starttag


def problems(site: Path) -> list[str]:
    """A line for every address that leads nowhere, or is loaded from elsewhere."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for tag, address in page.addresses:
            if said := problem(site.resolve(), path, tag, address, pages):
                found.append(f"{path.relative_to(site.resolve())}: {address} {said}")
    return sorted(set(found))


def problem(site: Path, path: Path, tag: str, address: str, pages: dict[Path, Page]) -> str:
    """What is wrong with an address of a page, or nothing."""
    parts = urlsplit(address)
    if parts.scheme == "data":
        return ""
    if parts.scheme or parts.netloc:
        return "is loaded from elsewhere" if tag in LOADS else ""
    file, anchor = urldefrag(unquote(address))
    start = site if path.name == "404.html" or file.startswith("/") else path.parent
    target = (start / file.split("?")[0].lstrip("/")).resolve() if file else path
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file() or site not in target.parents:
        return "is not there"
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "has no such anchor"
    return ""


def main(site: str) -> int:
    said = problems(Path(site))
    print("\n".join(said) if said else f"{site}: no dead links")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
