"""Image files: where --out puts them, names that no other process has, and the settings inside them."""

import io
import json
import os
import re
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_sd3.cli import report
from functional_sd3.cli.image_settings import DESCRIPTION, METADATA, Record

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
ANIMATIONS = (".gif", ".webp")
_MAX_SIDE = {".webp": 16_383, ".jpg": 65_500, ".jpeg": 65_500, ".gif": 65_535}
_MAX_JPEG_COMMENT = 65_533
"""Bytes of a JPEG's comment."""


def destination(text: str | None, suffixes: Sequence[str] = IMAGES) -> tuple[Path, bool]:
    """The path that --out is, and whether it is one file; without --out the folder `out`.

    A path that ends with / or is a folder is a folder, and so is one without a suffix; one with a suffix of `suffixes`
    is a file. Raises ValueError for other suffixes, OSError where nothing can be written; nothing is made yet.
    """
    path = Path(text) if text else Path("out")
    if text is not None and not text.strip():
        raise ValueError(f"--out {text!r} must be a file ({', '.join(suffixes)}) or a folder")
    if text is not None and (text == "-" or path.name.lower() in suffixes):
        raise ValueError(f"--out {text} must be a file ({', '.join(suffixes)}) with a name, or a folder such as out/")
    suffix = path.suffix.lower()
    folder = path.is_dir() or (text is not None and text.endswith(("/", os.sep)))
    if not folder and suffix and suffix not in suffixes:
        raise ValueError(
            f"--out {text}: {path.suffix} is no form of image that is written ({', '.join(suffixes)}); "
            f"end it with / if it is to be a folder: {text}/"
        )
    single = not folder and bool(suffix)
    if not single and path.exists() and not path.is_dir():
        raise ValueError(f"--out {text} is a file that has no suffix of an image ({', '.join(suffixes)}), no folder")
    check_writable(path.parent if single else path)
    return path, single


def check_fits(path: Path, width: int, height: int) -> None:
    """Raises ValueError where an image of this size is too large for the form that the suffix of `path` names."""
    longest = _MAX_SIDE.get(path.suffix.lower())
    if longest is not None and max(width, height) > longest:
        raise ValueError(
            f"--out {path}: the image would be {width}x{height}, but {path.suffix} has at most {longest:,} pixels a "
            "side; take .png or a folder"
        )


def check_files(*paths: str | None) -> None:
    """Raises ValueError or OSError for a file that cannot be written, before the work rather than after it."""
    for path in paths:
        if path is None or path == "-":
            continue
        parent = Path(path).absolute().parent
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder; a file is needed")
        if not parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {parent}")
        check_writable(parent)


def check_folder(text: str) -> None:
    """Raises ValueError for an --out that cannot be the folder of a result: "" (the current folder) or a file."""
    if not text.strip():
        raise ValueError(f"--out {text!r} must be a folder, which is made where it is missing")
    if Path(text).exists() and not Path(text).is_dir():
        raise ValueError(f"--out {text} is a file; name a folder, which is made where it is missing")


def check_weights(text: str, option: str = "--out") -> None:
    """Raises ValueError or OSError where no weights can be written, before they are computed: a folder, or a file of
    safetensors."""
    if not text.strip():
        raise ValueError(f"{option} {text!r} must be a folder or a .safetensors file")
    if Path(text).is_file() and Path(text).suffix.lower() not in (".safetensors", ".sft"):
        raise ValueError(f"{option} {text} is a file that is no .safetensors; name another, or a folder")
    check_writable(Path(text).absolute().parent)


def check_writable(folder: Path) -> None:
    """Raises OSError where no file can be made in `folder`, or in what exists of the path to it; nothing changes."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        # A file without a name where the system has such files, else of a random one.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def write_new(folder: Path, name: str, suffix: str, content: bytes) -> Path:
    """Write a new file NAME.suffix, NAME-2.suffix, ... in the folder, and return its path.

    The first free name is claimed and filled in one instant: no two processes get one name, and no file is ever without
    its content. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        number = 1
        while True:
            path = folder / (f"{name}{suffix}" if number == 1 else f"{name}-{number}{suffix}")
            if _claim(temporary, path, content):
                return path
            number += 1
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, image: "Image", record: Record) -> None:
    """Put an image with its settings at `path`, in the form of its suffix, whole or not at all."""
    from functional_sd3.formats import files

    files.write_atomic(path, encoded(image, path.suffix, record))


def save_new(folder: Path, name: str, image: "Image", record: Record) -> Path:
    """A PNG with its settings under a name that is free; its path."""
    return write_new(folder, name, ".png", encoded(image, ".png", record))


def encoded(image: "Image", suffix: str, record: Record) -> bytes:
    """The bytes of a PNG, JPEG or lossless WebP, with the settings in its text, comment or EXIF description."""
    from PIL.PngImagePlugin import PngInfo

    buffer, text = io.BytesIO(), json.dumps(record)
    if suffix.lower() == ".png":
        info = PngInfo()
        info.add_text(METADATA, text)
        image.save(buffer, format="PNG", pnginfo=info)
    elif suffix.lower() == ".webp":
        image.save(buffer, format="WEBP", lossless=True, exif=_description(image, text))
    else:
        comment = f"{METADATA} {text}".encode()
        size = f"{len(comment):,} bytes"
        if len(comment) > _MAX_JPEG_COMMENT:
            report.note(f"the settings, {size}, do not fit into a JPEG and are left out; a .png holds them")
            comment = b""
        image.save(buffer, format="JPEG", quality=95, subsampling=0, comment=comment)
    return buffer.getvalue()


def encoded_animation(images: "Sequence[Image]", suffix: str, record: Record, fps: float) -> bytes:
    """The bytes of a GIF or WebP, by its suffix, that repeats for ever, with the settings inside."""
    text, buffer = json.dumps(record), io.BytesIO()
    options: dict[str, Any] = {"save_all": True, "append_images": images[1:], "loop": 0}
    options["duration"] = round(1000 / fps)
    if suffix.lower() == ".gif":
        images[0].save(buffer, format="GIF", comment=f"{METADATA} {text}".encode(), **options)
    else:
        exif = _description(images[0], text)
        images[0].save(buffer, format="WEBP", exif=exif, lossless=True, **options)
    return buffer.getvalue()


def slug(prompt: str) -> str:
    """A prompt as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "empty"


def _description(image: "Image", text: str):
    exif = image.getexif()
    exif[DESCRIPTION] = f"{METADATA} {text}"
    return exif


def _claim(temporary: Path, path: Path, content: bytes) -> bool:
    """True if `path` was free and now is the file; no name that exists, a broken link among them, is ever taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        return _claim_without_links(path, content)
    return True


def _claim_without_links(path: Path, content: bytes) -> bool:
    """The same on a file system without hard links."""
    try:
        file = open(path, "xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(content)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True
