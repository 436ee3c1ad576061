"""Gradio's components of the fields, and the content of what is uploaded to them."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.image_editor import EditorData

from functional_sd3.cli import guidance
from functional_sd3.cli.app import examples, fields
from functional_sd3.cli.app.drawing import Upload
from functional_sd3.cli.app.model import Served
from functional_sd3.cli.options import METHODS

_BY_DEFAULT = {"strength": "0.6, or 1 with a mask", "soften": "not at all"}
"""Meaning of 0."""


def fields_of(served: Served, names: Any, place: str = "draw", prefix: str = "") -> dict[str, Any]:
    """The components of fields by name. place, prefix: of their ids on the page."""
    return {name: component(served, name, f"{place}-{prefix}{name}") for name in names}


def component(served: Served, name: str, place: str) -> Any:
    """The component of a field, with its option's description."""
    kind, value = fields.EVERY[name].kind, served.defaults.get(name)
    common: dict[str, Any] = {
        "label": fields.label(name), "info": fields.description(served.generate, name), "elem_id": place,
    }  # fmt: skip
    if name == "prompts":
        return gr.Textbox(**{**common, "info": "what to draw; each line is an image of its own"}, lines=2,
                          placeholder=examples.FIRST if served.is_shipped else "", autofocus=True)  # fmt: skip
    if name in ("width", "height"):
        own = f"{served.side}, or the image's" if place.startswith("draw") else f"{served.side}"
        info = f"pixels, a multiple of {served.step}, at most {served.limits.side}; 0: {own}"
        return gr.Number(0, precision=0, **{**common, "info": info})
    if name == "method":
        return gr.Dropdown(list(METHODS), value=value, **common)
    if name == "guidance":
        plain = [each for each, one in guidance.KINDS.items() if not one.required]
        return gr.Dropdown(plain, value=[], multiselect=True, allow_custom_value=True, **common)
    if name == "loras":
        info = "those that are added; NAME=0.8 for another strength than 1"
        return gr.Dropdown(list(served.loras), value=[], multiselect=True, allow_custom_value=True,
                           visible=bool(served.loras), **{**common, "info": info})  # fmt: skip
    if kind is bool:
        return gr.Checkbox(False, **common)
    if name in fields.BY_DEFAULT:
        return gr.Number(0, **{**common, "info": f"{common['info']}; 0: {_BY_DEFAULT[name]}"})
    if kind in (int, float):
        return gr.Number(value, precision=0 if kind is int else None, **common)
    return gr.Textbox(**common)


def editor(served: Served) -> gr.ImageEditor:
    """The component of the image that a run starts from, and of the strokes over it."""
    side = served.side
    made = gr.ImageEditor(
        label="image, and strokes over what is to be drawn anew", sources=["upload", "clipboard"], type="filepath",
        format="png", layers=False,
        brush=gr.Brush(max(2, side // 12), ["#ff00ff"], "#ff00ff", "fixed"), transforms=[],
        canvas_size=(side, side), height=420, buttons=[], elem_id="start",
        placeholder="Drop an image here\nthen draw over what is to be drawn anew",
    )  # fmt: skip
    made.blob_storage = _Recent()
    return made


class _Recent(dict):
    """A dict of the last keys alone: what browsers send ahead of a run and never ask for would be kept for ever."""

    _MOST = 32

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > self._MOST:
            del self[next(iter(self))]


def uploaded(editor: gr.ImageEditor, payload: Any) -> Upload:
    """The image and the strokes of an editor's value, as the bytes that were uploaded: they are read by `image.files`.

    (Gradio would read them by Pillow alone. No class is derived from the editor, as Gradio then writes a file beside
    the module.)
    """
    if payload is None:
        return Upload()
    data = EditorData(**payload)
    # A browser sends them ahead, under an id.
    source = editor.blob_storage.pop(data.id, None) if data.id is not None else data
    if source is None:
        raise ValueError("the image has not arrived yet: try again")
    layers = [_content(layer) for layer in source.layers]
    return Upload(_content(source.background), [layer for layer in layers if layer])


def _content(file: Any) -> bytes | None:
    return Path(file.path).read_bytes() if hasattr(file, "path") else None if file is None else bytes(file)
