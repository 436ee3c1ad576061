"""The page of a run: whole, of one file, readable without its images; its PNGs; what it says where something lacks."""

import io
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from functional_sd3 import look
from functional_sd3.core import prng
from functional_sd3.look import colours, plotting, sheets
from tests import models
from tests.models import parts

PROMPT = 'a <script>alert("red")</script> & circle'
VOID = {"meta", "img", "path", "use", "br"}


class Outline(HTMLParser):
    """Elements of a page with their attributes; raises for one that is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def record():
    options = {"steps": 2, "t5_length": 16, "height": 64, "width": 80, "attention_steps": 2, "image_steps": 2}
    return look.trace(*parts(models.random_model()), PROMPT, prng.key(3), **options)


@pytest.fixture(scope="module")
def page(record):
    return look.page(record)


def test_the_page_needs_nothing_from_elsewhere_and_every_image_has_a_text(page):
    outline = Outline(page)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in outline.elements}
    images = [attributes for tag, attributes in outline.elements if tag == "img"]
    assert len(images) > 20 and all(each["src"].startswith("data:image/") and each["alt"] for each in images)
    charts = [attributes for tag, attributes in outline.elements if tag == "svg"]
    assert len(charts) == 7 and all(each["aria-label"] and each["role"] == "img" for each in charts)
    links = [value for _, attributes in outline.elements for value in attributes.values() if "//" in (value or "")]
    assert {link for link in links if not link.startswith("data:")} <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_the_page_shows_the_prompt_as_it_is(page):
    text = "".join(Outline(page).text)
    assert PROMPT in text and "<script>" not in page
    for name in ("CLIP-L", "CLIP-G", "T5", "Step by step", "by block and step", "t = 1.00"):
        assert name in text


def test_a_notebook_shows_the_page_in_a_frame(record, page):
    (frame,) = [attributes for tag, attributes in Outline(record._repr_html_()).elements if tag == "iframe"]
    assert frame["srcdoc"] == page


def test_pngs_are_images(record, tmp_path):
    paths = look.save(tmp_path / "new" / "look", record)
    assert paths[0].name == "index.html" and {path.suffix for path in paths[1:]} == {".png"}
    images = {path.stem: Image.open(io.BytesIO(path.read_bytes())) for path in paths[1:]}
    sizes = {name: image.size for name, image in images.items()}
    assert sizes["image"] == (80, 64) and {"steps", "words", "norms", "guidance", "shares", "seconds"} <= sizes.keys()
    image = torch.frombuffer(bytearray(images["image"].tobytes()), dtype=torch.uint8).reshape(64, 80, 3)
    assert torch.equal(image, (record.image.permute(1, 2, 0) * 255).round().to(torch.uint8))


def test_frames_wrap_into_rows():
    shown = sheets.Cells([f"t = {index}" for index in range(8)], {"x_t": torch.zeros(8, 3, 10, 60)})
    wide, wrapped = (sheets.frames_sheet(shown, columns=columns) for columns in (8, 3))
    assert wrapped.height == 3 * wide.height and wrapped.width < wide.width


def test_maps_by_block_and_step_are_laid_out_with_one_scale():
    maps = torch.zeros(2, 3, 4, 5)
    maps[1, 2, 0, 4], maps[0, 0] = 0.5, torch.nan
    sheet = sheets.by_block_and_step(maps)
    assert sheet.shape == (3, 3 * 5 - 1, 2 * 6 - 1)
    brightest = int(sheet.sum(0).argmax())
    assert divmod(brightest, sheet.shape[2]) == (2 * 5 + 0, 6 + 4)
    assert torch.equal(sheet[:, :4, :5], torch.full((3, 4, 5), 0.5)) and torch.equal(
        sheet[:, :, 5], torch.full((3, 14), 0.5)
    )


def test_the_linear_decoder_is_that_of_latents_whose_colours_are_linear():
    latents = prng.normal(prng.key(0), (3, 4, 5, 6))
    matrix = prng.normal(prng.key(1), (4, 3))
    images = (torch.einsum("nchw,cr->nrhw", latents, matrix) + 0.3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(colours.linear_decoder(latents, images), matrix, rtol=1e-2, atol=1e-2)
    shown = colours.as_colours(torch.zeros(1, 4, 2, 2), matrix)
    assert torch.equal(shown, torch.full((1, 3, 2, 2), 0.5))


def test_without_matplotlib_the_message_says_what_to_install(record, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(look.Missing, match=r'pip install "functional_sd3\[look\]"'):
        look.page(record)


def test_a_figure_leaves_the_settings_of_matplotlib_as_they_were():
    matplotlib = plotting.library()
    before = dict(matplotlib.rcParams)
    chart = plotting.Chart(lambda figure: figure.add_subplot().plot([1, 2]), "a <line>")
    assert Image.open(io.BytesIO(chart.png())).format == "PNG" and 'aria-label="a &lt;line>"' in chart.svg()
    assert dict(matplotlib.rcParams) == before and chart.svg() == chart.svg()
