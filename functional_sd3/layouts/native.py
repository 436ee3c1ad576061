"""The project's own names on disk: a component, a dot, and the path of the leaf. Everything lies as it is used, so that
loading copies nothing."""

import re
from functools import partial

from functional_sd3.image import taesd as taesd_module
from functional_sd3.layouts.infer import Shapes, shape_of
from functional_sd3.layouts.rules import Layout, renamed

LAYOUT = Layout(renamed(("{*path}", "{*path}")))
SIGNS = {
    "clip_l": r"blocks\.\d+\.norm1\.",
    "clip_g": r"blocks\.\d+\.norm1\.",
    "t5": r"blocks\.\d+\.norm1\.",
    "transformer": r"blocks\.\d+\.(image|context)\.",
    "vae": r"(en|de)coder\.(levels|middle)\.",
    "taesd": r"(en|de)coder\.",
}
"""Component -> pattern that some of its names match, below the prefix."""


def taesd(shapes: Shapes, drops_ones: bool = False) -> taesd_module.Config:
    """The sizes of a TAESD under our own names."""
    shape = partial(shape_of, shapes, drops_ones)
    return taesd_module.Config(
        shape("encoder.conv_in.weight", 4)[0],
        shape("decoder.conv_in.weight", 4)[1],
        _blocks("encoder", shapes),
        _blocks("decoder", shapes),
    )


def _blocks(half: str, shapes: Shapes) -> tuple[int, ...]:
    counts = [0] * (
        1 + sum(re.fullmatch(rf"{half}\.levels\.\d+\.resample\.weight", name) is not None for name in shapes)
    )
    found = {
        match[1] for name in shapes if (match := re.fullmatch(rf"{half}\.levels\.(\d{{1,4}}\.blocks\.\d+)\..+", name))
    }
    for place in found:
        level = int(place.split(".")[0])
        counts[min(level, len(counts) - 1)] += 1
    return tuple(counts)
