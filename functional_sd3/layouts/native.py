"""The project's own names on disk: a component, a dot, and the path of the leaf. Everything lies as it is used, so that
loading copies nothing.

The metadata of a file hold its version. In version 1, whose files have configs in their metadata and no version, scale
stood before shift where a modulation has no gate, as diffusers has it: in the transformer's final layer and in the
context of its last block.
"""

import re
from collections.abc import Collection
from functools import partial

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.image import taesd as taesd_module
from functional_sd3.layouts import rules
from functional_sd3.layouts.infer import Shapes, shape_of
from functional_sd3.layouts.rules import SWAP_HALVES, Layout, Rule, renamed, swap_halves

VERSION = 2
LAYOUT = Layout(renamed(("{*path}", "{*path}")))
VERSION_1 = Layout(
    (
        Rule("final.modulation.{leaf}", ("final.modulation.{leaf}",), SWAP_HALVES),
        Rule(
            "blocks.{i}.context.modulation.{leaf}",
            ("blocks.{i}.context.modulation.{leaf}",),
            SWAP_HALVES,
            unless="blocks.{i}.context.mlp.in.weight",
        ),
        *LAYOUT.rules,
    )
)
"""The transformer in files of version 1."""


def swapped_in_version_1(paths: Collection[str]) -> set[str]:
    """The leaves of transformers ("params.transformer.final.modulation.weight") whose halves version 1 has the other
    way round."""
    rests: dict[str, list[str]] = {}
    for path in paths:
        before, name, rest = path.partition("transformer.")
        if name:
            rests.setdefault(before + name, []).append(rest)
    return {
        before + rest
        for before, some in rests.items()
        for rest, source in rules.sources_of(VERSION_1, some).items()
        if source.transform is SWAP_HALVES
    }


def in_version_1(params: Params) -> Params:
    """The tree of a whole model ("transformer", ...) with its values in the order of version 1, which digests keep."""
    swapped = swapped_in_version_1(tree.flatten_paths(params))
    return tree.map_with_path(lambda path, leaf: swap_halves(leaf) if path in swapped else leaf, params)


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
    blocks = {
        match[1] for name in shapes if (match := re.fullmatch(rf"{half}\.levels\.(\d{{1,4}}\.blocks\.\d+)\..+", name))
    }
    for place in blocks:
        level = int(place.split(".")[0])
        counts[min(level, len(counts) - 1)] += 1
    return tuple(counts)
