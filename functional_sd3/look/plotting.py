"""Matplotlib figures as PNG for files and as SVG for pages, whose text takes the page's colour."""

import importlib
import io
import re
import threading
from collections.abc import Callable
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Told apart with every kind of colour vision, on light and dark ground (Okabe and Ito)."""

_TEXT, _GRID = "#010203", "#0a0b0c"
"""Placeholders of the colours of the page."""
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "functional_sd3",
    "font.size": 9.0,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _TEXT,
    "axes.titlecolor": _TEXT,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.25,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "text.color": _TEXT,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.0,
}
_LOCK = threading.Lock()
"""Matplotlib's settings are of the whole process."""


class Missing(ImportError):
    """Matplotlib is not installed; the message names the command that installs it."""


def library(name: str = "matplotlib") -> Any:
    """A module of matplotlib. Raises `Missing` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(
            'plots need matplotlib, which is not installed: pip install "functional_sd3[look]" (or matplotlib itself)'
        ) from error


class Chart:
    """A figure that is drawn when its bytes or its text are read. alt: a description in words."""

    def __init__(self, draw: Callable[[Any], None], alt: str, size: tuple[float, float] = (4.2, 2.7)):
        self.draw, self.alt, self.size = draw, alt, size

    def png(self, *, dpi: int = 120) -> bytes:
        """The figure on white."""
        return self._saved("png", dpi=dpi, text="black", grid="#808080", facecolor="white")

    def svg(self) -> str:
        """An `<svg>` element for a page: no ground, text in the page's colour, as wide as there is room."""
        text = self._saved("svg", text=_TEXT, grid=_GRID, transparent=True).decode()
        text = text[text.index("<svg") :].replace(_TEXT, "currentColor").replace(_GRID, "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        # Names of groups would occur in every figure of a page.
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        text = re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)
        return text.replace("<svg", f'<svg role="img" aria-label="{_attribute(self.alt)}"', 1)

    def _saved(self, kind: str, *, text: str, grid: str, **options: Any) -> bytes:
        matplotlib, figures = library(), library("matplotlib.figure")
        settings = {
            name: {_TEXT: text, _GRID: grid}.get(value, value) if isinstance(value, str) else value
            for name, value in _SETTINGS.items()
        }
        buffer = io.BytesIO()
        with _LOCK, matplotlib.rc_context(settings):
            figure = figures.Figure(figsize=self.size, layout="constrained")
            self.draw(figure)
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(buffer, format=kind, metadata=metadata, **options)
        return buffer.getvalue()


def colours_of(values: Any, name: str = "magma") -> Any:
    """Numbers from 0 to 1 (..., numpy) as colours (..., 3), uint8."""
    map = library("matplotlib").colormaps[name]
    return map(values, bytes=True)[..., :3]


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
