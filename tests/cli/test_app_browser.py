"""The page of `functional-sd3 app` as a person meets it, in a real Chromium; screenshots in tmp_path."""

import base64
import io
import json
import shutil
from urllib.parse import urlsplit

import numpy
import pytest
from PIL import Image

from functional_sd3.cli import image_settings
from functional_sd3.cli.app import examples
from functional_sd3.image import pixels
from functional_sd3.recipes.shapes import prompts, world
from tests.app_server import drawing, serving, wait_for

# Of Gradio and what it stands on, in the threads of the server.
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WORDS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PROMPT = "a large red circle left of a small blue star on a white background"
SCENE = world.Scene((world.Thing("large", "red", "circle"), world.Thing("small", "blue", "star")), "white", "left of")
SLOW = 120_000
"""Milliseconds that a condition is waited for: the machine may be busy with much else."""


@pytest.fixture(scope="module")
def server():
    with serving("--max-steps", "2000") as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium, so the page of `app` was not tried in a browser")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as made:
        browser = made.chromium.launch(executable_path=path, args=WORDS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def visit(server, chromium):
    """A visitor with a window of its own: `visit(width, scheme)` is the page; it asks no other machine for anything."""
    contexts, asked, complaints = [], [], []

    def open_page(width=1280, scheme="light"):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(SLOW)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#draw")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert {urlsplit(url).netloc for url in asked if urlsplit(url).scheme not in ("data", "blob")} == {
        urlsplit(server.url).netloc
    }
    assert not complaints


@pytest.fixture(scope="module")
def desk(visit):
    """A page that several tests use one after the other."""
    page = visit()
    page.set_viewport_size({"width": 1280, "height": 2200})
    return page


def draw(page, prompt=PROMPT, **numbers):
    """Fills the first tab and draws; the image before is taken away, so that what appears is the new one."""
    page.get_by_role("tab", name="Draw").click()
    page.fill("#draw-prompts textarea", prompt)
    page.evaluate("document.querySelectorAll('#view figcaption, #view [role]').forEach(each => each.remove())")
    for name, value in {"key": 0, "steps": 28, "width": 0, **numbers}.items():
        page.fill(f"#draw-{name} input", str(value))
    page.click("#draw")


def free(server) -> bool:
    return not drawing() and not server.served.turn.locked() and len(server.page._queue) == 0


def png_of(page, place="#view"):
    source = page.get_attribute(f"{place} figure img", "src")
    return base64.b64decode(source.partition(",")[2])


def test_a_prompt_that_is_typed_becomes_the_right_image_and_a_bad_size_is_said_in_words(desk, tmp_path):
    page = desk
    draw(page, key=3)
    page.wait_for_selector("#view figcaption")
    page.screenshot(path=tmp_path / "drawn.png", full_page=True)
    content = png_of(page)
    with Image.open(io.BytesIO(content)) as image:
        record = json.loads(image.info[image_settings.METADATA])
        reading = prompts.read(pixels.from_pil(image.convert("RGB"))[0])
    assert prompts.judge(reading, SCENE).right
    command = page.input_value("#command textarea")
    assert command == image_settings.command(record["command"]) and "--seed 3" in command
    with page.expect_download() as download:
        page.locator("#files a").first.click()
    assert download.value.path().read_bytes() == content

    draw(page, width=20)
    page.wait_for_selector("#view [role=alert]")
    page.screenshot(path=tmp_path / "size.png", full_page=True)
    assert "width 20 is not a multiple of 8" in page.inner_text("#view")
    draw(page, width=4096)
    page.wait_for_function("document.querySelector('#view').textContent.includes('4096')")
    words = page.inner_text("#view")
    assert "limit of 64 pixels" in words and "--max-size 64" in words
    assert "Traceback" not in page.inner_text("body")


def test_a_run_is_stopped_and_one_of_a_closed_tab_ends(visit, server, tmp_path):
    page = visit(390, "dark")
    draw(page, steps=2000)
    # The image as it forms: one prediction after the other.
    page.wait_for_selector("#view img")
    first = page.get_attribute("#view img", "src")
    page.wait_for_function("first => document.querySelector('#view img').src != first", arg=first)
    page.click("#stop")
    page.wait_for_function("document.querySelector('#view .sd3-status')?.textContent == 'stopped'")
    page.screenshot(path=tmp_path / "stopped.png", full_page=True)
    wait_for(lambda: free(server), "the end of the run that was stopped")
    draw(page, examples.PROMPTS[1], steps=4)
    page.wait_for_selector("#view figcaption")
    draw(page, steps=2000)
    page.wait_for_selector("#view [role=progressbar]")
    wait_for(lambda: not free(server), "the start of the run")
    page.close()
    wait_for(lambda: free(server), "the end of the closed tab's run")


def test_strokes_on_an_image_are_what_is_drawn_anew(desk, tmp_path):
    page = desk
    page.get_by_role("tab", name="Draw").click()
    Image.new("RGB", (64, 64), (80, 80, 220)).save(tmp_path / "blue.png")
    page.get_by_text("Start from an image").click()
    page.wait_for_selector("#start canvas")
    page.locator("#start input[type=file]").first.set_input_files(tmp_path / "blue.png")
    page.wait_for_selector("#start button[aria-label=Brush]")
    page.get_by_label("restore").check()
    for _ in range(10):
        # The editor says nowhere that it is ready: strokes that come too early are lost, and are drawn again.
        page.wait_for_timeout(500)
        box = page.locator("#start canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 60, y)
        page.mouse.down()
        page.mouse.move(x + 60, y, steps=4)
        page.mouse.up()
        draw(page, examples.PROMPTS[1], steps=2)
        page.wait_for_selector("#view figcaption")
        if "--mask" in page.input_value("#command textarea"):
            break
    page.screenshot(path=tmp_path / "masked.png", full_page=True)
    assert "--image start.png --mask mask.png --restore" in page.input_value("#command textarea")
    image = numpy.array(Image.open(io.BytesIO(png_of(page))).convert("RGB"))
    kept = (image == (80, 80, 220)).all(-1)
    assert kept[:8].all() and not kept[28:36, 24:40].any()


def test_the_image_is_looked_into_and_two_settings_are_compared(desk, tmp_path):
    page = desk
    page.get_by_role("tab", name="Draw").click()
    page.fill("#draw-width input", "0")
    page.fill("#draw-prompts textarea", PROMPT)
    page.fill("#draw-steps input", "3")
    page.get_by_role("tab", name="Look").click()
    page.click("#look")
    frame = page.frame_locator("#look-view iframe")
    frame.locator("h1").wait_for()
    assert PROMPT in frame.locator("body").inner_text()
    page.screenshot(path=tmp_path / "look.png", full_page=True)

    page.get_by_role("tab", name="Compare").click()
    page.fill("#compare-prompts textarea", PROMPT)
    page.fill("#compare-steps input", "4")
    page.fill("#compare-other_steps input", "2")
    page.click("#compare")
    page.wait_for_function("document.querySelector('#compare-notes').textContent.includes('mean absolute difference')")
    page.screenshot(path=tmp_path / "compared.png", full_page=True)
    assert page.locator("#compare-view figcaption").count() == 2
