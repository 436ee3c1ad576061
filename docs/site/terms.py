"""Links from the API reference to the glossary: the first time that a page's docstrings use a term, it leads there."""

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path

GLOSSARY = "docs/learn/glossary"
AMBIGUOUS = frozenset(
    {"evaluation", "frozen", "gate", "head", "key", "method", "order", "path", "sequence", "state", "step", "value"}
)
"""Entries that a docstring uses in another sense too: a file's path, a dict's key, a frozen dataclass."""
_HEADING = re.compile(r"^### (.+)$", re.MULTILINE)
_OPEN = ("a", "code", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "script", "style", "summary", "button", "svg", "nav")
"""Elements whose text stays as it is."""
_VOID = ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr")


def anchor(heading: str) -> str:
    """The anchor that code hosts and the generator give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def terms(glossary: str) -> dict[str, str]:
    """Spelling, in lower case -> the anchor of its entry. A heading such as "CFG, classifier-free guidance" has two."""
    spellings = {}
    for heading in _HEADING.findall(glossary):
        plain = heading.replace("`", "")
        for each in re.split(r",\s*|\s*\(|\)", plain):
            if len(each.strip()) > 1 and each.strip().lower() not in AMBIGUOUS:
                spellings[each.strip().lower()] = anchor(heading)
    return spellings


def pattern(spellings: dict[str, str]) -> re.Pattern[str]:
    """Any of the terms as whole words, the longest first, also in the plural."""
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile(rf"(?<![\w.-])({'|'.join(map(re.escape, longest_first))})(s?)(?![\w-])", re.IGNORECASE)


def link(page: str, spellings: dict[str, str], glossary: str) -> str:
    """A page of the reference with the first use of every term in its docstrings linked to `glossary`, an address."""
    linker = _Linker(page, spellings, glossary)
    linker.feed(page)
    linker.close()
    return "".join(linker.parts)


def link_all(site: Path, folder: str, glossary: str) -> int:
    """Links the terms in every page of a folder of the built site; the number of links."""
    spellings = terms(glossary)
    count = 0
    for path in sorted((site / folder).rglob("*.html")):
        to = posixpath.relpath(f"{GLOSSARY}.html", path.parent.relative_to(site).as_posix())
        before = path.read_text(encoding="utf-8")
        after = link(before, spellings, to)
        count += after.count(' class="term"') - before.count(' class="term"')
        path.write_text(after, encoding="utf-8")
    return count


class _Linker(HTMLParser):
    """Writes a page again as it was read, but for the text of docstrings (`div.doc-contents`)."""

    def __init__(self, page: str, spellings: dict[str, str], glossary: str):
        super().__init__(convert_charrefs=False)
        self.spellings, self.glossary = spellings, glossary
        self.pattern = pattern(spellings)
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []
        self.linked: set[str] = set()

    def handle_starttag(self, tag, attributes):
        self.parts.append(self.get_starttag_text())
        if tag not in _VOID:
            classes = (dict(attributes).get("class") or "").split()
            self.open.append((tag, "doc-contents" in classes))

    def handle_startendtag(self, tag, attributes):
        self.parts.append(self.get_starttag_text())

    def handle_endtag(self, tag):
        self.parts.append(f"</{tag}>")
        if any(name == tag for name, _ in self.open):
            while self.open.pop()[0] != tag:
                pass

    def handle_data(self, data):
        inside = any(docstring for _, docstring in self.open) and not any(name in _OPEN for name, _ in self.open)
        self.parts.append(self.pattern.sub(self._link, data) if inside else data)

    def _link(self, match: re.Match[str]) -> str:
        to = self.spellings[match[1].lower()]
        if to in self.linked:
            return match[0]
        self.linked.add(to)
        return f'<a class="term" href="{self.glossary}#{to}">{match[0]}</a>'

    def handle_entityref(self, name):
        self.parts.append(f"&{name};")

    def handle_charref(self, name):
        self.parts.append(f"&#{name};")

    def handle_comment(self, data):
        self.parts.append(f"<!--{data}-->")

    def handle_decl(self, declaration):
        self.parts.append(f"<!{declaration}>")
