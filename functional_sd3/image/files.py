"""Image files of any format and mode, read within bounds: the only module that opens an image.

Greyscale, palettes, CMYK, 16 bits, transparency and EXIF orientation are converted to upright RGB:

- EXIF's orientation is applied; of an animation the first frame is read.
- 16-bit greyscale spans 0 to 65535, or the bits that a TIFF declares. `read` rounds it to 8 bits, `read_deep`
  keeps it. Integers of 32 bits span 0 to 65535 too, floats 0 to 1; a file with values outside is refused, not clipped.
- `MAX_PIXELS` and `MAX_BYTES` are checked before anything is decoded.

Every function raises ValueError with what is wrong with the file, but not its name, which the caller knows.
"""

import os
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from functional_sd3.formats import bounded
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.printable import escape, shorten
from functional_sd3.image import depth, pixels
from functional_sd3.image.depth import RefusedError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 2**27
"""Most pixels of an image: 134 million, that of the largest medium-format cameras. Decoding takes up to 8 bytes for
each."""
_COPYING = frozenset({"WEBP", "AVIF"})
"""Formats whose decoders hold several images of the size at a time; half as many pixels are read of them."""
MAX_BYTES = 2**29
"""Most bytes of one file, or of one member of a zip archive when unpacked: several decoders read a file whole."""
Result = TypeVar("Result")

_USUAL = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
_REFUSED = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "FITS"})
"""Formats of Pillow's that are no raster images, run another program (EPS), open files of any format within themselves
(IPTC) or unpack without a bound (FITS)."""
NOT_READ = frozenset(
    {".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".exr", ".hdr",
     ".xcf", ".kra"}
)  # fmt: skip
"""Suffixes of images that no reader here knows, as phones, cameras and editors write them; they are named."""
_MAX_DECODED = 2**32
"""Pixels of a JPEG times its scans: each scan goes over the whole image, and a file has room for thousands."""
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd8\xff])", re.DOTALL)
"""A marker that begins a segment or ends the image; fill bytes, restarts and starts of images are none."""
_ORIENTATION, _DESCRIPTION, _COMMENT = 0x0112, 0x010E, 0x9286
_TILE_WIDTH, _TILE_HEIGHT = 322, 323


def formats() -> tuple[str, ...]:
    """The formats that are read, as Pillow names them, in the order in which they are tried."""
    from PIL import Image

    suffixed = {*Image.registered_extensions().values()}
    return (*_USUAL, *sorted((suffixed & {*Image.OPEN}) - _REFUSED - {*_USUAL}))


def suffixes() -> frozenset[str]:
    """Suffixes of the files that are read, in lower case, such as ".avif"."""
    from PIL import Image

    # Files of several JPEGs are opened as JPEG.
    known = {*formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def suffix_words() -> str:
    """The usual suffixes and the number of others, as words of a message."""
    known, usual = suffixes(), (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
    shown = [suffix for suffix in usual if suffix in known]
    return f"{', '.join(shown)} and {len(known) - len(shown)} more"


def read(file: str | os.PathLike | BinaryIO) -> "Image":
    """The image in RGB, 8 bits a channel, composed over white."""
    return _decode(file, lambda image: pixels.opaque(_upright(depth.eight_bits(image), _orientation(image))))


def read_transparent(file: str | os.PathLike | BinaryIO) -> "Image":
    """The image in RGBA, 8 bits a channel; alpha is 255 everywhere where the file has no transparency."""
    return _decode(file, lambda image: _upright(depth.eight_bits(image), _orientation(image)).convert("RGBA"))


def read_deep(file: str | os.PathLike | BinaryIO) -> "Image":
    """Greyscale of more than 8 bits as floats in [0, 1] (mode "F"), any other image as `read`: for depth maps."""

    def convert(image: "Image") -> "Image":
        if depth.is_deep(image):
            return _upright(depth.floats(image), _orientation(image))
        return pixels.opaque(_upright(depth.eight_bits(image), _orientation(image)))

    return _decode(file, convert)


def read_texts(file: str | os.PathLike | BinaryIO) -> dict[str, str]:
    """The texts of a file's metadata by their keywords, without decoding the image: PNG's text chunks, "comment" of
    GIF and JPEG, "ImageDescription" and "UserComment" of EXIF. Broken EXIF has none.
    """

    def convert(image: "Image") -> dict[str, str]:
        exif = _exif(image)
        fields: dict = {**image.info, "ImageDescription": exif.get(_DESCRIPTION), "UserComment": exif.get(_COMMENT)}
        texts = {name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                 for name, value in fields.items() if name not in ("exif", "icc_profile")}  # fmt: skip
        return {name: str(value) for name, value in texts.items() if isinstance(value, str)}

    return _decode(file, convert, decode=False)


def _decode(file, function: Callable[["Image"], Result], *, decode: bool = True) -> Result:
    """`function(image)` of the image in a file, after its header has passed the checks of size."""
    from PIL import Image, UnidentifiedImageError

    try:
        # Pillow warns of defects that do not prevent reading, such as broken EXIF.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _stream(file) as stream:
                _check_size(stream)
                with Image.open(stream, formats=formats()) as image:
                    _check_header(image, stream)
                    if decode:
                        image.load()
                        _check_pixels(image)
                    return function(image)
    except RefusedError:
        raise
    except UnidentifiedImageError:
        raise ValueError("not a readable image (of no known format)") from None
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {MAX_PIXELS:,} pixels, the most that is read; reduce it first") from None
    except MemoryError:
        raise ValueError("not a readable image (there is not enough memory for it)") from None
    # Decoders raise many kinds of errors for broken files, SyntaxError and struct.error among them.
    except Exception as error:
        reason = shorten(str(error) or type(error).__name__, 200)
        raise ValueError(f"not a readable image ({reason})") from None


def _stream(file: str | os.PathLike | BinaryIO) -> BinaryIO:
    if not isinstance(file, str | os.PathLike):
        return file
    try:
        return bounded.open_file(file)
    except WeightsError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise RefusedError("the file is missing") from None
        raise RefusedError(str(error).removeprefix(f"{escape(file)}: ")) from None


def _check_size(stream: BinaryIO) -> None:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if size > MAX_BYTES:
        raise RefusedError(f"has {size:,} bytes, more than the {MAX_BYTES:,} that are read of one image")


def _check_pixels(image: "Image") -> None:
    width, height = image.size
    most = MAX_PIXELS // 2 if image.format in _COPYING else MAX_PIXELS
    if width * height > most:
        kind = f" {image.format}" if image.format in _COPYING else ""
        raise RefusedError(
            f"has {width:,} x {height:,} pixels, more than the {most:,} that are read of one{kind} image; "
            "reduce it first"
        )
    if not width * height:
        raise RefusedError(f"has no pixels: it is {width} x {height}")


def _check_header(image: "Image", stream: BinaryIO) -> None:
    """Refuse headers that cost a decoder more than the pixels they declare: tiles of TIFF, scans of JPEG."""
    _check_pixels(image)
    tags = getattr(image, "tag_v2", {})
    if tags:
        sides = [tags.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT)]
        if any(not isinstance(side, int) for side in sides) or sides[0] * sides[1] > MAX_PIXELS:
            raise RefusedError(f"is a TIFF with tiles of {sides[0]} x {sides[1]}, more than {MAX_PIXELS:,} pixels")
    if image.format in ("JPEG", "MPO"):
        offset = stream.tell()
        stream.seek(0)
        scans = _count_scans(stream.read(MAX_BYTES))
        stream.seek(offset)
        if scans * image.width * image.height > _MAX_DECODED:
            raise RefusedError(f"is a JPEG of {scans} scans of {image.width} x {image.height} pixels: too many")


def _count_scans(content: bytes) -> int:
    """Scans of the first image in a JPEG file; phones append videos, which may hold a marker's bytes by chance."""
    scans, offset = 0, 2
    while marker := _JPEG_MARKER.search(content, offset):
        offset = marker.end()
        if marker[1] == b"\xd9":
            break
        scans += marker[1] == b"\xda"
        # The marker TEM alone is not followed by the length of a segment.
        if marker[1] != b"\x01":
            offset += int.from_bytes(content[offset : offset + 2], "big")
    return scans


def _exif(image: "Image") -> dict:
    """EXIF tags of an image; empty where they cannot be read."""
    try:
        return dict(image.getexif()) | dict(image.getexif().get_ifd(0x8769))
    except Exception:
        return {}


def _orientation(image: "Image") -> int:
    orientation = _exif(image).get(_ORIENTATION)
    return orientation if isinstance(orientation, int) else 1


def _upright(image: "Image", orientation: int) -> "Image":
    """The image turned upright, given EXIF's orientation of the camera, 1 to 8."""
    from PIL import Image

    turns = Image.Transpose
    by_number = {2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
                 6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90}  # fmt: skip
    return image.transpose(by_number[orientation]) if orientation in by_number else image
