"""Captions: every layout that public trainers read, conflicts, and files that were not read."""

import json
import os

import pytest
from PIL import Image

from functional_sd3.training import datasets


def images(folder, *names) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, format="PNG")


def captions(folder, **options) -> dict[str, str]:
    return {sample.path: sample.caption for sample in datasets.image_folder(folder, **options).samples}


def noted(folder, **options) -> str:
    return "\n".join(datasets.image_folder(folder, **options).notes)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a größe"),
        ("a.caption", "a größe\r\n"),
        ("a.TXT", " a\n größe "),
        ("a.json", '{"tags": ["x"], "score": 0.5, "caption": "a größe"}'),
        ("a.json", '{"text": "a größe", "prompt": "another"}'),
        ("a.json", '{"prompt": "a größe", "text": null}'),
        ("a.png.txt", "a größe"),
        ("a.png.caption", "a größe"),
        ("a.png.json", '{"text": "a größe"}'),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a größe", "width": 8}\n\n'),
        ("metadata.jsonl", '{"file_name": "./a.png", "caption": "a größe"}\r\n'),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["a größe", "another"]}'),
        ("metadata.jsonl", '{"file_name": "a.png", "text": null, "caption": "a größe"}'),
        ("metadata.csv", "file_name,text\na.png,a größe\n"),
        ("metadata.csv", 'text,other,file_name\r\n"a größe",1,a.png\r\n'),
    ],
)
def test_every_layout_gives_the_caption(tmp_path, name, text, encoding):
    images(tmp_path, "a.png")
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert captions(tmp_path) == {"a.png": "a größe"}
    assert datasets.image_folder(tmp_path).notes == ()


def test_hugging_faces_layout_of_splits_reads_the_training_split(tmp_path):
    images(tmp_path, "train/a.png", "train/deep/b.png", "test/c.png")
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "deep/b.png", "text": "two"}]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "test" / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "three"}')
    assert captions(tmp_path) == {"train/a.png": "one", "train/deep/b.png": "two"}
    assert "train/ has metadata of its own and is the set; left out: 1 image (test/c.png)" in noted(tmp_path)
    assert captions(tmp_path / "train") == {"a.png": "one", "deep/b.png": "two"}


def test_the_nearest_metadata_counts_and_unlisted_images_are_named(tmp_path):
    images(tmp_path, "a.png", "cats/b.png", "cats/c.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}')
    (tmp_path / "cats" / "metadata.csv").write_text("file_name,text\nb.png,two\n")
    assert captions(tmp_path) == {"a.png": "one", "cats/b.png": "two"}
    assert "cats/metadata.csv does not list, so left out: 1 image (cats/c.png)" in noted(tmp_path)


def test_precedence_of_captions_and_notes_on_conflicts(tmp_path):
    images(tmp_path, "a.png", "b.png", "c.png", "class/d.png")
    for name, text in (("a.txt", "one"), ("a.caption", "two"), ("b.txt", "same"), ("b.caption", "same"),
                       ("c.caption", "short"), ("c.png.txt", "long"), ("class/d.txt", "own")):  # fmt: skip
        (tmp_path / name).write_text(text)
    assert captions(tmp_path) == {"a.png": "one", "b.png": "same", "c.png": "short", "class/d.png": "own"}
    assert "captions that differ" in noted(tmp_path) and "2 images (a.png, c.png)" in noted(tmp_path)
    rows = [{"file_name": name, "text": "listed"} for name in ("a.png", "b.png", "b.png", "c.png", "class/d.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,other\n")
    assert set(captions(tmp_path).values()) == {"listed"}
    assert "4 images (a.png, b.png, c.png, class/d.png)" in noted(tmp_path)
    assert "listed more than once, of which the first caption is used: 1 image (b.png)" in noted(tmp_path)
    assert "look like captions and were not read: 1 file (metadata.csv)" in noted(tmp_path)


def test_files_that_look_like_captions_and_were_not_read_are_named_but_not_all(tmp_path):
    images(tmp_path, "a.png")
    for name in ("a.tags", "captions.txt", "A.txt", "meta.json", "metadata.parquet", "x.caption", "a.json", ".hid.txt"):
        (tmp_path / name).write_text("{}")
    assert "7 files (A.txt, a.json, a.tags, captions.txt, meta.json and 2 more)" in noted(tmp_path)
    assert captions(tmp_path) == {"a.png": ""}


def test_one_line_counts_the_images_without_caption(tmp_path):
    images(tmp_path, "a.png", "b.png", "c.png", "two_words/d.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text(" \n")
    said = datasets.summary(datasets.image_folder(tmp_path))
    assert said.startswith(f"4 images in {tmp_path}, 2 of 4 images have no caption (1 beside the image, 1 by the name")
    assert "name.caption" in said and "--caption" in said and "\n" not in said
    index = datasets.image_folder(tmp_path, caption="all alike")
    assert {sample.caption for sample in index.samples} == {"all alike"}
    assert datasets.summary(index) == f"4 images in {tmp_path}, all with captions (4 --caption)"
    (tmp_path / "\x1b[31m").mkdir()
    images(tmp_path / "\x1b[31m", "a.png")
    assert "\x1b" not in datasets.summary(datasets.image_folder(tmp_path / "\x1b[31m"))


@pytest.mark.parametrize(
    "name", ["../secret.png", "{}/secret.png", "link.png", "linked/secret.png", "sub/../../secret.png"]
)
def test_links_out_of_the_folder_are_followed_on_request_only(tmp_path, name):
    data = tmp_path / "data"
    images(tmp_path, "secret.png", "data/a.png")
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "linked").symlink_to(tmp_path)
    (data / "sub").mkdir()
    name = name.format(tmp_path)
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": name, "text": "two"}]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index = datasets.image_folder(data)
    assert [sample.path for sample in index.samples] == ["a.png"]
    reasons = {skipped.path: skipped.reason for skipped in index.skipped}
    assert "outside of the folder of the data; --follow" in reasons[name]
    followed = datasets.image_folder(data, follow=True)
    assert sorted(sample.caption for sample in followed.samples) == ["one", "two"]
    assert datasets.load(followed, 1, 8).shape == (3, 8, 8)


def test_links_of_images_captions_and_folders_stay_inside_unless_followed(tmp_path):
    images(tmp_path, "out/x.png", "out/y.png", "data/a.png", "data/b.png")
    data = tmp_path / "data"
    (tmp_path / "secret.txt").write_text("a secret")
    (data / "a.txt").symlink_to(tmp_path / "secret.txt")
    (data / "x.png").symlink_to(tmp_path / "out" / "x.png")
    (data / "inside.png").symlink_to(data / "b.png")
    (data / "folder").symlink_to(tmp_path / "out")
    (data / "loop").symlink_to(data)
    index = datasets.image_folder(data)
    assert [sample.path for sample in index.samples] == ["b.png", "inside.png"]
    reasons = {skipped.path: skipped.reason for skipped in index.skipped}
    assert reasons.keys() == {"a.png", "x.png"} and reasons["x.png"].startswith("lies outside of the folder")
    assert reasons["a.png"].startswith("its caption cannot be read: a.txt lies outside")
    assert "folder folder is a link and not entered; --follow" in noted(data) and "folder loop" in noted(data)
    followed = captions(data, follow=True)
    assert followed["a.png"] == "a secret" and {"x.png", "folder/y.png"} <= set(followed)
    assert not any(name.startswith("loop") for name in followed)


def test_absolute_and_windows_names_inside_the_folder_are_its_files(tmp_path):
    images(tmp_path, "a.png", "sub/b.png")
    rows = [{"file_name": str(tmp_path / "a.png"), "text": "one"}, {"file_name": "sub\\b.png", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(tmp_path) == {"a.png": "one", "sub/b.png": "two"} and noted(tmp_path) == ""


def test_special_files_are_named_and_nothing_waits(tmp_path):
    images(tmp_path, "a.png", "b.png", "d.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "d.txt").mkdir()
    index = datasets.image_folder(tmp_path)
    assert [sample.path for sample in index.samples] == ["a.png", "d.png"]
    assert {path: reason.count("named pipe") for path, reason in index.skipped} == {"pipe.png": 1, "b.png": 1}
    rows = [{"file_name": name, "text": ""} for name in ("a.png", "pipe.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "named pipe" in datasets.image_folder(tmp_path).skipped[0].reason
    (tmp_path / "metadata.jsonl").unlink()
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match="metadata.jsonl: is a named pipe"):
        datasets.image_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"caf\xe9", "a.txt: is no text in UTF-8: byte 3"),
        ("a.txt", "größe".encode("utf-16-le"), "a.txt: is no text in UTF-8"),
        ("a.txt", b"x" * (2**18 + 1), "a.txt: is larger than 262,144 bytes"),
        ("a.json", b'{"text": 5}', "a.json: text is 5, not a text"),
        ("a.txt", "a red cat".encode("utf-16-le"), "UTF-16 is recognised by a byte order mark"),
        ("a.txt", "a red cat".encode("utf-16-be"), "UTF-16 is recognised by a byte order mark"),
        ("a.json", b"[" * 100000, "a.json: is no JSON"),
        ("a.json", b'{"text": "\\ud83d"}', "holds half a character"),
    ],
)
def test_a_caption_that_cannot_be_read_skips_its_image_by_name(tmp_path, name, content, said):
    images(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_bytes(content)
    index = datasets.image_folder(tmp_path)
    assert [sample.path for sample in index.samples] == ["b.png"]
    assert index.skipped[0].path == "a.png" and said in index.skipped[0].reason


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.csv", "image,text\na.png,x\n", "line 2 must be file_name and text, separated by a comma"),
        ("metadata.csv", "file_name;text\na.png;x\n", "line 2 must be file_name and text"),
        ("metadata.csv", "file_name,text\na.png,a red, round cat\n", "line 2 .*a text with commas must be in quotes"),
        ("metadata.csv", 'file_name,text\na.png,"x\n', "line [23] must be"),
        ("metadata.csv", f"file_name,text\na.png,{'x' * 200000}\n", "field larger than"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 3}', "line 1 must be"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x", "score": NaN}', "line 1 must be .*NaN is no number"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["x", 3]}', "line 1 must be"),
        ("metadata.jsonl", '{"file_name": "", "text": "x"}', "line 1 must be"),
    ],
)
def test_metadata_of_another_form_is_named_with_its_line(tmp_path, name, content, said):
    images(tmp_path, "a.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}, {said}" if said.startswith("line") else said):
        datasets.image_folder(tmp_path)


def test_names_that_are_no_paths_and_halves_of_characters_skip_their_line(tmp_path):
    images(tmp_path, "a.png", "b.png")
    names = ["a.png", "\ud800.png", "nul\0.png", "x" * 5000 + ".png", "b.png"]
    rows = [{"file_name": name, "text": "\udc00" if name == "b.png" else "one"} for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index = datasets.image_folder(tmp_path)
    assert [sample.path for sample in index.samples] == ["a.png"] and len(index.skipped) == 4


def test_names_that_are_not_utf8_are_read_and_their_folders_make_no_caption(tmp_path):
    folder = os.fsencode(tmp_path)
    images(tmp_path, "a.png", "b.png")
    os.rename(folder + b"/a.png", folder + b"/caf\xe9.png")
    os.mkdir(folder + b"/\xe9")
    os.rename(folder + b"/b.png", folder + b"/\xe9/b.png")
    index = datasets.image_folder(tmp_path)
    assert [os.fsencode(sample.path) for sample in index.samples] == [b"caf\xe9.png"]
    assert "half a character" in index.skipped[0].reason


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    images(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert captions(tmp_path) == {"a.png": ""}
    assert "folder locked cannot be read: permission denied" in noted(tmp_path)
    with pytest.raises(ValueError, match="locked cannot be read: permission denied"):
        datasets.image_folder(tmp_path / "locked")


@pytest.mark.parametrize("content", ['{"prompt": {"is_changed": [NaN]}}', '{"prompt": {"3": 1}}', "[", "caf\udce9"])
def test_a_json_file_of_another_program_does_not_matter_behind_a_caption(tmp_path, content):
    images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("own")
    (tmp_path / "a.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert captions(tmp_path) == {"a.png": "own"}
    assert "look like captions and were not read: 1 file (a.json)" in noted(tmp_path)


def test_images_in_formats_that_are_not_read_are_named(tmp_path):
    images(tmp_path, "a.png")
    for name in ("b.heic", "c.JXL", "d.CR2", "e.mp4"):
        (tmp_path / name).write_bytes(b"x")
    assert "are in formats that are not read, convert them to PNG or JPEG: 3 images (b.heic, c.JXL, d.CR2)" in noted(
        tmp_path
    )


def test_folders_of_kohya_and_masks_of_onetrainer(tmp_path):
    images(tmp_path, "20_sks dog/a.png", "20_sks dog/a-masklabel.png", "10_/b.png", "b-masklabel.png")
    assert captions(tmp_path) == {
        "20_sks dog/a.png": "a photo of a sks dog",
        "10_/b.png": "a photo of a 10",
        "b-masklabel.png": "",
    }
    assert "left out: 1 image (20_sks dog/a-masklabel.png)" in noted(tmp_path)
    assert "repeats" not in noted(tmp_path)
    images(tmp_path, "20_other dog/c.png")
    assert "repeats" not in noted(tmp_path)
    images(tmp_path, "1_dog/c.png")
    assert "each image comes once an epoch" in noted(tmp_path)
    assert "3 folders (1_dog, 20_other dog, 20_sks dog)" in noted(tmp_path)


def test_a_caption_that_cannot_be_read_is_said_once(tmp_path):
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    index = datasets.image_folder(tmp_path)
    assert "b.txt: is no text in UTF-8" in index.skipped[0].reason and "b.txt" not in noted(tmp_path)
    assert datasets.summary(index).startswith(f"1 image in {tmp_path}, 1 of 1 image has no caption; ")
