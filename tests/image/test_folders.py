"""Folders and archives of images of every kind: read in order, by any number of processes."""

import time
import zipfile
from functools import partial
from multiprocessing import active_children

import numpy
import pytest
import torch
from PIL import Image

from functional_sd3.image import files, folders
from functional_sd3.metrics import preprocess

RED, WHITE = (220, 40, 40), (255, 255, 255)


def pixels_of(img) -> torch.Tensor:
    return torch.from_numpy(numpy.array(img)).permute(2, 0, 1)


def corner(path) -> tuple[int, ...]:
    img = files.read(path)
    assert img.mode == "RGB"
    return img.getpixel((0, 0))


def test_every_kind_of_file_is_read_as_viewers_display_it(tmp_path):
    Image.new("RGBA", (4, 4), (*RED, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (4, 4), (80, 255)).save(tmp_path / "grey_alpha.png")
    Image.new("L", (4, 4), 80).save(tmp_path / "grey.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "bit.png")
    Image.new("RGB", (4, 4), RED).quantize(4).save(tmp_path / "palette.png")
    Image.new("P", (4, 4), 0).save(tmp_path / "clear_palette.gif", transparency=0)
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    Image.fromarray(numpy.full((4, 4), 80 * 257, numpy.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(numpy.full((4, 4), 65535, numpy.uint16)).save(tmp_path / "deep.tif")
    expected = {"clear.png": WHITE, "grey_alpha.png": (80,) * 3, "grey.png": (80,) * 3, "bit.png": WHITE,
                "palette.png": RED, "clear_palette.gif": WHITE, "deep.png": (80,) * 3, "deep.tif": WHITE}  # fmt: skip
    assert {name: corner(tmp_path / name) for name in expected} == expected
    red, green, blue = corner(tmp_path / "print.jpg")
    assert red > 250 and green < 5 and blue < 5


def test_a_turned_photograph_is_read_upright(tmp_path):
    img = Image.new("RGB", (6, 4), WHITE)
    img.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    img.save(tmp_path / "turned.png", exif=exif)
    upright = files.read(tmp_path / "turned.png")
    assert upright.size == (4, 6) and upright.getpixel((3, 0)) == (0, 0, 0)


@pytest.fixture
def folder(tmp_path):
    """Mixed sizes in nested folders, broken files among them, and what is to be passed by."""
    generator = numpy.random.default_rng(0)
    top = tmp_path / "pictures"
    for name, size in (("b.png", (9, 5)), ("a/z.jpg", (30, 41)), ("a/deep/c.PNG", (8, 8)), ("c.bmp", (3, 3))):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=numpy.uint8)).save(top / name)
    (top / "broken.png").write_bytes(b"no image")
    (top / "a" / "cut.jpg").write_bytes((top / "a" / "z.jpg").read_bytes()[:300])
    (top / ".hidden.png").write_bytes(b"")
    (top / ".cache").mkdir()
    (top / ".cache" / "x.png").write_bytes(b"")
    (top / "notes.txt").write_text("passed by")
    return top


NAMES = ("a/cut.jpg", "a/deep/c.PNG", "a/z.jpg", "b.png", "broken.png", "c.bmp")


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
        archive.writestr("__MACOSX/a/._z.jpg", b"metadata")
    return path


def test_a_folder_is_read_in_order_and_broken_files_are_named(folder):
    source = folders.source(folder)
    assert source.names == NAMES
    items = list(folders.stream(source, pixels_of))
    assert [item.name for item in items] == list(NAMES)
    assert [item.value.shape[1:] for item in items if item.reason is None] == [(8, 8), (30, 41), (9, 5), (3, 3)]
    assert {item.name for item in items if item.value is None} == {"a/cut.jpg", "broken.png"}
    assert items[4].reason == "not a readable image (of no known format)"
    assert "not a readable image" in items[0].reason


def test_links_are_followed_and_no_folder_is_entered_twice(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "folder").symlink_to(folder)
    (linked / "again").symlink_to(linked)
    (linked / "twice").symlink_to(folder)
    (folder / "loop").symlink_to(folder)
    assert folders.source(linked).names == tuple(f"folder/{name}" for name in NAMES)


def test_an_archive_is_read_as_the_folder_it_was_made_of(folder, tmp_path):
    archive = folders.source(zipped(folder, tmp_path / "images.zip"))
    assert archive.names == NAMES
    for one, other in zip(
        folders.stream(archive, pixels_of), folders.stream(folders.source(folder), pixels_of), strict=True
    ):
        assert one.name == other.name and (one.reason is None) == (other.reason is None)
        assert one.value is None or torch.equal(one.value, other.value)


def test_several_processes_read_the_same_items_in_the_same_order_as_one(folder, tmp_path):
    # Several portions for each process.
    for index in range(60):
        Image.new("L", (1 + index, 3), index).save(folder / f"{index}.png")
    transform = partial(preprocess.image, mode="tf1")
    alone = list(folders.stream(folders.source(folder), transform))
    for path, workers in ((folder, 2), (zipped(folder, tmp_path / "images.zip"), 1)):
        for one, other in zip(folders.stream(folders.source(path), transform, workers=workers), alone, strict=True):
            assert one.name == other.name and one.reason == other.reason
            assert one.value is None or torch.equal(one.value, other.value)


def test_images_are_read_lazily(folder):
    seen = []
    items = folders.stream(folders.source(folder), lambda img: seen.append(img) or torch.zeros(1))
    assert not seen
    next(items), next(items)
    assert len(seen) == 1


def test_an_image_that_the_transform_refuses_is_named(folder):
    def refuse(img):
        raise ValueError("too small")

    assert {item.reason for item in folders.stream(folders.source(folder), refuse) if item.name == "b.png"} == {
        "too small"
    }


def test_paths_without_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        folders.source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        folders.source(tmp_path)
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(ValueError, match="neither a folder of images nor a zip"):
        folders.source(tmp_path / "file.txt")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ValueError, match="empty.zip holds no images"):
        folders.source(tmp_path / "empty.zip")
    with pytest.raises(ValueError, match="workers -1"):
        next(folders.stream(folders.Source(tmp_path, ("a.png",)), pixels_of, workers=-1))


def test_an_archive_with_damage_inside_names_the_damaged(folder, tmp_path):
    path = zipped(folder, tmp_path / "images.zip")
    data = bytearray(path.read_bytes())
    start = data.index((folder / "b.png").read_bytes())
    data[start + 20] ^= 255
    path.write_bytes(data)
    reasons = {item.name: item.reason for item in folders.stream(folders.source(path), pixels_of)}
    assert "cannot be taken out of the archive" in reasons["b.png"] and reasons["c.bmp"] is None


def slow(img) -> torch.Tensor:
    if img.width == 2:
        time.sleep(100)
    return torch.zeros(1)


def test_stopping_early_waits_for_nothing_and_leaves_no_process_behind(folder):
    for index in range(40):
        Image.new("L", (1 if index < 10 else 2, 1)).save(folder / f"d{index:02}.png")
    before = set(active_children())
    items = folders.stream(folders.source(folder), slow, workers=1)
    assert next(items).name == "a/cut.jpg"
    started = set(active_children()) - before
    assert len(started) == 1
    begin = time.monotonic()
    items.close()
    # Not join alone: while the pool's own thread is reaping the process, join returns at once.
    while set(active_children()) & started and time.monotonic() - begin < 50:
        time.sleep(0.05)
    assert not set(active_children()) - before and time.monotonic() - begin < 50


def test_images_that_cannot_be_read_here_are_named(tmp_path):
    """A folder of a phone: its .heic files are not passed over in silence."""
    for name in ("a.heic", "b.cr2", ".hidden.heic"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no images .* but 2 that cannot be read here: a.heic, b.cr2"):
        folders.source(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    with pytest.warns(UserWarning, match="2 images of .* cannot be read here and are left out: a.heic, b.cr2"):
        assert folders.source(tmp_path).names == ("c.png",)
