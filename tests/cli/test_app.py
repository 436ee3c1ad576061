"""`functional-sd3 app` without a browser: what the page computes, its API, and what the server refuses."""

import concurrent.futures
import dataclasses
import importlib.util
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading

import httpx
import numpy
import pytest
import torch
from PIL import Image

from functional_sd3 import cli, lora, pipeline, weights
from functional_sd3.cli import image_settings, options
from functional_sd3.cli.app import compare, drawing, examples, fields, limits, looking, model, sharing, streaming, view
from functional_sd3.core import tree
from functional_sd3.image import pixels
from functional_sd3.pipeline import request
from functional_sd3.recipes.shapes import prompts, world
from tests.app_server import drawing as computing
from tests.app_server import served_model, serving, wait_for

# Of Gradio and what it stands on, in the threads of the server.
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "a large red circle left of a small blue star on a white background"
SCENE = world.Scene((world.Thing("large", "red", "circle"), world.Thing("small", "blue", "star")), "white", "left of")
SHORT = {"prompts": PROMPT, "steps": 3}


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    """A random LoRA of the shipped model."""
    generator = torch.Generator().manual_seed(1)
    fresh = lora.spec(weights.outline(model.session.shipped.folder()).config, 2, ("transformer.blocks.*",))
    path = tmp_path_factory.mktemp("loras") / "mine.safetensors"

    def values(name, param):
        is_alpha = name.endswith("alpha")
        return torch.tensor(2.0) if is_alpha else torch.randn(param.shape, generator=generator) / 4

    lora.save(path, tree.map_with_path(values, fresh))
    return path


@pytest.fixture(scope="module")
def served(lora_file):
    return served_model("--lora", str(lora_file), "--max-size", "64")


@pytest.fixture(scope="module")
def server(lora_file):
    with serving("--lora", str(lora_file), "--max-steps", "2000", "--max-queue", "2", "--max-upload", "1") as running:
        yield running


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    from gradio_client import Client

    return Client(server.url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


def draw(served, upload=drawing.Upload(), **values):  # noqa: B008
    states = []
    return drawing.draw(served, {**SHORT, **values}, upload, states.append), states


def image_of(content: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(numpy.array(image))


def picture(colour=(40, 170, 70), size=(64, 64), alpha=255) -> Image.Image:
    return Image.new("RGBA", size, (*colour, alpha))


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def strokes(box=(32, 0, 64, 64), size=(64, 64)) -> bytes:
    layer = Image.new("RGBA", size, (0, 0, 0, 0))
    layer.paste((255, 255, 255, 255), box)
    return png(layer)


def test_every_field_of_the_page_is_one_of_the_request():
    parts = (request.Request, request.TextOptions, request.SamplingOptions, request.StartImages)
    names = {field.name for part in parts for field in dataclasses.fields(part)}
    assert set(fields.FIELDS) | {"start"} <= names and fields.COUNT not in names
    assert {name.removeprefix(compare.OTHER) for name in (*compare.SHARED, *compare.OWN)} <= set(fields.FIELDS)


@pytest.mark.parametrize("name", fields.EVERY)
def test_words_of_a_field_are_those_of_its_option(served, name):
    action = fields.action_of(served.generate, fields.EVERY[name])
    text = fields.description(served.generate, name)
    assert text and "(default" not in text and text.split(";")[0] in str(action.help)
    assert fields.label(name)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"width": 72}, ["width 72", "64 pixels", "--max-size 64"]),
        ({"steps": 101}, ["steps 101", "100 steps", "--max-steps 100"]),
        ({"count": 5}, ["count 5", "4 images", "--max-count 4"]),
        ({"prompts": "a\nb\nc", "count": 2}, ["3 prompts", "6 images", "--max-count 4"]),
        ({"prompts": "x" * 5000}, ["5,000 characters", "4,096"]),
        ({"prompts": " \n "}, ["the prompt is empty"]),
        ({"steps": "many"}, ["steps 'many'", "a whole number"]),
        ({"steps": 2.5}, ["steps 2.5", "a whole number"]),
        ({"steps": True}, ["steps True", "a whole number"]),
        ({"negative": ["a"]}, ["negative ['a']", "a text"]),
        ({"guidance": "cfg"}, ["guidance 'cfg'", "texts"]),
        ({"restore": 1}, ["restore 1", "true or false"]),
        ({"guidance": ["auto:params=/etc/passwd"]}, ["reads weights from a file"]),
        ({"loras": ["/etc/passwd"]}, ["'/etc/passwd'", "NAME", "mine"]),
        ({"loras": ["../mine=1"]}, ["'../mine=1'", "NAME", "mine"]),
    ],
)
def test_what_a_visitor_may_not_ask_for_is_refused_in_words(served, values, words):
    with pytest.raises(ValueError) as raised:
        drawing.settings(served, {**SHORT, **values}, {})
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    "values, words",
    [
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"cfg": float("nan")}, "--cfg nan must be a finite number"),
        ({"key": 2**64}, f"--seed {2**64} must be from"),
        ({"method": "eulr"}, "did you mean euler"),
        ({"width": 20}, "20"),
        ({"strength": 0.5}, "--strength needs --image"),
        ({"loras": ["mine=much"]}, "'much' must be a number"),
        ({"cache": "nothing"}, "nothing"),
        ({"guidance": ["skip-layer:layers=99"]}, "99"),
    ],
)
def test_what_generate_refuses_the_page_refuses_in_its_words(served, values, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[").replace("^", r"\^")):
        draw(served, **values)


@pytest.mark.parametrize(
    "values, upload",
    [
        ({}, drawing.Upload()),
        (
            {"prompts": f"{PROMPT}\na small yellow ring", "key": 5, "count": 2, "negative": "-blue", "cfg": 3.5,
             "guidance": ["apg:eta=0.5", "interval:start=0.2"], "method": "euler_ancestral", "loras": ["mine=0.5"]},
            drawing.Upload(),
        ),
        ({"strength": 0.5, "width": 64, "height": 56}, drawing.Upload(png(picture()))),
        ({"soften": 2, "restore": True, "cache": "fast", "steps": 6}, drawing.Upload(png(picture()), [strokes()])),
    ],
    ids=["plain", "many", "image", "mask"],
)  # fmt: skip
def test_the_image_is_that_of_the_command_that_is_shown(served, tmp_path, monkeypatch, values, upload):
    drawn, states = draw(served, upload, **values)
    monkeypatch.chdir(tmp_path)
    for name, content in drawn.files.items():
        (tmp_path / name).write_bytes(content)
    words = shlex.split(drawn.command)
    assert words[:2] == ["functional-sd3", "generate"]
    assert cli.main([*words[1:], "--out", "again"]) == 0
    ours = list(drawn.files.values())[: len(drawn.jobs)]
    theirs = [path.read_bytes() for path in sorted((tmp_path / "again").iterdir()) if path.stem != "grid"]
    assert len(ours) == len(theirs)
    as_rows = [{tuple(image_of(content).flatten().tolist()) for content in some} for some in (ours, theirs)]
    assert as_rows[0] == as_rows[1]

    def settings(content):
        with Image.open(io.BytesIO(content)) as image:
            return json.loads(image.info[image_settings.METADATA])

    assert sorted(map(str, map(settings, ours))) == sorted(map(str, map(settings, theirs)))
    # Every step shows where it is heading.
    steps = values.get("steps", 3) if "strength" not in values else 1
    assert sum(state.images is not None for state in states) >= steps


def test_the_last_prediction_of_the_data_is_the_image(served):
    drawn, states = draw(served, method="euler")
    shown = [state for state in states if state.images is not None]
    assert [state.words for state in shown] == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    torch.testing.assert_close(shown[-1].images, drawn.images, rtol=0, atol=1e-4)
    assert (shown[0].images - drawn.images).abs().max() > 0.05


def test_notes_of_a_run_are_collected_and_not_printed(served, capsys):
    drawn, _ = draw(served, prompts="a large red elephant", cfg=1.0, negative="blue")
    assert any("elephant" in note for note in drawn.notes) and any("--negative" in note for note in drawn.notes)
    assert capsys.readouterr() == ("", "")


def test_errors_do_not_show_folders_of_this_machine(served):
    faint = drawing.Upload(png(picture()), [png(picture(alpha=90))])
    with pytest.raises(ValueError, match="^mask.png: has no value above 90"):
        draw(served, faint)
    with pytest.raises(ValueError, match="^mask.png is 32x64, but the image is 64x64"):
        draw(served, drawing.Upload(png(picture()), [strokes((0, 0, 32, 64), (32, 64))]))


def test_strokes_of_all_layers_are_white_in_the_mask():
    upload = drawing.Upload(png(picture()), [strokes((0, 0, 8, 64)), strokes((0, 0, 0, 0)), strokes((0, 0, 64, 8))])
    made = drawing.read_upload(upload, 1)
    mask = image_of(made["mask.png"])
    assert mask[:8].eq(255).all() and mask[:, :8].eq(255).all() and mask[8:, 8:].eq(0).all()
    assert image_of(made["start.png"]).shape == (64, 64, 3)
    assert drawing.read_upload(drawing.Upload(png(picture(alpha=0))), 1) == {}, "the canvas of an empty editor"
    assert list(drawing.read_upload(drawing.Upload(png(picture()), [strokes((0, 0, 0, 0))]), 1)) == ["start.png"]


@pytest.mark.parametrize(
    "upload, words",
    [
        (drawing.Upload(None, [strokes()]), "upload the image first"),
        (drawing.Upload(b"GIF89a"), "the image: not a readable image"),
        (drawing.Upload(png(picture()), [b"x"]), "the mask: not a readable image"),
        (drawing.Upload(b"x" * (2**20 + 1)), "1,048,577 bytes is above the limit of 1 MiB .--max-upload 1"),
    ],
)
def test_uploads_that_are_no_images_are_refused(upload, words):
    with pytest.raises(ValueError, match=words):
        drawing.read_upload(upload, 1)


def test_previews_by_the_vae_are_decoded_from_few_latents(served):
    latents = torch.randn(2, 16, 64, 40, generator=torch.Generator().manual_seed(0))
    images = drawing.decode_preview(served.decoder, latents)
    assert images.shape == (2, 3, 8 * 32, 8 * 20)
    whole = pipeline.preview(served.decoder.params, served.decoder.config, latents[..., :32, :32])
    torch.testing.assert_close(drawing.decode_preview(served.decoder, latents[..., :32, :32]), whole)


def test_the_image_that_is_looked_into_is_the_one_that_is_drawn(served):
    values = {**SHORT, "key": 2, "loras": ["mine"], "prompts": f"{PROMPT}\na small ring", "count": 2}
    states = []
    looked = looking.look(served, values, drawing.Upload(), states.append)
    drawn, _ = draw(served, **{**values, "prompts": PROMPT, "count": 1})
    assert looked.command == drawn.command
    assert torch.equal(image_of(looked.files["image.png"]), image_of(next(iter(drawn.files.values()))))
    assert looked.html.startswith("<!doctype html>") and looked.files["look.html"].decode() == looked.html
    assert [state.words for state in states][-2:] == ["computes maps of attention", "writes the page"]
    assert all(one.share <= other.share for one, other in zip(states, states[1:], strict=False))


def test_two_settings_share_the_noise(served):
    emitted = []
    values = {**SHORT, "other_steps": 3, "other_cfg": 1.0, "key": 4}
    result = compare.compare(served, values, lambda index, state: emitted.append(index))
    assert emitted == sorted(emitted) and set(emitted) == {0, 1}
    same = compare.compare(served, {**values, "other_cfg": 5.0}, lambda index, state: None)
    assert result.difference > 0.005 and same.difference == 0.0
    assert "--cfg 1.0" in result.second.command and "--cfg" not in result.first.command
    with pytest.raises(ValueError, match="steps 101"):
        compare.compare(served, {**values, "other_steps": 101}, lambda *state: pytest.fail("the first was drawn"))


def test_a_stream_ends_its_computation_when_it_is_closed():
    reached, ended = [], threading.Event()

    def work(emit):
        try:
            for number in range(1000):
                emit(number)
                reached.append(number)
        finally:
            ended.set()

    values = streaming.stream(work)
    assert [next(values), next(values)] == [0, 1]
    values.close()
    assert ended.wait(60) and len(reached) < 6, "no computation runs ahead of its reader"


def test_a_stream_gives_values_in_order_errors_and_signs_of_life():
    def work(emit):
        emit(1)
        emit(2)
        raise ValueError("of the work")

    values = streaming.stream(work)
    assert [next(values), next(values)] == [1, 2]
    with pytest.raises(ValueError, match="of the work"):
        next(values)
    free = threading.Event()
    waiting = streaming.stream(lambda emit: (free.wait(60), emit(3)), every=0.01)
    assert next(waiting) is None
    free.set()
    assert [value for value in waiting if value is not None] == [3]


def test_words_of_a_visitor_are_escaped():
    shown = [view.notes(["<b>", "note: x"]), view.failed("<b>"), view.progress(drawing.Progress("<b>", 0.5)),
             view.framed('<script>"</script>')]  # fmt: skip
    assert not any("<b>" in html or '"</script>' in html for html in shown)
    assert "sandbox" in shown[-1] and "allow-same-origin" not in shown[-1]


def test_examples_are_captions_of_the_world_and_drawn_right(served):
    for text in examples.PROMPTS:
        assert set(text.split()) <= world.vocabulary()
    drawn, _ = draw(served, prompts=examples.PROMPTS[1], steps=28)
    scene = world.Scene((world.Thing("small", "yellow", "triangle"),), "purple")
    assert prompts.judge(prompts.read(drawn.images[0]), scene).right


def test_loras_of_one_name_and_scales_are_refused(lora_file, tmp_path):
    with pytest.raises(ValueError, match="the scale is chosen on the page"):
        model.named_loras([f"{lora_file}=0.5"])
    other = tmp_path / lora_file.name
    other.write_bytes(b"")
    with pytest.raises(ValueError, match="has the name of"):
        model.named_loras([str(lora_file), str(other)])
    with pytest.raises(ValueError, match="no such file"):
        model.named_loras(["nothing.safetensors"])


@pytest.mark.parametrize(
    "host, alone", [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
                    ("::", False), ("192.168.0.7", False), ("example.org", False)],
)  # fmt: skip
def test_who_can_see_the_page_is_said(host, alone):
    lines = sharing.lines(host, "http://x/", ["mine"])
    assert ("this machine alone" in lines[0]) == alone and "mine" in lines[0]
    assert any(line.startswith(f"warning: --host {host}") and "password" in line for line in lines) != alone


def test_gradios_own_variables_are_dropped(monkeypatch, tmp_path):
    for name in ("GRADIO_SHARE", "GRADIO_ALLOWED_PATHS", "GRADIO_SERVER_NAME"):
        monkeypatch.setenv(name, "/")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    sharing.environment(str(tmp_path))
    import os

    left = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_")}
    assert left.pop("GRADIO_TEMP_DIR") == str(tmp_path) and left.pop("GRADIO_ANALYTICS_ENABLED") == "False"
    assert set(left) == {"GRADIO_ANALYTICS_MAX_EVENTS", "GRADIO_ANALYTICS_CACHE_FREQUENCY"}


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else real(name, *rest)
    )
    assert cli.main(["app"]) == 1
    assert 'pip install "functional_sd3[app]"' in capsys.readouterr().err


def test_a_port_that_is_taken_is_named():
    from functional_sd3.cli.app import server

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} is taken"), server.listening("127.0.0.1", port):
            pass
    # Of documentation, and no machine's.
    with pytest.raises(ValueError, match="--host 203.0.113.7"), server.listening("203.0.113.7", 0):
        pass


def test_the_api_has_the_names_of_the_request_and_draws_what_was_asked(server, client):
    parameters = client.view_api(return_format="dict")["named_endpoints"]["/generate"]["parameters"]
    assert {each["parameter_name"] for each in parameters} == {*fields.EVERY, "start"}
    assert [each["parameter_name"] for each in parameters if not each["parameter_has_default"]] == ["prompts"]
    job = client.submit(prompts=PROMPT, key=3, api_name="/generate")
    files, command, notes, html = job.result(timeout=300)
    (image,) = [pixels.from_pil(Image.open(path).convert("RGB"))[0] for path in files]
    assert prompts.judge(prompts.read(image), SCENE).right
    assert command.startswith("functional-sd3 generate ") and "--seed 3" in command and html.startswith("<div")
    with Image.open(files[0]) as shown:
        record = json.loads(shown.info[image_settings.METADATA])
    assert image_settings.command(record["command"]) == command
    # Each of the 28 steps was sent, and the image.
    assert len({output[3] for output in job.outputs()}) >= 29


def test_an_uploaded_image_with_a_mask_is_drawn_from(server, client, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "a.png").write_bytes(png(picture((80, 80, 220))))
    (tmp_path / "b.png").write_bytes(strokes((0, 0, 32, 64)))
    start = {"background": handle_file(str(tmp_path / "a.png")), "layers": [handle_file(str(tmp_path / "b.png"))],
             "composite": None, "id": None}  # fmt: skip
    files, command, *_ = client.predict(**SHORT, start=start, restore=True, api_name="/generate")
    assert [path.rsplit("/", 1)[1] for path in files][1:] == ["start.png", "mask.png"]
    assert "--image start.png --mask mask.png" in command
    image = numpy.array(Image.open(files[0]).convert("RGB"))
    assert (image[:, 40:] == (80, 80, 220)).all() and not (image[:, :24] == (80, 80, 220)).all()


@pytest.mark.parametrize(
    "values, words",
    [
        ({"width": 20}, "20"),
        ({"height": 72}, "height 72 is above the limit of 64 pixels (--max-size 64"),
        ({"steps": 2001}, "steps 2001 is above the limit of 2,000 steps (--max-steps 2000"),
        ({"steps": "many"}, "steps 'many' must be a whole number"),
        ({"loras": ["/etc/passwd"]}, "must be NAME"),
        ({"guidance": ["auto:params=/etc/passwd"]}, "reads weights from a file"),
    ],
)
def test_errors_of_the_api_are_words(server, client, capfd, values, words):
    with pytest.raises(Exception) as raised:
        client.predict(**{**SHORT, **values}, api_name="/generate")
    assert words in str(raised.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "start", [7, "x", [], True, {"background": 7}, {"layers": 5}, {"id": []}, {"background": {"nopath": 1}}]
)
def test_a_start_of_another_form_is_refused_in_words(server, capfd, start):
    reply = call(server, "call/v2/generate", prompts=PROMPT, start=start)
    assert reply.status_code == 422
    assert all(word in reply.json()["detail"] for word in ("start ", "must be an object with background, layers"))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "path, body, words",
    [
        (
            "call/v2/generate",
            {"prompts": "a", "prompt": "b"},
            "'prompt' is no parameter of generate, which has prompts,",
        ),
        ("call/v2/generate", {"steps": 1}, "generate needs prompts"),
        ("call/v2/draw", {"prompts": "a"}, "there is no 'draw': the API has compare, generate, look"),
        ("call/generate", {"data": []}, "data must be the list of"),
        ("call/generate", {"data": "x"}, "data must be the list of"),
        ("queue/join", {"data": [], "fn_index": 99}, "fn_index names no function"),
        ("queue/join", {"data": [], "fn_index": []}, "fn_index names no function"),
    ],
)
def test_calls_that_are_none_are_refused_in_words(server, capfd, path, body, words):
    reply = call(server, path, **body)
    assert reply.status_code == 422 and words in reply.json()["detail"]
    assert "Traceback" not in capfd.readouterr().err


def call(server, path, **body):
    return httpx.post(f"{server.url}gradio_api/{path}", json=body, timeout=60)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "http://example.org/a.png", "{folder}/../../etc/passwd",
     "//etc/passwd", "", 7, ["/etc/passwd"], "\0"],
)  # fmt: skip
def test_no_file_is_read_that_was_not_uploaded(server, path):
    name = path.replace("{folder}", server.folder) if isinstance(path, str) else path
    file = {"path": name, "url": "http://example.org/a.png", "meta": {"_type": "gradio.FileData"}}
    data = [PROMPT, "", 0, 1, 1, 1, 0, 0, "euler", [], [], {"background": file, "layers": [], "composite": None}]
    for body, where in (({"data": data}, "call/generate"), ({"prompts": "a", "start": data[-1]}, "call/v2/generate"),
                        ({"data": data, "fn_index": 0, "session_hash": "abc"}, "queue/join")):  # fmt: skip
        reply = call(server, where, **body)
        assert reply.status_code == 403 and "no file that was uploaded" in reply.json()["detail"]


@pytest.mark.parametrize(
    "path",
    ["file=/etc/passwd", "file=../../etc/passwd", "file=http://example.org/", "file=file:///etc/passwd",
     "file=%2Fetc%2Fpasswd",
     "file={folder}/../../../../etc/passwd", "file/etc/passwd", "proxy=http://example.org/", "monitoring", "runs",
     "vibe-code", "dev/reload", "deep_link", "stream/a/b/c/playlist-file", "file=pyproject.toml"],
)  # fmt: skip
def test_routes_that_the_page_does_not_need_are_not_there(server, path):
    url = f"{server.url}gradio_api/{path.replace('{folder}', server.folder)}"
    assert httpx.get(url, timeout=60).status_code in (403, 404)
    assert httpx.post(url, json={}, timeout=60).status_code in (403, 404)


def test_calls_past_the_queue_are_not_there(server):
    assert call(server, "run/generate", data=[PROMPT]).status_code == 404
    assert call(server, "api/generate", data=[PROMPT]).status_code == 404
    assert httpx.get(f"{server.url}docs", timeout=60).status_code == 404


def test_other_sites_and_names_are_refused(server):
    evil = {"Origin": "http://evil.example"}
    assert httpx.post(f"{server.url}gradio_api/call/generate", json={"data": []}, headers=evil).status_code == 403
    # A name that an attacker lets point to this machine.
    assert httpx.get(server.url, headers={"Host": "evil.example"}).status_code == 403
    page = httpx.get(server.url, timeout=60)
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]


def test_bodies_beyond_the_limits_are_refused(server):
    big = b"x" * (3 * 2**20)
    files = {"files": ("a.png", big, "image/png")}
    assert httpx.post(f"{server.url}gradio_api/upload", files=files, timeout=60).status_code == 413
    chunks = (big[:65536] for _ in range(48))
    assert httpx.post(f"{server.url}gradio_api/upload", content=chunks, timeout=60).status_code in (400, 413)
    assert call(server, "call/generate", data=["x" * (2**20 + 1)]).status_code == 413


def test_cancelling_ends_a_run_and_frees_the_queue(server, client):
    job = client.submit(prompts=PROMPT, steps=2000, api_name="/generate")
    wait_for(lambda: len(job.outputs()) > 2, "a step of the run")
    assert job.cancel()
    wait_for(lambda: not computing() and not server.served.turn.locked(), "the end of the run")
    assert len(job.outputs()) < 2000
    assert client.predict(**SHORT, api_name="/generate")[1].startswith("functional-sd3 generate")


def test_a_closed_tab_ends_its_run_and_those_that_wait(server):
    session = "closedtab"
    (index,) = [index for index, fn in server.page.fns.items() if fn.api_name == "generate"]
    data = [None] * len(server.page.fns[index].inputs)
    names = server.page.fns[index].input_keyword_names
    data[names.index("prompts")], data[names.index("steps")] = PROMPT, 2000
    join = {"data": data, "fn_index": index, "session_hash": session}
    assert call(server, "queue/join", **join).status_code == 200
    with httpx.stream("GET", f"{server.url}gradio_api/queue/data?session_hash={session}", timeout=120) as stream:
        lines = stream.iter_lines()  # Kept: the connection is closed where its lines are dropped.
        assert any("process_generating" in line for line in lines)
        # At once: none of them is in the queue when the others are looked at.
        with concurrent.futures.ThreadPoolExecutor(12) as threads:
            replies = list(threads.map(lambda _: call(server, "queue/join", **join), range(12)))
        assert sorted(reply.status_code for reply in replies) == [200] * 2 + [503] * 10
        full = [reply.json()["detail"] for reply in replies if reply.status_code == 503]
        assert all("2 requests wait already" in words and "--max-queue 2" in words for words in full), full
    wait_for(lambda: not computing() and not server.served.turn.locked(), "the end of the run")
    wait_for(lambda: len(server.page._queue) == 0, "an empty queue")


def test_the_command_prints_its_address_and_leaves_nothing_behind(tmp_path):
    words = [sys.executable, "-m", "functional_sd3", "app", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        url = process.stdout.readline().strip()
        assert httpx.get(url, timeout=60).status_code == 200
        assert list(tmp_path.glob("functional-sd3-app-*"))
        process.terminate()
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM and "for this machine alone" in said and "Traceback" not in said
    assert not list(tmp_path.glob("functional-sd3-app-*"))


def test_the_command_ends_under_a_run(tmp_path):
    words = [sys.executable, "-m", "functional_sd3", "app", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        call = f"{process.stdout.readline().strip()}gradio_api/call/v2/generate"
        event = httpx.post(call, json={"prompts": PROMPT, "steps": 100, "count": 4}, timeout=60).json()["event_id"]
        with httpx.stream("GET", f"{call.replace('/v2', '')}/{event}", timeout=60) as lines:
            # Where the first step is shown, the run computes.
            assert any("step 1 of 100" in line for line in lines.iter_lines())
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "stopped" in said and "terminate" not in said
    assert not list(tmp_path.glob("functional-sd3-app-*"))


@pytest.mark.parametrize(
    "options, words",
    [(["--host", ""], "--host '' must be an address"), (["--block-swap", "-1"], "--block-swap -1 must be a number")],
    ids=str,
)
def test_bad_options_of_the_command_are_named(options, words, capsys):
    assert cli.main(["app", *options]) == 1 and words in capsys.readouterr().err


def test_the_largest_side_is_of_sizes_that_are_not_given_too():
    small = served_model("--quiet", "--max-size", "32")
    for upload in (drawing.Upload(), drawing.Upload(png(picture()))):
        with pytest.raises(ValueError, match="width 64 is above the limit of 32 pixels .--max-size 32"):
            drawing.draw(small, SHORT, upload, lambda state: None)


def test_a_prediction_that_is_not_finite_is_not_shown(served):
    shown = []
    with pytest.raises(ValueError, match="values that are not finite"):
        drawing.draw(served, {"prompts": PROMPT, "cfg": 1e39, "steps": 2}, drawing.Upload(), shown.append)
    steps = [each.images for each in shown if each.words.startswith("step")]
    assert len(steps) == 2 and steps[-1] is None


def test_options_of_weights_reach_the_model(tmp_path):
    swapped = served_model("--block-swap", "1", "--dtype", "float32")
    assert callable(swapped.read.components) and swapped.offload and swapped.settings["dtype"] == "float32"
    drawn, _ = draw(swapped, steps=1)
    assert "--dtype float32" in drawn.command


def test_limits_follow_the_model():
    arguments = cli.parser.parse(["app"]).options
    assert limits.of(arguments, 1024, 6144).side == 2048 and limits.of(arguments, 64, 64).side == 64
    assert options.SHIPPED[0] == "tiny"
