import json

import numpy
import pytest
import torch
from PIL import Image

from functional_sd3 import weights
from functional_sd3.core import prng
from functional_sd3.image import pixels, vae
from functional_sd3.recipes import shapes
from functional_sd3.training import datasets

RED, BLUE = (220, 40, 40), (50, 80, 220)


def plain(path, colour=RED, size=(20, 20), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def captions(index):
    return {sample.path: sample.caption for sample in index.samples}


def test_class_folders_give_the_captions_of_their_images(tmp_path):
    plain(tmp_path / "ankle_boot" / "1.png")
    plain(tmp_path / "bag" / "2.JPG")
    index = datasets.image_folder(tmp_path)
    assert captions(index) == {"ankle_boot/1.png": "a photo of a ankle boot", "bag/2.JPG": "a photo of a bag"}
    assert captions(datasets.image_folder(tmp_path, template="{}"))["bag/2.JPG"] == "bag"


def test_a_text_file_beside_an_image_is_its_caption(tmp_path):
    plain(tmp_path / "one.png")
    plain(tmp_path / "two.png")
    (tmp_path / "one.txt").write_text("a red\n square \n", encoding="utf-8")
    assert captions(datasets.image_folder(tmp_path)) == {"one.png": "a red square", "two.png": ""}


def test_metadata_lists_the_images_and_their_texts(tmp_path):
    plain(tmp_path / "deep" / "one.png")
    plain(tmp_path / "two.png")
    lines = [{"file_name": "deep/one.png", "text": "größe"}, {"file_name": "gone.png", "text": "?"}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    index = datasets.image_folder(tmp_path)
    assert captions(index) == {"deep/one.png": "größe"}
    assert index.skipped == (datasets.Skipped("gone.png", "the file is missing"),)


@pytest.mark.parametrize("line", ["not json", '{"file_name": "a.png"}', '{"file_name": 3, "text": "x"}', "[1]"])
def test_a_metadata_line_of_another_form_is_named(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line)
    with pytest.raises(ValueError, match="metadata.jsonl, line 2 must be"):
        datasets.image_folder(tmp_path)


def test_broken_files_are_named_and_skipped(tmp_path):
    plain(tmp_path / "good.png")
    plain(tmp_path / "whole.jpg", size=(200, 200))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:600])
    (tmp_path / "text.png").write_text("this is no image")
    (tmp_path / "empty.gif").write_bytes(b"")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.md").write_text("not looked at")
    index = datasets.image_folder(tmp_path)
    assert [sample.path for sample in index.samples] == ["good.png", "whole.jpg"]
    assert sorted(skipped.path for skipped in index.skipped) == ["cut.jpg", "empty.gif", "text.png"]
    assert all(skipped.reason.startswith("not a readable image") for skipped in index.skipped)


def test_a_caption_that_is_not_text_skips_its_image(tmp_path):
    plain(tmp_path / "good.png")
    plain(tmp_path / "bad.png")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    index = datasets.image_folder(tmp_path)
    assert list(captions(index)) == ["good.png"] and "caption cannot be read" in index.skipped[0].reason


def test_a_folder_that_is_missing_or_has_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        datasets.image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        datasets.image_folder(tmp_path)
    (tmp_path / "text.png").write_text("this is no image")
    with pytest.raises(ValueError, match="1 files could not be read, the first: text.png"):
        datasets.image_folder(tmp_path)
    with pytest.raises(ValueError, match="is not a folder of images"):
        datasets.image_folder(tmp_path / "text.png")


def test_a_template_without_a_place_for_the_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must contain {}"):
        datasets.image_folder(tmp_path, template="a photo")


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{} in {place}", "{place}"),
        ("{0.__class__} {}", "{0.__class__}"),
        ("{", "must contain {}"),
        ("{} {", "'{'"),
        ("}{}", "'}'"),
        ("{!r}", "must contain {}"),
        ("{:>9999999999} {}", "{:>9999999999}"),
        ("a \x1b[31m", "must contain {}"),
    ],
)
def test_a_template_with_other_fields_is_refused_by_name(tmp_path, template, named):
    with pytest.raises(ValueError) as caught:
        datasets.image_folder(tmp_path, template=template)
    assert named in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_class_with_braces_in_its_name_is_put_into_every_place_of_the_template(tmp_path):
    plain(tmp_path / "{0.__class__}" / "1.png")
    index = datasets.image_folder(tmp_path, template="a {}, yes, a {}")
    assert [sample.caption for sample in index.samples] == ["a {0.  class  }, yes, a {0.  class  }"]


def one(path, size=8):
    return datasets.load(datasets.image_folder(path.parent), 0, size)


def test_greyscale_becomes_three_equal_channels(tmp_path):
    plain(tmp_path / "grey.png", 100, mode="L")
    assert torch.equal(one(tmp_path / "grey.png"), torch.full((3, 8, 8), 100, dtype=torch.uint8))


def test_sixteen_bit_greyscale_is_scaled_not_clipped(tmp_path):
    Image.fromarray(numpy.full((8, 8), 257 * 100, dtype=numpy.uint16)).save(tmp_path / "deep.png")
    assert torch.equal(one(tmp_path / "deep.png"), torch.full((3, 8, 8), 100, dtype=torch.uint8))


def test_transparency_lies_over_white(tmp_path):
    plain(tmp_path / "clear.png", (*RED, 0), mode="RGBA")
    assert torch.equal(one(tmp_path / "clear.png"), torch.full((3, 8, 8), 255, dtype=torch.uint8))


def test_palettes_keep_their_colours(tmp_path):
    Image.new("RGB", (8, 8), BLUE).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "few.gif")
    assert one(tmp_path / "few.gif")[:, 0, 0].tolist() == list(BLUE)


def test_a_photograph_is_turned_upright_by_its_exif_tag(tmp_path):
    img = Image.new("RGB", (16, 16), RED)
    img.paste(BLUE, (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    img.save(tmp_path / "turned.png", exif=exif)
    upright = one(tmp_path / "turned.png", 16)
    # Orientation 6: what is stored at the top is the right side.
    assert upright[:, 8, 13].tolist() == list(BLUE) and upright[:, 8, 2].tolist() == list(RED)


def test_a_wide_image_is_cropped_to_its_middle(tmp_path):
    img = Image.new("RGB", (48, 16), RED)
    img.paste(BLUE, (16, 0, 32, 16))
    img.save(tmp_path / "wide.png")
    middle = one(tmp_path / "wide.png", 8)
    assert middle.shape == (3, 8, 8) and middle[:, 4, 4].tolist() == list(BLUE)
    assert middle.reshape(3, -1).float().mean(1)[2] > 200


def test_an_image_deleted_later_is_named(tmp_path):
    plain(tmp_path / "here.png")
    index = datasets.image_folder(tmp_path)
    (tmp_path / "here.png").unlink()
    with pytest.raises(ValueError, match="here.png: the file is missing"):
        datasets.load(index, 0, 8)


def test_images_in_ten_class_folders_all_load(tmp_path):
    drawn, _ = shapes.images(prng.key(0), 50)
    for number, image in enumerate(pixels.to_pil(pixels.from_bytes(drawn))):
        folder = tmp_path / f"class {number % 10}"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{number}.png")
    index = datasets.image_folder(tmp_path, template="{}")
    assert len(index.samples) == 50 and not index.skipped
    assert len({sample.caption for sample in index.samples}) == 10
    batch = torch.stack([datasets.load(index, row, 16) for row in (0, 25, 49)])
    assert batch.shape == (3, 3, 16, 16) and batch.dtype == torch.uint8 and batch.float().std() > 10


def test_latents_are_those_of_each_image_whatever_the_batch(tmp_path, model_folder):
    model = weights.load(model_folder, dtype=torch.float32)
    for index in range(5):
        plain(tmp_path / f"{index}.png", (50 * index, 100, 200 - 40 * index), (16, 16))
        (tmp_path / f"{index}.txt").write_text(f"a large red circle on a white background {index}")
    index = datasets.image_folder(tmp_path)
    texts = [sample.caption for sample in index.samples]
    data = datasets.encode_all(
        *model[:2],
        model.tokenizers,
        texts,
        lambda rows: torch.stack([datasets.load(index, row, 16) for row in rows]),
        batch=2,
        t5_length=16,
    )
    assert data["latents"].shape == (5, 16, 2, 2) and data["ids"].t5.shape == (5, 16)
    images = pixels.to_signed(pixels.from_bytes(datasets.load(index, 3, 16)[None]))
    alone = vae.normalize(model.config.vae, vae.encode(model.params["vae"], model.config.vae, images).mean)
    torch.testing.assert_close(data["latents"][3:4], alone, rtol=1e-4, atol=1e-5)
