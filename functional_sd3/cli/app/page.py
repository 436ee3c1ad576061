"""The page: Gradio's components, made of the fields, and the events between them and `drawing`."""

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

import functional_sd3
from functional_sd3.cli import failures
from functional_sd3.cli.app import compare, components, drawing, examples, fields, looking, view
from functional_sd3.cli.app.drawing import Drawn, Progress
from functional_sd3.cli.app.looking import Looked
from functional_sd3.cli.app.model import Served
from functional_sd3.cli.app.streaming import stream

_TITLE = "functional_sd3"
_COMMAND = "command that draws it again"
_FILES = "files, with their settings inside"
_QUEUE: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": 1, "preprocess": False}
"""All that computes waits in one queue. The values come as they were sent: `fields.typed` checks them."""


def build(served: Served) -> gr.Blocks:
    """The page of a model."""
    with gr.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=(600, 3600), fill_width=False) as page:
        gr.Markdown(f"# {_TITLE}\n{_about(served)}")
        with gr.Tab("Draw"):
            made, start = _draw_tab(served)
        with gr.Tab("Look"):
            _look_tab(served, made, start)
        with gr.Tab("Compare"):
            _compare_tab(served)
    page.queue(max_size=served.limits.waiting, api_open=False, default_concurrency_limit=1)
    return page


def _about(served: Served) -> str:
    limits = served.limits
    return (
        f"Stable Diffusion 3.5 as pure functions, version {functional_sd3.__version__}. Images of at most "
        f"{limits.side} x {limits.side} pixels, {limits.steps} steps and {limits.count} at once."
    )


def _draw_tab(served: Served) -> tuple[dict[str, Any], gr.ImageEditor]:
    """The tab; returns its fields by name, and the editor among them."""
    made: dict[str, Any] = {}
    with gr.Row(elem_classes="sd3-draw"):
        with gr.Column(elem_classes="sd3-words", min_width=0):
            made |= components.fields_of(served, ["prompts", "negative"])
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
            _examples(served, made["prompts"])
        with gr.Column(elem_classes="sd3-result", min_width=0):
            shown = gr.HTML(view.EMPTY, elem_id="view")
            notes = gr.HTML(elem_id="notes", padding=False)
            command = gr.Textbox(label=_COMMAND, lines=2, buttons=["copy"], interactive=False, elem_id="command")
            files = _files(_FILES, "files")
        with gr.Column(elem_classes="sd3-settings", min_width=0):
            for row in (["key", fields.COUNT, "steps", "cfg"], ["width", "height"], ["method", "guidance"]):
                with gr.Row():
                    made |= components.fields_of(served, row)
            made |= components.fields_of(served, ["loras"])
            with gr.Accordion("Start from an image", open=False):
                made["start"] = start = components.editor(served)
                with gr.Row():
                    made |= components.fields_of(served, ["strength", "soften"])
                made |= components.fields_of(served, ["restore"])
            with gr.Accordion("More", open=False):
                made |= components.fields_of(served, ["cache", "weighted", "long_prompts"])

    def run(**values: Any) -> Iterator[tuple[Any, ...]]:
        upload = values.pop("start", None)

        def work(emit: Callable[[Progress | Drawn], None]) -> None:
            emit(drawing.draw(served, values, components.uploaded(start, upload), emit))

        yield from _outputs(work, view.result)

    started = gr.on(
        [draw.click, made["prompts"].submit], _named(run, list(made)), inputs_kwargs=made,
        outputs=[files, command, notes, shown],
        api_name="generate", show_progress="minimal", show_progress_on=shown,
        api_description="Draw images of prompts. Returns the PNG files, the command line that draws them again, notes "
        "and HTML that shows them.", **_QUEUE,
    )  # fmt: skip
    _stops(stop, started, shown)
    return made, start


def _look_tab(served: Served, made: dict[str, Any], start: gr.ImageEditor) -> None:
    gr.Markdown(
        "How the image of the first tab comes to be: its tokens, the times of its steps, where each step is heading, "
        "the attention of every word, norms and seconds. It is drawn again, by the same settings."
    )
    with gr.Row():
        draw = gr.Button("Look", variant="primary", elem_id="look", min_width=80)
        stop = gr.Button("Stop", elem_id="look-stop", min_width=80)
    shown = gr.HTML(elem_id="look-view", padding=False)
    notes = gr.HTML(elem_id="look-notes", padding=False)
    command = gr.Textbox(label=_COMMAND, lines=2, buttons=["copy"], interactive=False)
    files = _files("the page and the image", "look-files")

    def run(**values: Any) -> Iterator[tuple[Any, ...]]:
        upload = values.pop("start", None)

        def work(emit: Callable[[Progress | Looked], None]) -> None:
            emit(looking.look(served, values, components.uploaded(start, upload), emit))

        yield from _outputs(work, lambda looked: view.framed(looked.html))

    started = draw.click(
        _named(run, list(made)), inputs_kwargs=made, outputs=[files, command, notes, shown], api_name="look",
        show_progress="minimal", show_progress_on=shown, api_description="How the image of a prompt comes to be. "
        "Returns a page of HTML and the PNG, the command line that draws it again, notes and HTML that shows the page.",
        **_QUEUE,
    )  # fmt: skip
    _stops(stop, started, shown)


def _compare_tab(served: Served) -> None:
    made: dict[str, Any] = components.fields_of(served, ["prompts", "negative"], place="compare")
    with gr.Row():
        made |= components.fields_of(served, ["key", "width", "height"], place="compare")
    with gr.Row():
        for number, prefix in enumerate(("", compare.OTHER)):
            with gr.Column(min_width=280):
                gr.Markdown(f"### {'AB'[number]}")
                made |= {
                    prefix + name: part
                    for name, part in components.fields_of(served, compare.OWN, "compare", prefix).items()
                }
    with gr.Row():
        draw = gr.Button("Compare", variant="primary", elem_id="compare", min_width=80)
        stop = gr.Button("Stop", elem_id="compare-stop", min_width=80)
    shown = gr.HTML(view.pair(view.EMPTY, view.EMPTY), elem_id="compare-view")
    notes = gr.HTML(elem_id="compare-notes", padding=False)
    with gr.Row():
        commands = [
            gr.Textbox(label=f"command of {letter}", lines=2, buttons=["copy"], interactive=False) for letter in "AB"
        ]
    files = _files(_FILES, "compare-files")

    def run(**values: Any) -> Iterator[tuple[Any, ...]]:
        sides = [view.EMPTY, view.EMPTY]

        def work(emit: Callable[[tuple[int, Progress | Drawn] | compare.Compared], None]) -> None:
            emit(compare.compare(served, values, lambda index, state: emit((index, state))))

        for state in _streamed(work):
            if isinstance(state, str):
                yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), view.failed(state)
                continue
            if isinstance(state, compare.Compared):
                both = state.first, state.second
                named = {f"{letter}-{name}": each for letter, result in zip("ab", both, strict=True)
                         for name, each in result.files.items()}  # fmt: skip
                words = f"mean absolute difference of the pixels: {state.difference:.4f} (0 to 1)"
                lines = [words, *dict.fromkeys([*state.first.notes, *state.second.notes])]
                yield _written(named), *[result.command for result in both], view.notes(lines), view.pair(*sides)
                continue
            index, part = state
            sides[index] = view.result(part) if isinstance(part, Drawn) else view.progress(part)
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), view.pair(*sides)

    started = draw.click(
        _named(run, list(made)), inputs_kwargs=made, outputs=[files, *commands, notes, shown], api_name="compare",
        show_progress="minimal", show_progress_on=shown, api_description="Draw one prompt and noise by two settings. "
        "Returns the PNG files, both command lines, notes and HTML that shows them.", **_QUEUE,
    )  # fmt: skip
    _stops(stop, started, shown)


def _stops(stop: gr.Button, started: Any, shown: gr.HTML) -> None:
    """The button ends a run, which frees its place in the queue, and reports it where the run is shown."""
    stop.click(None, cancels=[started], api_visibility="private")
    # A run that was ended counts as failed, once its end has arrived: states that were sent before come until then,
    # and one that is taken from the wire already is painted over.
    say = r"""async (html) => {
        await new Promise((resolve) => setTimeout(resolve, 300));
        return (html || '').replace(/(<div class="sd3-status">)[^<]*/g, '$1stopped');
    }"""
    started.failure(None, shown, shown, js=say, api_visibility="private")


def _named(run: Callable[..., Iterator[Any]], names: Sequence[str]) -> Callable[..., Iterator[Any]]:
    """`run` with its keyword arguments in its signature: those of an API, which may be left out but for the prompt."""
    kind = inspect.Parameter.KEYWORD_ONLY
    defaults = {name: inspect.Parameter.empty if name == "prompts" else None for name in names}
    parameters = [inspect.Parameter(name, kind, default=default) for name, default in defaults.items()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _streamed(work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """The states of a run. An error is a text, to be shown, and then raised in words for callers of the API."""
    last = None
    try:
        for state in stream(work):
            # Between two states the last again, so that a run is never waited for longer than that.
            last = last if state is None else state
            if last is not None:
                yield last
    except Exception as error:
        words = failures.sentence(error)
        yield words
        raise gr.Error(words, visible=False, print_exception=False) from error


def _outputs(
    work: Callable[[Callable[[Any], None]], None], show: Callable[[Any], str]
) -> Iterator[tuple[Any, Any, Any, str]]:
    """Outputs of each state of a run: files, command and notes, which only the last has, and the HTML that shows it."""
    for state in _streamed(work):
        if isinstance(state, str):
            yield gr.skip(), gr.skip(), gr.skip(), view.failed(state)
        elif isinstance(state, Progress):
            yield gr.skip(), gr.skip(), gr.skip(), view.progress(state)
        else:
            yield _written(state.files), state.command, view.notes(state.notes), show(state)


def _files(label: str, place: str) -> gr.File:
    return gr.File(label=label, file_count="multiple", interactive=False, elem_id=place, elem_classes="sd3-files")


def _examples(served: Served, prompt: Any) -> None:
    if not served.is_shipped:
        return
    gr.HTML("Examples that the model knows", elem_classes="sd3-examples", padding=False)
    for text in examples.PROMPTS:
        button = gr.Button(text, size="sm", elem_classes="sd3-example")
        button.click(None, None, prompt, js=f"() => {json.dumps(text)}", api_visibility="private")


def _written(files: dict[str, bytes]) -> list[str]:
    """The paths of the files, in a new folder that Gradio may copy from."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=Path(gr.utils.get_upload_folder())))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in files]
