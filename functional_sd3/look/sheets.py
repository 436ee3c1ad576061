"""Images of a run put together: frames with their t in rows that wrap, words as spotlights, maps by block and step."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.look.colours import as_colours, linear_decoder
from functional_sd3.look.plotting import colours_of
from functional_sd3.look.record import Attention, Record

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 192
"""Longest side of a frame of a page in pixels; a frame of a large image is made smaller."""
_TILE = 32
"""Longest side of a map in a sheet by block and step."""
_LABEL = 14


class Cells(NamedTuple):
    """Frames of the steps: their t, and images (frames, 3, h, w) in [0, 1] by what they show."""

    labels: list[str]
    rows: dict[str, Tensor]


class WordMap(NamedTuple):
    """Attention for the tokens of one word in one stream of the prompt, the mean over blocks and steps."""

    word: str
    stream: str
    group: int
    """Index into `Attention.groups`."""
    values: Tensor
    """(height, width) in tokens of the image."""


def cells(record: Record) -> Cells:
    """x_t, predicted x_0 and velocity of each frame, at most `SIDE` pixels wide and high."""
    frames = record.frames
    labels = [f"t = {float(record.times[step]):.2f}" for step in frames.steps]
    chosen = list(frames.steps)
    decoder = linear_decoder(record.denoised[chosen], frames.denoised)
    velocity = as_colours(record.velocities[chosen], decoder)
    size = frames.states.shape[-2:]
    rows = {"x_t": frames.states, "predicted x_0": frames.denoised, "velocity": F.interpolate(velocity, size)}
    return Cells(labels, {name: torch.stack([fit(image, SIDE) for image in part]) for name, part in rows.items()})


def fit(image: Tensor, side: int) -> Tensor:
    """The image (channels, height, width) made smaller, if need be, so that no side is longer than `side`."""
    longest = max(image.shape[-2:])
    if longest <= side:
        return image
    size = [max(1, round(length * side / longest)) for length in image.shape[-2:]]
    return F.interpolate(image[None], size, mode="area")[0]


def word_maps(attention: Attention, words: Sequence[str]) -> list[WordMap]:
    """A map for each word and stream, in the order of the prompt."""
    mean = attention.to_words.mean((0, 1))
    maps = [
        WordMap(words[group.word], group.stream, index, mean[index])
        for index, group in enumerate(attention.groups)
        if group.word is not None
    ]
    return sorted(maps, key=lambda each: attention.groups[each.group].word or 0)


def spotlight(image: Tensor, values: Tensor, largest: float) -> Tensor:
    """The image (3, height, width) lit by the root of the attention (h, w) of its places: all of it at `largest`."""
    light = (values / max(largest, 1e-12)).clamp(0, 1).sqrt()
    light = F.interpolate(light[None, None], image.shape[-2:])[0]
    return image * (0.06 + 0.94 * light)


def by_block_and_step(maps: Tensor) -> Tensor:
    """Maps (steps, blocks, height, width) as one image in [0, 1], (3, rows, columns): a row for each block, a column
    for each step, gaps of one pixel; black is 0 and white the largest weight of all. NaN, no queries, is grey."""
    maps = torch.stack([torch.stack([fit(each[None], _TILE)[0] for each in row]) for row in maps.transpose(0, 1)])
    absent = maps.isnan()
    largest = maps.nan_to_num().max().clamp_min(1e-12)
    shown = torch.from_numpy(colours_of((maps.nan_to_num() / largest).numpy())).permute(0, 1, 4, 2, 3).float() / 255
    shown = torch.where(absent[:, :, None], torch.full_like(shown, 0.5), shown)
    padded = F.pad(shown, (0, 1, 0, 1), value=0.5)
    return padded.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[:, :-1, :-1]


def to_pil(image: Tensor) -> "Image":
    """(3, height, width) in [0, 1] -> RGB."""
    from PIL import Image

    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def encode(image: "Image", kind: str = "PNG") -> bytes:
    """PNG, or WebP of quality 85, for what need not be exact."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": 85} if kind == "WEBP" else {"optimize": True}))
    return buffer.getvalue()


def frames_sheet(shown: Cells, columns: int = 7) -> "Image":
    """All frames in one image, labelled, in rows that wrap: three images below each t."""
    from PIL import Image, ImageDraw

    height, width = next(iter(shown.rows.values())).shape[-2:]
    names = 6 * max(map(len, shown.rows)) + 8
    columns = min(columns, len(shown.labels))
    across, down = max(width, 52) + 4, len(shown.rows) * (height + 2) + _LABEL + 6
    rows = -(-len(shown.labels) // columns)
    sheet = Image.new("RGB", (names + columns * across, rows * down), "white")
    pen = ImageDraw.Draw(sheet)
    for index, label in enumerate(shown.labels):
        left, top = names + index % columns * across, index // columns * down
        pen.text((left, top), label, fill="black")
        for row, (name, images) in enumerate(shown.rows.items()):
            y = top + _LABEL + row * (height + 2)
            sheet.paste(to_pil(images[index]), (left, y))
            if index % columns == 0:
                pen.text((2, y + height // 2 - 6), name, fill="black")
    return sheet


def words_sheet(image: Tensor, maps: Sequence[WordMap], columns: int = 8) -> "Image":
    """The spotlights of all words in one image, labelled."""
    from PIL import Image, ImageDraw

    shown = fit(image, SIDE // 2)
    scale = max(1, 64 // max(shown.shape[-2:]))
    height, width = (scale * side for side in shown.shape[-2:])
    columns, across, down = min(columns, len(maps)), max(width, 78) + 6, height + _LABEL + 4
    sheet = Image.new("RGB", (columns * across, -(-len(maps) // columns) * down), "white")
    pen, largest = ImageDraw.Draw(sheet), largest_of(maps)
    for index, each in enumerate(maps):
        left, top = index % columns * across, index // columns * down
        pen.text((left, top), f"{each.word[:9]} {each.stream}", fill="black")
        lit = to_pil(spotlight(shown, each.values, largest[each.stream])).resize(
            (width, height), Image.Resampling.NEAREST
        )
        sheet.paste(lit, (left, top + _LABEL))
    return sheet


def largest_of(maps: Sequence[WordMap]) -> dict[str, float]:
    """The largest weight of all words of each stream."""
    streams = {each.stream for each in maps}
    return {stream: max(float(each.values.max()) for each in maps if each.stream == stream) for stream in streams}
