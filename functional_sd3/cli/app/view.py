"""HTML of the page: images while they form and when they are drawn, what is noted, and what differs."""

import base64
import io
from collections.abc import Sequence
from html import escape

from torch import Tensor

from functional_sd3.cli.app.drawing import Drawn, Progress
from functional_sd3.image import pixels

EMPTY = '<div class="sd3-empty">The image appears here, as it forms.</div>'
_COARSE = 256
"""Images below this side are scaled up in whole pixels: smoothing would show what they do not have."""

CSS = """
.sd3-draw {display: grid !important; gap: 16px; grid-template-columns: minmax(0, 5fr) minmax(0, 4fr);
  grid-template-areas: "words result" "settings result"; grid-template-rows: auto 1fr; align-items: start}
.sd3-words {grid-area: words} .sd3-result {grid-area: result} .sd3-settings {grid-area: settings}
@media (max-width: 800px) {.sd3-draw {grid-template-columns: minmax(0, 1fr);
  grid-template-areas: "words" "result" "settings"}}
.sd3-settings .form > .block > label:has(> input[type=number]) {height: 100%; display: flex;
  flex-direction: column}
.sd3-settings .form > .block > label > input {margin-top: auto}
.sd3-examples {font-size: 0.85em; opacity: 0.8; margin-bottom: -8px}
.sd3-example {text-align: left; justify-content: flex-start; font-weight: 400; white-space: normal;
  margin-bottom: -8px; background: transparent; border: 1px solid var(--border-color-primary);
  color: var(--body-text-color)}
.sd3-result .error, #compare-view .error {display: none}
.sd3-files .empty {min-height: 72px !important}
.form .block-info, .form .info, .form .info-text {overflow-wrap: anywhere}
.sd3-failed {border-left: 4px solid #c33; padding: 8px 12px; background: #c332; border-radius: 4px}
.sd3-images {display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr));
  justify-items: center}
.sd3-images figure {margin: 0; width: 100%; max-width: 512px}
.sd3-images img {width: 100%; height: auto; display: block; border-radius: 4px; background: #8883}
.sd3-images img.coarse {image-rendering: pixelated}
.sd3-images figcaption, .sd3-status {font-size: 0.85em; opacity: 0.85; margin-top: 4px; overflow-wrap: anywhere}
.sd3-status {min-height: 1.4em}
.sd3-bar {height: 4px; border-radius: 2px; background: #8883; overflow: hidden; margin-top: 8px}
.sd3-bar > div {height: 100%; background: var(--color-accent)}
.sd3-empty {aspect-ratio: 1; max-width: 512px; margin: auto; display: grid; place-items: center; text-align: center;
  border: 1px dashed #8888; border-radius: 4px; opacity: 0.7; padding: 8px}
.sd3-notes {margin: 0; padding-left: 1.2em; font-size: 0.9em}
.sd3-pair {display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr))}
.sd3-look {width: 100%; height: 80vh; border: 1px solid #8884; border-radius: 4px; background: white}
footer {opacity: 0.7}
"""


def progress(state: Progress, alts: Sequence[str] = ()) -> str:
    """A run on its way: the predictions of its images above a bar."""
    shown = EMPTY if state.images is None else images(state.images, alts)
    return (
        f'{shown}<div class="sd3-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * state.share:.0f}"><div style="width: {100 * state.share:.1f}%"></div></div>'
        f'<div class="sd3-status">{escape(state.words)}</div>'
    )


def result(drawing: Drawn) -> str:
    """The images of a run, each the PNG itself with its settings inside, as one may save it from the page."""
    captions = [f"seed {job.seed}: {job.prompt}" for job in drawing.jobs]
    shown = zip(list(drawing.files.values())[: len(captions)], captions, strict=True)
    side = max(drawing.images.shape[-2:])
    return _grid([_figure(content, caption, side) for content, caption in shown])


def images(values: Tensor, alts: Sequence[str] = ()) -> str:
    """Images (batch, 3, height, width) in [0, 1] in a grid."""
    alts = [*alts, *[""] * (len(values) - len(alts))]
    side = max(values.shape[-2:])
    return _grid([_figure(png(image), alt, side, caption=False) for image, alt in zip(values, alts, strict=False)])


def failed(words: str) -> str:
    """An error in words, in the place of the image."""
    return f'<div class="sd3-failed" role="alert">{escape(words)}</div>'


def notes(lines: Sequence[str]) -> str:
    """Notes of a run as a list; an empty text for none."""
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line.removeprefix('note: '))}</li>" for line in lines)
    return f'<ul class="sd3-notes">{items}</ul>'


def pair(first: str, second: str) -> str:
    """Two parts side by side."""
    return f'<div class="sd3-pair"><div>{first}</div><div>{second}</div></div>'


def framed(page: str) -> str:
    """A whole HTML page within the page, where its scripts see nothing of it."""
    return (
        f'<iframe class="sd3-look" title="how the image came to be" sandbox="allow-scripts allow-popups" '
        f'srcdoc="{escape(page)}"></iframe>'
    )


def png(image: Tensor) -> bytes:
    """The PNG of an image (3, height, width) in [0, 1]."""
    buffer = io.BytesIO()
    pixels.to_pil(image[None])[0].save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="sd3-images">{"".join(figures)}</div>'


def _figure(content: bytes, words: str, side: int, *, caption: bool = True) -> str:
    kind = ' class="coarse"' if side < _COARSE else ""
    source = base64.b64encode(content).decode()
    below = f"<figcaption>{escape(words)}</figcaption>" if caption else ""
    return f'<figure><img{kind} alt="{escape(words)}" src="data:image/png;base64,{source}">{below}</figure>'
