"""Model card of a training run beside its weights: a README with the command, the curves of its logs and samples."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from functional_sd3.formats import files
from functional_sd3.image import pixels
from functional_sd3.training import log

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, HEIGHT, MARGIN = 640, 280, 40


class Curve(NamedTuple):
    """A logged value against the steps. name: of its file, NAME.png; points: (step, value) in order.

    logarithmic: upwards, for values above 0.
    """

    name: str
    title: str
    points: Sequence[tuple[int, float]]
    logarithmic: bool = True


def read_curves(work: Path, table: Iterable[tuple[str, str, str, str, bool]]) -> list[Curve]:
    """Curves of the logs WORK/STAGE/log.csv that there are.

    table: of each the stage, the column of its log, then name, title and `logarithmic` of the curve.
    """
    return [
        Curve(name, title, [(int(row["step"]), float(row[column])) for row in rows], logarithmic)
        for stage, column, name, title, logarithmic in table
        if (rows := log.read(work / stage / "log.csv"))
    ]


def write(
    folder: Path, *, title: str, text: str, curves: Sequence[Curve], samples: Tensor, captions: Sequence[str]
) -> None:
    """Write README.md, a file for each curve and samples.png into `folder`.

    samples: (count, 3, height, width) in [0, 1] of `captions`, four a row.
    """
    files.write_atomic(folder / "samples.png", _png(pixels.to_pil(pixels.grid(samples, 4))[0]))
    lines = [f"# {title}", text.strip()]
    for curve in curves:
        files.write_atomic(folder / f"{curve.name}.png", _png(plot(curve)))
        points = list(curve.points)
        thinned = [points[index * (len(points) - 1) // 19] for index in range(20)] if len(points) > 20 else points
        rows = (f"| {step} | {value:.4f} |" for step, value in thinned)
        lines += [
            f"## {curve.title}",
            f"![{curve.name} against steps]({curve.name}.png)",
            "\n".join([f"| step | {curve.name} |", "|---|---|", *rows]),
        ]
    lines += [
        "## Samples",
        "Captions that were never trained on, four a row, at the default settings, seed 0; none is left out.",
        "![samples](samples.png)",
        "\n".join(f"{index}. {caption}" for index, caption in enumerate(captions, 1)),
    ]
    files.write_atomic(folder / "README.md", ("\n\n".join(lines) + "\n").encode())


def plot(curve: Curve) -> "Image":
    """The values against the steps as a Pillow image. Raises ValueError for a curve without points."""
    import math

    from PIL import Image, ImageDraw

    log = curve.points
    if not log:
        raise ValueError(f"the log of {curve.name} is empty; a curve needs at least one row")
    scaled, unscaled = (math.log, math.exp) if curve.logarithmic else (float, float)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    last = max(log[-1][0], 1)
    low, high = (scaled(bound(value for _, value in log)) for bound in (min, max))
    span = max(high - low, 1e-6)

    def place(step: float, value: float) -> tuple[float, float]:
        across = MARGIN + (WIDTH - 2 * MARGIN) * step / last
        return across, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (scaled(value) - low) / span

    pen.line([(MARGIN, MARGIN), (MARGIN, HEIGHT - MARGIN), (WIDTH - MARGIN, HEIGHT - MARGIN)], fill="black")
    for share in range(5):
        value = unscaled(low + span * share / 4)
        pen.text((2, place(0, value)[1] - 6), f"{value:.3f}", fill="black")
        across, _ = place(last * share / 4, unscaled(low))
        pen.text((across - 12, HEIGHT - MARGIN + 6), f"{last * share // 4}", fill="black")
    pen.line([place(step, value) for step, value in log], fill=(50, 80, 220), width=2)
    return image


def _png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
