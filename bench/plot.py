"""Figures of the benchmarks and of the docs: lines, points with arrows and bars by matplotlib; tiles and maps."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from functional_sd3.look.plotting import Chart

Points = Sequence[tuple[float, float]]

COLOURS = (
    (0, 0, 0), (214, 39, 40), (255, 127, 14), (188, 150, 0), (44, 160, 44), (23, 160, 170), (31, 119, 180),
    (90, 60, 200), (148, 103, 189), (227, 90, 180), (140, 86, 75), (127, 127, 127), (120, 170, 60), (80, 80, 120),
)  # fmt: skip
_COLOURS = [tuple(level / 255 for level in colour) for colour in COLOURS]
WIDTH, HEIGHT, LEGEND = 420, 300, 130
"""Pixels of a panel, and of the legend beside the panels."""
_DPI = 100

LABEL = 13
"""Height of a line of labels."""


def save(image: Image.Image, path: str | Path) -> None:
    """Writes a figure with a palette of 128 colours, a quarter of the size; folders that are missing are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    palette = image if image.mode == "P" else image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)


def tiles(
    images: Sequence[Tensor], labels: Sequence[str] = (), *, columns: int | None = None, scale: int = 1, gap: int = 4
) -> Image.Image:
    """Images (3, height, width) in [0, 1], of any sizes, row by row with a label above each.

    columns: by default all in one row; scale: side of the square that a pixel becomes.
    """
    columns = columns or len(images)
    head = LABEL if labels else 0
    # A label is as wide as 6 pixels a character.
    widest = max((6 * len(label) for label in labels), default=0)
    width = max(widest, scale * max(image.shape[-1] for image in images)) + gap
    height = scale * max(image.shape[-2] for image in images) + gap + head
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left, top = index % columns * width, index // columns * height
        if labels:
            pen.text((left, top), labels[index], fill="black")
        levels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        tile = Image.fromarray(levels.cpu().numpy())
        size = (scale * tile.width, scale * tile.height)
        sheet.paste(tile.resize(size, Image.Resampling.NEAREST), (left, top + head))
    return sheet


def heat(values: Tensor, largest: float | Tensor | None = None) -> Tensor:
    """Numbers (..., height, width) as colours (..., 3, height, width): white is 0, red `largest`, blue minus it.

    largest: by default the largest absolute value.
    """
    largest = values.abs().max().clamp_min(1e-12) if largest is None else largest
    share = (values / largest).clamp(-1, 1)
    positive, negative = share.clamp_min(0), (-share).clamp_min(0)
    return torch.stack([1 - negative, 1 - share.abs(), 1 - positive], -3)


def plane(
    points: Mapping[str, Tensor],
    *,
    arrows: tuple[Tensor, Tensor] | None = None,
    paths: Tensor | None = None,
    side: int = 240,
    extent: float = 3.0,
    title: str = "",
) -> Image.Image:
    """Points of a plane, name -> (n, 2), each name in a colour, over [-extent, extent] on both axes.

    arrows: where they start and end, (n, 2) each. paths: (steps, n, 2), n broken lines.
    """
    height = side + 2 * LABEL

    def draw(figure: Any) -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0.01, 0.01, 0.98, side / height), xlim=(-extent, extent), ylim=(-extent, extent))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, alpha=0.4)
        axes.set_title(title, fontsize=8, loc="left")
        if paths is not None:
            axes.plot(*paths.detach().unbind(-1), color="0.65", linewidth=0.6)
        for index, (name, group) in enumerate(points.items()):
            colour = _COLOURS[(index + 1) % len(_COLOURS)] if len(points) > 1 else _COLOURS[6]
            axes.plot(*group.detach().unbind(-1), "s", color=colour, markersize=1.2, label=name or None)
        if any(points):
            axes.legend(loc="upper left", frameon=True, fontsize=7, markerscale=3)
        if arrows is not None:
            start, end = (ends.detach() for ends in arrows)
            options = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.004, "zorder": 3}
            axes.quiver(*start.unbind(-1), *(end - start).unbind(-1), **options)

    return _drawn(draw, side, height)


def beside(images: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Images in one row."""
    width, height = (
        sum(image.width for image in images) + gap * (len(images) - 1),
        max(image.height for image in images),
    )
    sheet, left = Image.new("RGB", (width, height), "white"), 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet


def bars(values: Mapping[str, float], unit: str = "") -> Image.Image:
    """Horizontal bars, name -> value, each with its name before it and its value behind."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        shown = axes.barh(list(values), list(values.values()), color=_COLOURS[6])
        axes.bar_label(shown, [f" {value:,.4g} {unit}" for value in values.values()])
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set(xticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)

    return _drawn(draw, 560, 24 * len(values) + 16)


def panels(
    titles: Mapping[str, Mapping[str, Points]], across: str, upwards: str, *, linear: bool = False
) -> Image.Image:
    """One panel a title, two a row, over the same axes; a legend of every name on the right.

    titles: title -> name -> points (x, y), both positive unless `linear`. across, upwards: what the axes are. Raises
    ValueError where there is nothing to draw.
    """
    every = [point for lines in titles.values() for points in lines.values() for point in points]
    if not every:
        raise ValueError("no points to draw")
    names = list(dict.fromkeys(name for lines in titles.values() for name in lines))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    columns, rows = min(2, len(titles)), (len(titles) + 1) // 2

    def draw(figure: Any) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        handles = {}
        for axes, (title, lines) in zip(grid, titles.items(), strict=False):
            for name, points in lines.items():
                (handles[name],) = axes.plot(*zip(*sorted(points), strict=True), "o-", color=colours[name])
            scale = "linear" if linear else "log"
            axes.set(title=title, xlabel=across, ylabel=upwards, xscale=scale, yscale=scale)
            axes.tick_params(labelbottom=True, labelleft=True)
        for axes in grid[len(titles) :]:
            axes.set_visible(False)
        figure.legend([handles[name] for name in names], names, loc="outside right upper")

    # Fewer colours would make one of two lines' colours.
    return _drawn(draw, columns * WIDTH + LEGEND, rows * HEIGHT).quantize(128, dither=Image.Dither.NONE)


def _drawn(draw: Callable[[Any], None], width: int, height: int) -> Image.Image:
    """A figure of matplotlib of that many pixels, RGB."""
    image = Chart(draw, "", (width / _DPI, height / _DPI)).png(dpi=_DPI)
    return Image.open(io.BytesIO(image)).convert("RGB")
