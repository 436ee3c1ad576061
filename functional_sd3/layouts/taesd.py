"""The names of TAESD's tensors: positions in two sequences of layers, in three spellings.

diffusers' `AutoencoderTiny`: `encoder.layers.N`, `decoder.layers.N`; one file for ComfyUI: `taesd_encoder.N`,
`taesd_decoder.N`; the author's two files `N`, which are taken for the second once it is known which half is which. In
the author's, the decoder starts with a clamp that has no weights, hence its numbers are one higher.
"""

import re
from typing import NamedTuple

from functional_sd3.formats.errors import WeightsError
from functional_sd3.image import taesd
from functional_sd3.layouts.infer import Shapes, with_leading_ones
from functional_sd3.layouts.rules import Layout, renamed


class Naming(NamedTuple):
    """Prefixes of the layers' numbers, and the number of the decoder's first layer with weights."""

    encoder: str
    decoder: str
    first: int


DIFFUSERS = Naming("encoder.layers.", "decoder.layers.", 0)
ORIGINAL = Naming("taesd_encoder.", "taesd_decoder.", 1)


def layout(naming: Naming, config: taesd.Config) -> Layout:
    """The rules of one spelling for autoencoders of these sizes."""
    pairs = []
    place = 0
    for level, blocks in enumerate(config.encoder_blocks):
        ours = f"encoder.levels.{level}"
        name = f"{ours}.resample" if level else "encoder.conv_in"
        pairs.append((f"{name}.{{leaf}}", f"{naming.encoder}{place}.{{leaf}}"))
        pairs += _blocks(ours, naming.encoder, place + 1, blocks)
        place += 1 + blocks
    pairs.append(("encoder.conv_out.{leaf}", f"{naming.encoder}{place}.{{leaf}}"))
    pairs.append(("decoder.conv_in.{leaf}", f"{naming.decoder}{naming.first}.{{leaf}}"))
    # After the first convolution comes an activation, before the last of a level an upsampling.
    place = naming.first + 2
    for level, blocks in enumerate(config.decoder_blocks):
        ours = f"decoder.levels.{level}"
        pairs += _blocks(ours, naming.decoder, place, blocks)
        last = level + 1 == len(config.decoder_blocks)
        place += blocks + (0 if last else 1)
        name = "decoder.conv_out" if last else f"{ours}.resample"
        pairs.append((f"{name}.{{leaf}}", f"{naming.decoder}{place}.{{leaf}}"))
        place += 1
    return Layout(renamed(*pairs))


def infer(naming: Naming, shapes: Shapes, drops_ones: bool = False) -> taesd.Config:
    """The sizes read off names and shapes. Raises WeightsError when one half is missing."""
    halves = {"encoder": naming.encoder, "decoder": naming.decoder}
    missing = [half for half, prefix in halves.items() if not any(name.startswith(prefix) for name in shapes)]
    if missing:
        raise WeightsError(f"the {missing[0]} of TAESD is missing: give its file as well")
    first = f"{naming.encoder}0.weight"
    last = f"{naming.decoder}{naming.first}.weight"
    shapes = with_leading_ones(shapes, {first: 4, last: 4}, drops_ones)
    for name in (first, last):
        if len(shapes.get(name, ())) != 4:
            raise WeightsError(f"{name} is missing or no convolution, and the sizes cannot be read without it")
    return taesd.Config(
        width=shapes[first][0],
        latent_channels=shapes[last][1],
        encoder_blocks=tuple(_runs(naming.encoder, shapes)[1:-1]),
        decoder_blocks=tuple(_runs(naming.decoder, shapes)[1:-1]),
    )


def is_encoder(shapes: Shapes) -> bool:
    """True if this is the encoder among the author's two files: it starts with layer 0."""
    return "0.weight" in shapes


def _blocks(ours: str, theirs: str, place: int, count: int) -> list[tuple[str, str]]:
    return [
        (f"{ours}.blocks.{block}.conv{number + 1}.{{leaf}}", f"{theirs}{place + block}.conv.{2 * number}.{{leaf}}")
        for block in range(count)
        for number in range(3)
    ]


def _runs(prefix: str, shapes: Shapes) -> list[int]:
    """Numbers of blocks before, between and after the convolutions of a sequence."""
    blocks: dict[int, bool] = {}
    for name in shapes:
        if match := re.fullmatch(re.escape(prefix) + r"(\d{1,4})\.(conv\.)?.+", name):
            blocks[int(match[1])] = match[2] is not None
    runs = [0]
    for place in sorted(blocks):
        if blocks[place]:
            runs[-1] += 1
        else:
            runs.append(0)
    return runs
