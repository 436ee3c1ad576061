"""Mutated images of every format, archives and folders of data: the promised exception or a reason, within bounds."""

import io
import json
import random
import re
import resource
import struct
import time
import warnings
import zipfile

import numpy
import pytest
from PIL import Image

from functional_sd3.image import files, folders
from functional_sd3.training import datasets

NUMBERS = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\x40\0", b"\0\x40\0\0")
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01"
WAYS = ({}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"progressive": True}, {"exif": EXIF})
HANDMADE = {
    ".xpm": b'/* XPM */\nstatic char *a[] = {\n"2 2 2 1",\n". c #000000",\n"+ c #FF0000",\n".+",\n"+.",\n};\n',
    ".psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(62),
    ".ras": struct.pack(">8I", 0x59A66A95, 4, 4, 24, 48, 1, 0, 0) + bytes(48),
    ".gbr": struct.pack(">IIIII4sI", 29, 2, 4, 4, 1, b"GIMP", 10) + b"a" + bytes(16),
}


def mutated(content: bytes, draw: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        if not content:
            break
        # Headers decide most.
        place = draw.randrange(min(len(content), 64) if draw.random() < 0.6 else len(content))
        kind = draw.randrange(6)
        if kind == 0:
            content[place] = draw.randrange(256)
        elif kind == 1:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            content[place : place + 4] = draw.choice(NUMBERS)
        elif kind == 3:
            del content[place:]
        elif kind == 4:
            del content[place : place + draw.randrange(1, 9)]
        else:
            content[place:place] = draw.randbytes(draw.randrange(1, 9))
    return bytes(content)


@pytest.fixture(scope="module")
def samples() -> list[bytes]:
    """An image of every format and several modes that Pillow writes here, and some that it only reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return written_samples()


def written_samples() -> list[bytes]:
    # At least 16 on a side: of smaller ones Pillow before 13 writes an ICO file without an image.
    noise = numpy.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=numpy.uint8)
    colours = Image.fromarray(noise)
    deep = Image.fromarray(noise[..., 0].astype(numpy.uint16) * 257)
    floats = Image.fromarray(noise[..., 0].astype(numpy.float32) / 255)
    modes = [colours, deep, floats, *(colours.convert("RGB").convert(mode) for mode in ("RGB", "P", "L", "1", "CMYK"))]
    actual = set(HANDMADE.values())
    for name in sorted({*files.formats()} - {"ICNS", "IM"}):
        for image in modes:
            for way in WAYS:
                buffer = io.BytesIO()
                try:
                    image.save(buffer, format=name, **way)
                    actual.add(buffer.getvalue())
                except (OSError, ValueError, KeyError, TypeError, AttributeError, SystemError):
                    continue
    assert len(actual) > 60
    return sorted(actual)


def test_mutated_images_of_every_format_are_read_or_refused_within_bounds(samples):
    draw = random.Random(0)
    for content in samples:
        files.read(io.BytesIO(content))
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for number in range(3000):
        content = mutated(draw.choice(samples), draw)
        started = time.monotonic()
        try:
            getattr(files, draw.choice(("read", "read_transparent", "read_deep", "read_texts")))(io.BytesIO(content))
        except ValueError as error:
            refused += 1
            assert str(error) and str(error).isprintable(), number
        assert time.monotonic() - started < 60, number
    assert 300 < refused < 3000
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 10 * files.MAX_PIXELS


def test_mutated_archives_give_images_or_reasons(samples, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, content in enumerate(samples[:6]):
            info = zipfile.ZipInfo(f"{number}.png")
            info.compress_type = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)[number % 3]
            archive.writestr(info, content)
    draw, outcomes = random.Random(1), {"read": 0, "named": 0, "refused": 0}
    for _ in range(250):
        content = bytearray(buffer.getvalue())
        # The table of names is at the end.
        cut = draw.choice((0, len(content) - 500))
        (tmp_path / "a.zip").write_bytes(content[:cut] + mutated(content[cut:], draw))
        try:
            for item in folders.stream(folders.source(tmp_path / "a.zip"), lambda image: image.size):
                outcomes["read" if item.reason is None else "named"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert all(outcomes.values()), outcomes


def test_mutated_captions_and_metadata_give_an_index_or_a_named_error(tmp_path):
    rows = [{"file_name": f"{name}.png", "text": f"größe {name}"} for name in "abc"]
    table = 'file_name,text\na.png,"one, two"\nb.png,größe\n'
    forms = {
        "metadata.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "metadata.csv": table.encode(),
        "a.txt": "größe".encode("utf-16"),
        "b.json": '{"caption": "größe", "tags": ["a", {"b": 3}]}'.encode(),
        "c.caption": "größe".encode("utf-8-sig"),
    }
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    draw, outcomes = random.Random(2), {"index": 0, "error": 0}
    for _ in range(300):
        name = draw.choice(sorted(forms))
        (tmp_path / name).write_bytes(mutated(forms[name], draw))
        try:
            index = datasets.image_folder(tmp_path)
            outcomes["index"] += 1
            assert all(sample.caption.encode() is not None for sample in index.samples)
            assert re.match(r"(1 image|[0-9]+ images) in ", datasets.summary(index))
            assert all(skipped.reason for skipped in index.skipped)
        except ValueError as error:
            outcomes["error"] += 1
            assert "metadata" in str(error) or "no images" in str(error)
        (tmp_path / name).unlink()
    assert min(outcomes.values()) > 20, outcomes
