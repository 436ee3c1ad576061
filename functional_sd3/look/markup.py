"""HTML of one page without anything from elsewhere: its style, sections, tables, images inside."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from functional_sd3.look import sheets
from functional_sd3.look.plotting import Chart

if TYPE_CHECKING:
    from PIL.Image import Image

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1d1d1f; --soft: #5c5c66; --line: #d9d9e0; --card: #f5f5f8;
  --word: #e3eefb; --cut: #b3261e; --link: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --ground: #131317; --text: #e8e8ee; --soft: #a3a3b0; --line: #34343e;
  --card: #1d1d24; --word: #1f3350; --cut: #ff8a80; --link: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1100px; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 12px; }
h2 { font-size: 1.25rem; margin: 40px 0 6px; border-top: 1px solid var(--line); padding-top: 20px; }
h3 { font-size: 1rem; margin: 16px 0 4px; }
h3 small, figcaption, .numbers, summary, .note { color: var(--soft); font-weight: normal; }
p { margin: 4px 0 10px; max-width: 75ch; }
small, figcaption, .numbers, summary { font-size: 0.85rem; }
code { font-size: 0.9em; }
summary { cursor: pointer; }
.lead { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }
.lead > div { flex: 1 1 280px; }
.prompt { font-size: 1.15rem; }
.final { width: min(100%, 384px); border-radius: 6px; }
.pixels { image-rendering: pixelated; }
table { border-collapse: collapse; font-size: 0.9rem; }
th { text-align: left; font-weight: normal; color: var(--soft); padding: 2px 12px 2px 0; vertical-align: top;
  white-space: nowrap; }
td { padding: 2px 12px 2px 0; }
.wide { overflow-x: auto; }
ol { list-style: none; margin: 0; padding: 0; }
.tokens { display: flex; flex-wrap: wrap; gap: 4px; }
.tokens li { display: flex; flex-direction: column; align-items: center; padding: 2px 8px; border-radius: 6px;
  background: var(--word); border: 1px solid transparent; font-family: ui-monospace, Menlo, Consolas, monospace; }
.tokens b { font-weight: normal; font-size: 0.9rem; }
.tokens span { font-size: 0.72rem; color: var(--soft); }
.tokens .start, .tokens .end, .tokens .padding { background: var(--card); color: var(--soft); }
.tokens .padding { border: 1px dashed var(--line); }
.tokens .cut, .tokens .unknown { background: none; border: 1px solid var(--cut); color: var(--cut); }
.tokens .cut b { text-decoration: line-through; }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 12px 8px; }
.frames.large { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.frames img { display: block; width: 100%; margin-top: 3px; border-radius: 3px; }
.frames b { font-weight: normal; font-size: 0.85rem; }
.words { display: grid; align-items: start; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 14px; }
.words > li { background: var(--card); border-radius: 8px; padding: 10px; }
.pair { display: flex; gap: 8px; }
figure { margin: 0; flex: 1 1 0; min-width: 0; }
.pair img { display: block; width: 100%; border-radius: 3px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 16px;
  margin-top: 12px; }
.charts svg { width: 100%; max-width: 560px; height: auto; display: block; }
.charts text { font-family: inherit !important; }
.sheet { display: grid; grid-template-columns: auto 1fr; gap: 2px 4px; font-size: 0.68rem; color: var(--soft);
  margin-bottom: 8px; }
.words details p { margin: 8px 0 0; font-size: 0.8rem; }
.sheet i { grid-column: 1 / 3; }
.sheet .cols { grid-column: 2; display: flex; }
.sheet .rows { grid-column: 1; display: flex; flex-direction: column; }
.sheet span { flex: 1 1 0; display: flex; align-items: center; justify-content: center; min-width: 0; }
.sheet img { display: block; width: 100%; height: 100%; }
a { color: var(--link); }
"""


def document(title: str, body: str) -> str:
    """A whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def frame(page: str, height: int = 900) -> str:
    """A page in a frame of its own, for a notebook or another page, whose styles it neither has nor changes."""
    return f'<iframe srcdoc="{html.escape(page)}" title="look" style="width:100%;height:{height}px;border:0"></iframe>'


def section(title: str, intro: str, body: str) -> str:
    """A heading, a paragraph of HTML, and what it is about."""
    return f"<section><h2>{html.escape(title)}</h2><p>{intro}</p>{body}</section>"


def table(facts: Mapping[str, str]) -> str:
    """Names and values."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items()
    )
    return f"<table>{rows}</table>"


def rows_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a line of headings; it scrolls where it is wider than the page."""
    cells = "".join(f"<th>{html.escape(each)}</th>" for each in head)
    lines = ["".join(f"<td>{html.escape(each)}</td>" for each in row) for row in rows]
    return f"<div class=wide><table><tr>{cells}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def card_row(charts: Iterable[Chart]) -> str:
    """Charts beside one another, as many as there is room for."""
    return f"<div class=charts>{''.join(chart.svg() for chart in charts)}</div>"


def inline(image: "Image", alt: str, kind: str = "pixels", form: str = "PNG") -> str:
    """An image inside the page."""
    data = base64.b64encode(sheets.encode(image, form)).decode()
    large = "" if kind != "final" or max(image.size) > 256 else " pixels"
    return f'<img class="{kind}{large}" alt="{html.escape(alt)}" src="data:image/{form.lower()};base64,{data}">'
