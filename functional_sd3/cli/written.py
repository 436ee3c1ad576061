"""Pictures on disk: their names, the settings inside them, and the command line that makes them again."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

METADATA = "functional_sd3"
"""Keyword of the PNG text chunk that holds the settings a picture was made with."""

_DESCRIPTION = 0x010E
"""The EXIF tag ImageDescription."""
_DEFAULTS = {"negative": "", "cfg": 5.0, "dtype": "auto"}
_POSITIONAL = ("subcommand", "picture", "prompts")

Settings = dict[str, Any]
"""Option -> value, in the words of JSON: a text or number is `--option value`, a list that for each of its items, True
`--option`; what has its usual value may be left out. "subcommand" (generate, where absent), "picture" and "prompts" are
the words before the options. A new option of a command is recorded by putting it here, and nothing else."""


class Job(NamedTuple):
    """One picture: its prompt and seed, and the seed whose noise it is moved towards by some amount."""

    prompt: str
    seed: int
    towards: int | None = None
    amount: float = 0.0

    def settings(self) -> Settings:
        """What a picture keeps of it beside the prompt."""
        moved = {} if self.towards is None else {"variation": f"{self.towards}:{self.amount!r}"}
        return {"seed": self.seed, **moved}


def given(arguments: Any, names: Sequence[str]) -> Settings:
    """Those options that were given: neither absent nor empty, but 0 where that was said."""
    found = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in found.items() if value is not False and value not in (None, "", [])}


def command(settings: Settings) -> str:
    """The command line that makes a picture with these settings again."""
    options = []
    for name, value in settings.items():
        if name in _POSITIONAL or value is False or value == _DEFAULTS.get(name):
            continue
        option = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, list) else [value]:
            options += _option(option, item)
    places = [settings["picture"]] if "picture" in settings else []
    words = [str(word) for word in (*places, *settings.get("prompts", []))]
    if not words:
        raise KeyError("prompts")
    start = ["functional-sd3", settings.get("subcommand", "generate")]
    if any(word.startswith("-") for word in words):
        return shlex.join([*start, *options, "--", *words])
    return shlex.join([*start, *words, *options])


def _option(name: str, value: Any) -> list[str]:
    if value is True:
        return [name]
    # A text that starts with a hyphen would be read as an option.
    return [f"{name}={value}"] if str(value).startswith("-") else [name, str(value)]


def read_settings(path: Path) -> Settings | None:
    """The settings written into a picture, None where there are none; ValueError for a file that is no picture."""
    from functional_sd3.formats import json_fields
    from functional_sd3.image import files

    try:
        texts = files.read_texts(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    text = _text(texts)
    if text is None:
        return None
    try:
        settings = dict(json_fields.parse_object(text, "the text").values)
        command(settings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds settings that cannot be read: {error}") from None
    return settings


def check_writable(folder: Path) -> None:
    """Fails before the work rather than after it."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".functional-sd3-probe"
    probe.touch()
    probe.unlink()


def write_each(folder: Path, images: "Tensor", jobs: Sequence[Job], settings: Settings) -> list[Path]:
    """A file for each picture, and a grid of all where there are several; the paths."""
    from functional_sd3.image import pixels

    written = []
    for picture, job in zip(pixels.to_pil(images), jobs, strict=True):
        seeds = f"{job.seed}" if job.towards is None else f"{job.seed}-{job.towards}"
        path = free(folder, f"{slug(job.prompt)}-{seeds}")
        save(path, picture, {"prompts": [job.prompt], **job.settings(), **settings})
        written.append(path)
    if len(jobs) > 1:
        path = free(folder, "grid")
        save(path, pixels.to_pil(pixels.grid(images))[0], _together(jobs, settings))
        written.append(path)
    return written


def write_grid(path: Path, images: "Tensor", jobs: Sequence[Job], settings: Settings) -> list[Path]:
    """One file of all pictures."""
    from functional_sd3.image import pixels

    picture = pixels.to_pil(images if len(jobs) == 1 else pixels.grid(images))[0]
    save(path, picture, _together(jobs, settings))
    return [path]


def save(path: Path, picture: "Image", settings: Settings) -> None:
    """A PNG with the settings inside, whole or not at all."""
    import io

    from PIL.PngImagePlugin import PngInfo

    from functional_sd3.weights import files

    info = PngInfo()
    info.add_text(METADATA, json.dumps(settings))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    files.write_atomic(path, buffer.getvalue())


def save_animation(path: Path, pictures: "Sequence[Image]", settings: Settings, fps: float) -> None:
    """A GIF or WebP, by its suffix, that goes on for ever, with the settings inside."""
    import io

    from functional_sd3.weights import files

    text = f"{METADATA} {json.dumps(settings)}"
    buffer = io.BytesIO()
    told = {"save_all": True, "append_images": pictures[1:], "duration": round(1000 / fps), "loop": 0}
    if path.suffix.lower() == ".gif":
        pictures[0].save(buffer, format="GIF", comment=text.encode(), **told)
    else:
        exif = pictures[0].getexif()
        exif[_DESCRIPTION] = text
        pictures[0].save(buffer, format="WEBP", exif=exif, lossless=True, **told)
    files.write_atomic(path, buffer.getvalue())


def _text(texts: dict[str, str]) -> str | None:
    """The settings in a PNG's text, a GIF's or JPEG's comment or the description in the EXIF of other formats."""
    if METADATA in texts:
        return texts[METADATA]
    others = (texts.get("comment", ""), texts.get("ImageDescription", ""))
    found = next((text for text in others if text.startswith(METADATA)), None)
    return None if found is None else found.removeprefix(METADATA).strip()


def slug(prompt: str) -> str:
    """A prompt as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "empty"


def free(folder: Path, name: str, suffix: str = ".png") -> Path:
    """A path that no earlier picture has."""
    path, number = folder / f"{name}{suffix}", 2
    while path.exists():
        path, number = folder / f"{name}-{number}{suffix}", number + 1
    return path


def _together(jobs: Sequence[Job], settings: Settings) -> Settings:
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    return {"prompts": prompts, **jobs[0].settings(), "count": len(jobs) // len(prompts), **settings}
