"""Model card of a training run beside its weights: a README with the command, the loss curve and samples."""

import io
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from functional_sd3.formats import files
from functional_sd3.image import pixels

WIDTH, HEIGHT, MARGIN = 640, 280, 40


def write(
    folder: Path, *, title: str, text: str, log: Sequence[tuple[int, float]], samples: Tensor, captions: Sequence[str]
) -> None:
    """Write README.md, loss.png and samples.png into `folder`.

    log: (step, loss) in order; samples: (count, 3, height, width) in [0, 1] of `captions`, four a row.
    """
    files.write_atomic(folder / "loss.png", _png(curve(log)))
    files.write_atomic(folder / "samples.png", _png(pixels.to_pil(pixels.grid(samples, 4))[0]))
    thinned = [log[index * (len(log) - 1) // 19] for index in range(20)] if len(log) > 20 else list(log)
    lines = [
        f"# {title}",
        text.strip(),
        "## Loss",
        "![loss against steps](loss.png)",
        "\n".join(["| step | loss |", "|---|---|", *(f"| {step} | {loss:.4f} |" for step, loss in thinned)]),
        "## Samples",
        "Captions that were never trained on, four a row, at the default settings, seed 0; none is left out.",
        "![samples](samples.png)",
        "\n".join(f"{index}. {caption}" for index, caption in enumerate(captions, 1)),
    ]
    files.write_atomic(folder / "README.md", ("\n\n".join(lines) + "\n").encode())


def curve(log: Sequence[tuple[int, float]]):
    """The loss against the steps, logarithmic upwards, as a Pillow image."""
    import math

    from PIL import Image, ImageDraw

    if not log:
        raise ValueError("log is empty; a curve needs at least one row")
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    last = max(log[-1][0], 1)
    low, high = (math.log(bound(loss for _, loss in log)) for bound in (min, max))
    span = max(high - low, 1e-6)

    def place(step: float, loss: float) -> tuple[float, float]:
        across = MARGIN + (WIDTH - 2 * MARGIN) * step / last
        return across, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (math.log(loss) - low) / span

    pen.line([(MARGIN, MARGIN), (MARGIN, HEIGHT - MARGIN), (WIDTH - MARGIN, HEIGHT - MARGIN)], fill="black")
    for share in range(5):
        loss = math.exp(low + span * share / 4)
        pen.text((2, place(0, loss)[1] - 6), f"{loss:.3f}", fill="black")
        pen.text(
            (place(last * share / 4, math.exp(low))[0] - 12, HEIGHT - MARGIN + 6), f"{last * share // 4}", fill="black"
        )
    pen.line([place(step, loss) for step, loss in log], fill=(50, 80, 220), width=2)
    return image


def _png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
