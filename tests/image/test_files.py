"""Image files: every mode and format is read as viewers display it, within bounds of memory."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib

import numpy
import pytest
from PIL import Image, features

from functional_sd3.image import files, folders

RED = (220, 40, 40)
KINDS = ("read", "read_transparent", "read_deep", "read_texts")


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
def test_every_format_that_pillow_writes_and_we_read_is_read(tmp_path):
    image = Image.new("RGB", (16, 16), RED)
    written = set()
    for suffix in sorted(files.suffixes()):
        path = tmp_path / f"a{suffix.upper()}"
        for mode in ("RGB", "P", "1"):
            try:
                image.convert(mode).save(path)
                break
            except (OSError, ValueError, KeyError):
                path.unlink(missing_ok=True)
        if path.exists():
            written.add(suffix)
            reread = files.read(path)
            assert reread.mode == "RGB" and (reread.size == (16, 16) or suffix == ".icns")
    expected = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".tga", ".ico"}
    assert written >= expected | ({".avif"} if features.check("avif") else set())
    assert not files.suffixes() & {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".h5", ".txt", ".iim", ".fits"}


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_folders_of_the_newer_formats_are_read(tmp_path):
    for name in ("a.avif", "b.JFIF"):
        Image.new("RGB", (8, 8), RED).save(tmp_path / name)
    assert folders.source(tmp_path).names == ("a.avif", "b.JFIF")


def test_a_postscript_program_is_never_run_whatever_its_name(tmp_path):
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for name in ("a.png", "a.eps"):
        (tmp_path / name).write_bytes(program)
        with pytest.raises(ValueError, match="of no known format"):
            files.read(tmp_path / name)


RAMP = numpy.linspace(0, 65535, 256).round().astype(numpy.uint16).reshape(4, 64)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_keep_their_full_range(tmp_path, suffix):
    Image.fromarray(RAMP).save(tmp_path / f"a{suffix}")
    deep = files.read_deep(tmp_path / f"a{suffix}")
    assert deep.mode == "F"
    numpy.testing.assert_allclose(numpy.asarray(deep), RAMP / 65535, atol=1e-6)
    assert numpy.array_equal(numpy.asarray(files.read(tmp_path / f"a{suffix}"))[..., 1], (RAMP / 257.0).round())


def tiff(entries) -> bytes:
    """A TIFF of these tags and values up to 65535, without what they point to."""
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return header + b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries) + bytes(4)


def test_other_depths_follow_the_stated_rule_and_nothing_is_clipped(tmp_path):
    Image.fromarray((RAMP / 65535).astype(numpy.float32)).save(tmp_path / "floats.tif")
    numpy.testing.assert_allclose(numpy.asarray(files.read_deep(tmp_path / "floats.tif")), RAMP / 65535, atol=1e-6)
    Image.fromarray(RAMP.astype(numpy.int32)).save(tmp_path / "integers.tif")
    numpy.testing.assert_allclose(numpy.asarray(files.read_deep(tmp_path / "integers.tif")), RAMP / 65535, atol=1e-6)
    Image.fromarray(RAMP.astype(numpy.float32)).save(tmp_path / "metres.tif")
    Image.fromarray(RAMP.astype(numpy.int32) - 5).save(tmp_path / "negative.tif")
    Image.fromarray(numpy.full((2, 2), numpy.nan, numpy.float32)).save(tmp_path / "nan.tif")
    for name, said in (("metres", "0 to 65535: floats .* 0 .black. to 1 "), ("negative", "from -5"), ("nan", "nan")):
        for kind in ("read", "read_deep", "read_transparent"):
            with pytest.raises(ValueError, match=said):
                getattr(files, kind)(tmp_path / f"{name}.tif")


def test_tiffs_of_fewer_bits_or_of_inverted_grey_are_scaled_by_their_tags(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "plain.tif")
    content = bytearray((tmp_path / "plain.tif").read_bytes())
    # The entry of PhotometricInterpretation: tag 262, a SHORT, once; 0 is "white is zero".
    place = content.index(struct.pack("<HHI", 262, 3, 1))
    content[place + 8] = 0
    (tmp_path / "inverted.tif").write_bytes(content)
    inverted = numpy.asarray(files.read_deep(tmp_path / "inverted.tif"))
    numpy.testing.assert_allclose(inverted, 1 - RAMP / 65535, atol=1e-6)
    # Twelve bits: two pixels in three bytes.
    entries = ((256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 110), (278, 1), (279, 3))
    (tmp_path / "twelve.tif").write_bytes(tiff(entries) + b"\xff\xf8\x00")
    assert numpy.asarray(files.read_deep(tmp_path / "twelve.tif")).tolist() == [[1.0, pytest.approx(0x800 / 4095)]]


@pytest.mark.parametrize("kind", ["read", "read_transparent", "read_deep"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp", "deep.png"])
def test_a_camera_that_was_turned_gives_an_upright_image(tmp_path, kind, name):
    values = numpy.zeros((8, 16), numpy.uint16)
    values[:, 8:] = 65535
    image = Image.fromarray(values)
    if name != "deep.png":
        image = Image.fromarray(values.astype(numpy.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # What is stored on the right is at the bottom.
    image.save(tmp_path / name, exif=exif)
    upright = numpy.asarray(getattr(files, kind)(tmp_path / name).convert("F" if name == "deep.png" else "L"))
    assert upright.shape == (16, 8) and upright[:6].max() < 0.2 * upright[10:].min()


def test_transparency_of_every_form_is_kept_or_laid_over_white(tmp_path):
    clear = {
        "rgba.png": Image.new("RGBA", (4, 4), (*RED, 0)),
        "la.png": Image.new("LA", (4, 4), (80, 0)),
        "pa.gif": Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert("PA").convert("P"),
    }
    for name, image in clear.items():
        image.save(tmp_path / name, **({"transparency": image.getpixel((0, 0))} if name == "pa.gif" else {}))
    Image.new("L", (4, 4), 80).save(tmp_path / "key.png", transparency=80)
    Image.fromarray(numpy.full((4, 4), 300, numpy.uint16)).save(tmp_path / "deep.png", transparency=300)
    for path in tmp_path.iterdir():
        assert files.read(path).getpixel((0, 0)) == (255, 255, 255), path.name
        assert files.read_transparent(path).getpixel((0, 0))[3] == 0, path.name
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "print.tif")
    assert files.read_transparent(tmp_path / "print.tif").getpixel((0, 0)) == (255, 0, 0, 255)


def test_broken_exif_costs_the_orientation_and_nothing_else(tmp_path):
    Image.new("RGB", (6, 4), RED).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12broken")
    assert files.read(tmp_path / "a.jpg").size == (6, 4)
    assert "ImageDescription" not in files.read_texts(tmp_path / "a.jpg")


def png(width: int, height: int, depth: int, colour: int, extra: bytes = b"") -> bytes:
    """A PNG of zeros, small for its size."""
    packer, row = zlib.compressobj(9), bytes(1 + width * {0: 1, 2: 3, 6: 4}[colour] * depth // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    chunks = [chunk(*part) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + chunks[0] + extra + b"".join(chunks[1:])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_in_the_header_are_bounded_before_decoding(tmp_path, kind):
    side = 11586
    (tmp_path / "a.png").write_bytes(png(8, 8, 16, 0).replace(struct.pack(">II", 8, 8), struct.pack(">II", side, side)))
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="11,586 x 11,586 pixels, more than the 134,217,728.*reduce it"):
        getattr(files, kind)(tmp_path / "a.png")
    data[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="more than 134,217,728 pixels"):
        getattr(files, kind)(tmp_path / "a.png")
    with open(tmp_path / "sparse.webp", "wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="more than the 536,870,912"):
        getattr(files, kind)(tmp_path / "sparse.webp")


def test_formats_whose_decoders_hold_copies_are_read_up_to_half_of_it(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.webp", lossless=True)
    content = bytearray((tmp_path / "a.webp").read_bytes())
    # The sides less one, 14 bits each, after the signature of lossless WebP.
    content[21:25] = struct.pack("<I", 11584 | 5800 << 14 | int.from_bytes(content[21:25], "little") & 0xF0000000)
    (tmp_path / "a.webp").write_bytes(content)
    with pytest.raises(ValueError, match="11,585 x 5,801 pixels, more than the 67,108,864 .* one WEBP image"):
        files.read(tmp_path / "a.webp")


def test_the_first_frame_of_many_is_the_image(tmp_path):
    frames = [Image.new("L", (4, 4), number % 256) for number in range(300)]
    for suffix in (".gif", ".webp", ".png", ".tif"):
        path = tmp_path / f"a{suffix}"
        frames[9].save(path, save_all=True, append_images=frames)
        image = files.read(path)
        assert image.size == (4, 4) and abs(image.getpixel((0, 0))[0] - 9) < 4


@pytest.mark.parametrize("depth, colour", [(16, 0), (8, 6)])
def test_a_small_file_within_the_bound_takes_little_more_than_its_pixels(tmp_path, depth, colour):
    side = 4096
    (tmp_path / "a.png").write_bytes(png(side, side, depth, colour))
    script = (
        "import resource, sys; from functional_sd3.image import files; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; "
        "before = peak(); files.read(sys.argv[1]); print(peak() - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.png")]
    used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert used < 9 * side * side + 2**26


def test_metadata_that_unpacks_without_end_is_refused(tmp_path):
    bomb = zlib.compress(bytes(2**26), 9)
    for name, data in (("zTXt", b"k\0\0" + bomb), ("iTXt", b"k\0\1\0\0\0" + bomb), ("iCCP", b"k\0\0" + bomb)):
        (tmp_path / "a.png").write_bytes(png(8, 8, 8, 2, chunk(name.encode(), data)))
        for kind in KINDS:
            with pytest.raises(ValueError, match="[Dd]ecompressed data too large"):
                getattr(files, kind)(tmp_path / "a.png")


def test_jpegs_of_thousands_of_scans_and_tiffs_of_huge_tiles_are_refused(tmp_path):
    Image.new("RGB", (2000, 2000)).save(tmp_path / "a.jpg", progressive=True)
    content = (tmp_path / "a.jpg").read_bytes()
    last = content.rindex(b"\xff\xda")
    (tmp_path / "scans.jpg").write_bytes(content[:last] + content[last:-2] * 1100 + b"\xff\xd9")
    with pytest.raises(ValueError, match="JPEG of 11.. scans"):
        files.read(tmp_path / "scans.jpg")
    entries = ((256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (322, 60000), (323, 60000), (324, 122), (325, 9))
    (tmp_path / "a.tif").write_bytes(tiff(entries) + bytes(9))
    with pytest.raises(ValueError, match="TIFF with tiles of 60000 x 60000"):
        files.read(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", KINDS)
def test_paths_that_are_no_regular_file_are_refused_without_waiting(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, said in (("pipe.png", "is a named pipe"), ("folder.png", "is a folder"), ("none.png", "is missing")):
        with pytest.raises(ValueError, match=said):
            getattr(files, kind)(tmp_path / name)
    with pytest.raises(ValueError, match="is a device"):
        getattr(files, kind)("/dev/zero")
    with pytest.raises(ValueError, match="neither a folder"):
        folders.source(tmp_path / "pipe.png")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_of_archives_are_bounded_by_declared_and_by_actual_size(tmp_path, method, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("large.png", bytes(2**21))
        archive.writestr("lies.png", bytes(2**26))
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), RED).save(buffer, "PNG")
        archive.writestr("good.png", buffer.getvalue())
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(struct.pack("<I", 2**26), struct.pack("<I", 2**10)))
    source = folders.source(tmp_path / "a.zip")
    items = {item.name: item for item in folders.stream(source, lambda image: image.size)}
    assert items["good.png"].value == (4, 4)
    assert "2,097,152 bytes, more than" in items["large.png"].reason
    assert "cannot be taken out of the archive" in items["lies.png"].reason


def test_a_member_that_unpacks_to_more_than_it_declares_is_not_unpacked_at_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("lies.png", bytes(2**26))
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(struct.pack("<I", 2**26), struct.pack("<I", 2**10)))
    tracemalloc.start()
    try:
        (item,) = folders.stream(folders.source(tmp_path / "a.zip"), lambda image: image.size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert item.reason and peak < 2**26 + 2**24


def test_texts_are_read_of_every_format_that_has_them(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "words"
    image = Image.new("RGB", (4, 4))
    for suffix in (".jpg", ".webp", ".png", ".tif"):
        image.save(tmp_path / f"a{suffix}", exif=exif)
        assert files.read_texts(tmp_path / f"a{suffix}")["ImageDescription"] == "words"
    for suffix in (".gif", ".jpg"):
        image.save(tmp_path / f"b{suffix}", comment=b"words")
        assert files.read_texts(tmp_path / f"b{suffix}")["comment"] == "words"


def test_scans_are_counted_of_the_image_alone_not_of_a_video_behind_it():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    assert content.count(b"\xff\xda") > 5
    assert files._count_scans(content) == content.count(b"\xff\xda")
    # Phones write "motion photos"; the mark stands in 10 MB of a video 150 times by chance.
    assert files._count_scans(content + b"\xff\xda" * 10**6) == content.count(b"\xff\xda")
    # A thumbnail within a segment is none of the image's scans, and scans before the end all are.
    segment = b"\xff\xe1" + (2 + 40).to_bytes(2, "big") + b"\xff\xda" * 20
    assert files._count_scans(content[:2] + segment + content[2:]) == content.count(b"\xff\xda")
    scan = content[content.rindex(b"\xff\xda") : -2]
    assert files._count_scans(content[:-2] + scan * 1000 + content[-2:]) == content.count(b"\xff\xda") + 1000
