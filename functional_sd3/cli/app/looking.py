"""The page of `look` for the run of a form: its tokens, steps and attention."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from functional_sd3 import look as looks
from functional_sd3.cli import output, report, session
from functional_sd3.cli.app import drawing, fields
from functional_sd3.cli.app.drawing import Progress, Upload
from functional_sd3.cli.app.model import Served
from functional_sd3.flow.ode.method import StepInfo
from functional_sd3.image import pixels


class Looked(NamedTuple):
    """A page of HTML that needs no other file, and what drew the image in it."""

    html: str
    files: dict[str, bytes]
    """Name -> the page and the image, with its settings inside."""
    command: str
    notes: tuple[str, ...]


@torch.no_grad()
def look(served: Served, values: fields.Values, upload: Upload, emit: Callable[[Progress], None]) -> Looked:
    """The page of the first image of the values; `emit` as in `draw`. Raises ValueError as `planned` does."""
    first = str(values.get("prompts") or "").strip().split("\n")[0]
    one = {**values, "prompts": first, fields.COUNT: 1}
    with report.collected() as notes, drawing.planned(served, one, upload, emit) as run:
        shown = drawing.steps_shown(served, lambda state: emit(state._replace(share=0.5 * state.share)))

        def on_step(info: StepInfo) -> None:
            shown(info)
            if info.index + 1 >= info.steps:
                emit(Progress("computes maps of attention", 0.5))

        request = run.request(run.jobs, on_step)
        opened = run.opened
        # The components of the session have its LoRAs and words.
        plain = session.without_adapters(request)
        made = looks.trace_request(opened.fetch, opened.config, opened.tokenizers, plain)
        emit(Progress("writes the page", 0.9))
        html = looks.page(made)
        image = output.encoded(pixels.to_pil(made.image[None])[0], ".png", run.record(run.jobs, request))
        files = {"look.html": html.encode(), "image.png": image, **run.uploaded}
        return Looked(html, files, run.command, tuple(dict.fromkeys(notes)))
