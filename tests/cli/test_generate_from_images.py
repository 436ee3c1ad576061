"""Images from images on the command line: what they begin from, where they change, and the way there again."""

import shlex

import numpy
import pytest
import torch
from PIL import Image, ImageDraw

from functional_sd3 import cli, pipeline, weights
from functional_sd3.cli import image_settings
from functional_sd3.core import prng
from functional_sd3.image import pixels
from tests import models
from tests.models import parts

PROMPT = "a blue star"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    weights.save(root / "model", models.random_model())
    for name, size in (("in.png", (64, 64)), ("wide.png", (70, 50)), ("large.png", (600, 300))):
        generator = torch.Generator().manual_seed(size[0])
        small = (torch.rand(5, 8, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(root / name)
    for name, size in (("mask.png", (64, 64)), ("half.png", (32, 32)), ("tall.png", (32, 64))):
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle((size[0] // 2, 0, size[0], size[1]), fill=255)
        mask.save(root / name)
    (root / "text.png").write_text("hello")
    return root


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def draw(files, *words, out="out.png") -> torch.Tensor:
    common = ("generate", PROMPT, "--params", files / "model", "--steps", 4, "--out", files / out)
    assert run(*common, *words) == 0
    with Image.open(files / out) as image:
        return pixels.from_pil(image)


def test_an_image_is_started_from_another_as_the_pipeline_does(files, capsys):
    model = weights.load(files / "model")
    with Image.open(files / "in.png") as image:
        images = pixels.from_pil(image)
    expected = pipeline.image_to_image(
        *parts(model), PROMPT, images, prng.key(torch.tensor([5])), steps=4, strength=0.5
    )
    ours = draw(files, "--image", files / "in.png", "--strength", 0.5, "--seed", 5)
    torch.testing.assert_close(ours, pixels.from_bytes(pixels.to_bytes(expected)), atol=1 / 254, rtol=0)
    assert "note" not in capsys.readouterr().err
    usual = draw(files, "--image", files / "in.png", "--seed", 5)
    assert torch.equal(usual, draw(files, "--image", files / "in.png", "--strength", 0.6, "--seed", 5))
    assert torch.equal(draw(files, "--image", files / "in.png", "--strength", 1), draw(files))


@pytest.mark.parametrize(
    "words",
    [
        ("--image", "{}/in.png", "--strength", "0.75", "--count", "2"),
        ("--image", "{}/in.png", "--strength", "0", "--cfg", "0"),
        ("--image", "{}/in.png", "--mask", "{}/mask.png", "--soften", "0"),
        ("--image", "{}/in.png", "--mask", "{}/half.png", "--soften", "2.5", "--restore", "--offload"),
        ("--image", "{}/wide.png", "--outpaint", "right=16,top=32", "--overlap", "8"),
        ("--image", "{}/large.png", "--size", "96x64", "--method", "heun"),
        ("--variation", "9:0.25", "--count", "3", "--seed", "4"),
        ("--region", "0,0,32x64@0.5=a red circle", "--region", "{}/mask.png=a ring", "--tile", "48:16"),
        ("--size", "256x64", "--tile", "64"),
        ("--method", "dopri5", "--rtol", "0.001", "--atol", "0.01"),
        ("--method", "euler_ancestral", "--count", "2"),
    ],
    ids=lambda words: " ".join(word for word in words if word.startswith("--")),
)
def test_inspect_prints_the_command_that_makes_an_image_again(files, capsys, words):
    words = [word.format(files) for word in words]
    first = draw(files, *words)
    capsys.readouterr()
    assert run("inspect", files / "out.png") == 0
    again = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert again[:2] == ["functional-sd3", "generate"]
    assert run(*again[1:], "--out", files / "again.png") == 0
    with Image.open(files / "again.png") as image:
        assert torch.equal(pixels.from_pil(image), first)
    plain = draw(files, "--seed", 4)
    assert first.shape != plain.shape or not torch.equal(first, plain)


def test_each_image_of_a_series_holds_the_seed_that_it_was_moved_towards(files, tmp_path, capsys):
    words = ("--params", files / "model", "--steps", 2, "--variation", "9:0.25", "--seed", 4)
    assert run("generate", PROMPT, *words, "--count", 2, "--out", tmp_path) == 0
    second = tmp_path / "a-blue-star-4-10.png"
    assert str(second) in capsys.readouterr().out
    assert image_settings.read_record(second)["command"]["variation"] == "10:0.25"


def test_what_the_mask_keeps_is_the_image(files):
    with Image.open(files / "in.png") as image:
        kept = pixels.from_pil(image)
    drawn = draw(files, "--image", files / "in.png", "--mask", files / "mask.png", "--restore")
    torch.testing.assert_close(drawn[..., :32], kept[..., :32], atol=1 / 254, rtol=0)
    assert (drawn[..., 32:] - kept[..., 32:]).abs().mean() > 0.02
    # A mask of half the size says the same.
    half = draw(files, "--image", files / "in.png", "--mask", files / "half.png", "--restore")
    torch.testing.assert_close(half, drawn, atol=1 / 254, rtol=0)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [("wide.png", (64, 48), "is 70x50: cropped to 64x48"), ("large.png", (80, 32), "600x300: scaled and cropped to")],
)
def test_sizes_come_from_the_image_and_a_note_says_where_they_change(files, capsys, name, size, said):
    drawn = draw(files, "--image", files / name)
    assert drawn.shape[-2:] == size[::-1]
    assert f"note: {files / name} " in (error := capsys.readouterr().err) and said in error


def test_cropping_keeps_the_middle(files):
    with Image.open(files / "wide.png") as image:
        middle = image.crop((3, 1, 67, 49))
    middle.save(files / "middle.png")
    assert torch.equal(draw(files, "--image", files / "wide.png"), draw(files, "--image", files / "middle.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--strength", 0.5), "--strength needs --image"),
        (("--mask", "{}/mask.png", "--restore"), "--mask and --restore needs --image"),
        (("--image", "{}/in.png", "--strength", 1.5), "--strength 1.5 must be between 0"),
        (("--image", "{}/none.png"), "--image {}/none.png is no file"),
        (("--image", "{}/text.png"), "{}/text.png: not a readable image"),
        (("--image", "{}/in.png", "--mask", "{}/tall.png"), "tall.png is 32x64, but the image is 64x64"),
        (("--image", "{}/in.png", "--mask", "{}/mask.png", "--outpaint", "right=16"), "give one of them"),
        (("--image", "{}/in.png", "--restore"), "--soften and --restore need --mask or --outpaint"),
        (("--image", "{}/in.png", "--mask", "{}/mask.png", "--soften", -1), "--soften -1.0 must be a number"),
        (("--image", "{}/in.png", "--outpaint", "up=3"), "--outpaint 'up=3' must be sides and pixels"),
        (("--image", "{}/in.png", "--outpaint", "right=8"), "width 72 is not a multiple of 16"),
        (("--image", "{}/in.png", "--outpaint", "right=160"), "width 224 is beyond the 192 pixels"),
        (("--image", "{}/in.png", "--size", "72x64"), "width 72 is not a multiple of 16"),
        (("--image", "{}/in.png", "--overlap", "8"), "--overlap needs"),
        (("--variation", "9"), "--variation '9' must be SEED:AMOUNT"),
        (("--variation", "9:2"), "--variation 9:2: the amount must be between 0 and 1"),
        (("--region", "left=a ring"), "left is neither LEFT,TOP,WIDTHxHEIGHT nor the file of a mask"),
        (("--region", "0,0,65x64=a ring"), "the region 0,0,65x64 is not in the image of 64x64"),
        (("--region", "0,0,32x64@x=a ring"), "its weight 'x' must be a number"),
        (("--region", "{}/tall.png=a ring"), "mask of 32 x 64 for images of 64 x 64"),
        (("--tile", "big"), "--tile 'big' must be a side in pixels"),
        (("--tile", "32:32"), "the overlap must be below the side"),
        (("--rtol", 0.1), "--rtol and --atol are for bosh3, dopri5, tsit5"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(files, tmp_path, capsys, words, message):
    words = [str(word).format(files) for word in words]
    out = ("--steps", 2, "--out", tmp_path / "x.png")
    assert run("generate", PROMPT, "--params", files / "model", *out, *words) == 1
    error = capsys.readouterr().err
    assert message.format(files) in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_masks_of_every_kind_of_file_keep_the_same_part(files, capsys):
    with Image.open(files / "in.png") as image, Image.open(files / "mask.png") as mask:
        erased = image.convert("RGB")
        erased.putalpha(mask.point(lambda value: 255 - value))
        erased.save(files / "erased.png")
        strokes = Image.new("RGBA", mask.size, (255, 255, 255, 0))
        strokes.putalpha(mask)
        strokes.save(files / "strokes.webp", lossless=True)
        deep = numpy.asarray(mask).astype(numpy.uint16) * 257
        Image.fromarray(deep).save(files / "deep.png")
        mask.convert("1").save(files / "bit.tif")
        exif = Image.Exif()
        exif[0x0112] = 3
        mask.rotate(180).save(files / "turned.png", exif=exif)
    words = ("--image", files / "in.png", "--restore", "--mask")
    expected = draw(files, *words, files / "mask.png")
    assert "note" not in capsys.readouterr().err
    said = {"erased.png": "what is transparent in it is the mask, 50 %", "strokes.webp": "its white strokes are the"}
    for name in ("erased.png", "strokes.webp", "deep.png", "bit.tif", "turned.png"):
        assert torch.equal(draw(files, *words, files / name), expected), name
        assert said.get(name, "") in (error := capsys.readouterr().err) and ("note" in error) == (name in said)
    region = ("--region", f"{files}/strokes.webp=a red circle")
    assert torch.equal(draw(files, *region), draw(files, "--region", f"{files}/mask.png=a red circle"))


@pytest.mark.parametrize(
    ("value", "said"), [(0, "is black everywhere"), (1, "multiplied by 255"), (100, "no value above 100")]
)
def test_a_mask_that_would_change_nothing_is_said(files, tmp_path, capsys, value, said):
    Image.new("L", (64, 64), value).save(tmp_path / "none.png")
    words = ("generate", PROMPT, "--params", files / "model", "--steps", 2, "--out", tmp_path / "x.png")
    assert run(*words, "--image", files / "in.png", "--mask", tmp_path / "none.png") == 1
    error = capsys.readouterr().err
    assert "none.png: " in error and said in error and error.count("\n") == 1
    small = Image.new("L", (64, 64))
    small.putpixel((3, 3), 255)
    small.save(tmp_path / "none.png")
    assert run(*words, "--image", files / "in.png", "--mask", tmp_path / "none.png") == 1
    assert "changes nothing: its white part is too small" in capsys.readouterr().err
