"""Plots by Pillow alone: lines over two logarithmic or two linear axes, points and arrows, tiles, maps, bars."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

Points = Sequence[tuple[float, float]]

COLOURS = (
    (0, 0, 0), (214, 39, 40), (255, 127, 14), (188, 150, 0), (44, 160, 44), (23, 160, 170), (31, 119, 180),
    (90, 60, 200), (148, 103, 189), (227, 90, 180), (140, 86, 75), (127, 127, 127), (120, 170, 60), (80, 80, 120),
)  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 420, 300, 52, 24, 10, 34
LEGEND = 120

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
    image = Image.new("RGB", (side, side + LABEL), "white")
    pen = ImageDraw.Draw(image)

    def place(point: Sequence[float]) -> tuple[float, float]:
        x, y = point
        return side * (x / extent + 1) / 2, LABEL + side * (1 - y / extent) / 2

    pen.rectangle([0, LABEL, side - 1, side + LABEL - 1], outline=(200, 200, 200))
    pen.text((4, 0), title, fill="black")
    if paths is not None:
        for line in paths.detach().transpose(0, 1).tolist():
            pen.line([place(point) for point in line], fill=(170, 170, 170))
    for index, (name, group) in enumerate(points.items()):
        colour = COLOURS[(index + 1) % len(COLOURS)] if len(points) > 1 else COLOURS[6]
        for x, y in map(place, group.detach().tolist()):
            pen.rectangle([x - 1, y - 1, x, y], fill=colour)
        if name:
            pen.text((6, LABEL + 4 + LABEL * index), name, fill=colour)
    if arrows is not None:
        for start, end in zip(*(ends.detach().tolist() for ends in arrows), strict=True):
            (x, y), (to_x, to_y) = place(start), place(end)
            pen.line([(x, y), (to_x, to_y)], fill="black")
            angle = math.atan2(to_y - y, to_x - x)
            for turn in (2.6, -2.6):
                tip = (to_x + 4 * math.cos(angle + turn), to_y + 4 * math.sin(angle + turn))
                pen.line([(to_x, to_y), tip], fill="black")
    return image


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
    names = 6 * max(map(len, values)) + 12
    image = Image.new("RGB", (names + 420, 20 * len(values) + 4), "white")
    pen = ImageDraw.Draw(image)
    for index, (name, value) in enumerate(values.items()):
        top, length = 20 * index + 4, 320 * value / max(values.values())
        pen.text((4, top), name, fill="black")
        pen.rectangle([names, top, names + length, top + 12], fill=COLOURS[6])
        pen.text((names + length + 6, top), f"{value:,.4g} {unit}", fill="black")
    return image


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
    scaled = float if linear else math.log
    frame = [bound(scaled(point[axis]) for point in every) for axis in (0, 1) for bound in (min, max)]
    names = list(dict.fromkeys(name for lines in titles.values() for name in lines))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    rows, left = (len(titles) + 1) // 2, min(2, len(titles)) * WIDTH
    image = Image.new("RGB", (left + LEGEND, rows * HEIGHT), "white")
    for index, (title, lines) in enumerate(titles.items()):
        panel = _panel(title, lines, colours, frame, across, upwards, linear)
        image.paste(panel, (index % 2 * WIDTH, index // 2 * HEIGHT))
    pen = ImageDraw.Draw(image)
    for index, name in enumerate(names):
        y = TOP + 6 + 16 * index
        pen.line([(left + 4, y), (left + 22, y)], fill=colours[name], width=3)
        pen.text((left + 28, y - 6), name, fill="black")
    # A palette is a quarter of the size, and there are few colours.
    return image.quantize(64)


def _panel(title, lines, colours, frame, across, upwards, linear) -> Image.Image:
    left, right, low, high = frame
    scaled, unscaled = (float, float) if linear else (math.log, math.exp)
    panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(panel)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (scaled(x) - left) / max(right - left, 1e-9),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scaled(y) - low) / max(high - low, 1e-9),
        )

    for value in _even(low, high) if linear else _powers(low, high):
        y = place(unscaled(left), value)[1]
        pen.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=(220, 220, 220))
        pen.text((16, y - 6), f"{value:g}", fill="black")
    ticks = sorted({round(x) for points in lines.values() if len(points) > 1 for x, _ in points if x == round(x)})
    for x in ticks:
        at = place(x, unscaled(low))[0]
        pen.line([(at, HEIGHT - BOTTOM), (at, HEIGHT - BOTTOM + 4)], fill="black")
        if linear or x in (ticks[0], ticks[-1]) or x in (8, 16, 28):
            pen.text((at - 6, HEIGHT - BOTTOM + 6), str(x), fill="black")
    pen.line([(LEFT, TOP), (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], fill="black")
    pen.text((LEFT + 6, 6), f"{title}: {upwards}", fill="black")
    pen.text((WIDTH - RIGHT - 6 * len(across), HEIGHT - 14), across, fill="black")
    for name, points in lines.items():
        path = [place(x, y) for x, y in sorted(points)]
        pen.line(path, fill=colours[name], width=2)
        for x, y in path:
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colours[name])
    return panel


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms."""
    return [10.0**power for power in range(math.ceil(low / math.log(10)), math.floor(high / math.log(10)) + 1)]


def _even(low: float, high: float) -> list[float]:
    """Up to eight multiples of 1, 2 or 5 times a power of ten from `low` to `high`."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / 8))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= 8)
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
