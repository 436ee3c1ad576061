"""Line plots over two logarithmic or two linear axes, by Pillow alone."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

Points = Sequence[tuple[float, float]]

COLOURS = (
    (0, 0, 0), (214, 39, 40), (255, 127, 14), (188, 150, 0), (44, 160, 44), (23, 160, 170), (31, 119, 180),
    (90, 60, 200), (148, 103, 189), (227, 90, 180), (140, 86, 75), (127, 127, 127), (120, 170, 60), (80, 80, 120),
)  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 420, 300, 52, 24, 10, 34
LEGEND = 120


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
    rows = (len(titles) + 1) // 2
    image = Image.new("RGB", (2 * WIDTH + LEGEND, rows * HEIGHT), "white")
    for index, (title, lines) in enumerate(titles.items()):
        panel = _panel(title, lines, colours, frame, across, upwards, linear)
        image.paste(panel, (index % 2 * WIDTH, index // 2 * HEIGHT))
    pen = ImageDraw.Draw(image)
    for index, name in enumerate(names):
        y = TOP + 6 + 16 * index
        pen.line([(2 * WIDTH + 4, y), (2 * WIDTH + 22, y)], fill=colours[name], width=3)
        pen.text((2 * WIDTH + 28, y - 6), name, fill="black")
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
