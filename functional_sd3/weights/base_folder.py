"""Folders that hold a part of a model and refer to the folder of the rest: a few-step transformer, to its teacher's.

`model_index.json` of such a folder has the key `_base_model`: the path of the other model's folder, relative to this
one. Components, tokenizers and the scheduler that this folder lacks are read there. diffusers passes over keys with
an underscore and finds the folder without those components.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from functional_sd3.formats import atomic, files
from functional_sd3.formats.errors import WeightsError
from functional_sd3.layouts import diffusers_folder
from functional_sd3.weights import diffusers
from functional_sd3.weights.model import Tokenizers
from functional_sd3.weights.read import Discovered

KEY = diffusers.BASE
_OPTIONAL = {"taesd"}
_HOW = "put that model's folder there, or name its place in the index"


def open_folder(named: Path, folder: Path, only: Collection[str], variant: str | None) -> Discovered:
    """Contents of a model's folder, and of the one that it refers to where something of `only` is not in the first.

    named: the folder as it was given, to which the reference is relative; folder: where its content is. Problems are
    collected, not raised.
    """
    opened = diffusers.open_folder(folder, only, variant)
    own = opened.contents
    base = reference(files.read_json(folder / diffusers_folder.INDEX), named)
    if base is None:
        return opened.checked(folder, variant)
    here = {piece.component for piece in own.pieces}
    lacking = {name for name in only if name not in here}
    without_tokenizer = {name for name in Tokenizers._fields if name in only and name not in own.tokenizers}
    if not lacking | without_tokenizer:
        return opened.checked(folder, variant)
    place = place_of(named, base)
    what = f"{named / diffusers_folder.INDEX}: {KEY} is {base!r}"
    if not os.path.lexists(atomic.current(place) / diffusers_folder.INDEX):
        # A whole model needs no other: most have none of what is optional.
        if not (lacking - _OPTIONAL or without_tokenizer or _OPTIONAL.issuperset(only)):
            return opened.checked(folder, variant)
        problem = (
            f"{what}, but {place} is no model folder, with {', '.join(sorted(lacking | without_tokenizer))}: {_HOW}"
        )
        return own._replace(problems=(*own.problems, problem))
    others, further = atomic.read_stable(
        place,
        lambda content: (
            diffusers.open_folder(content, lacking | without_tokenizer, variant),
            reference(files.read_json(content / diffusers_folder.INDEX), place),
        ),
        diffusers_folder.OWNED,
    )
    # One of the two has the variant, whose other components are then of none.
    lacks = [opened.lacks_variant or not own.pieces, others.lacks_variant or not others.contents.pieces]
    if variant and all(lacks):
        own = opened._replace(lacks_variant=True).checked(folder, variant)
    rest = others.contents
    problems = (*own.problems, *rest.problems)
    if further is not None:
        problems += (f"{what}, which refers to yet another, {further!r}: what is lacking must be in one folder",)
    return own._replace(
        pieces=[*own.pieces, *(piece for piece in rest.pieces if piece.component in lacking)],
        tokenizers={**rest.tokenizers, **own.tokenizers},
        schedule=rest.schedule if own.schedule is None else own.schedule,
        problems=problems,
    )


def reference(index: Mapping[str, Any], named: Path) -> str | None:
    """The reference in an index; None where there is none. Raises WeightsError for what is no relative path."""
    if KEY not in index:
        return None
    value = index[KEY]
    if problem := invalid(value):
        raise WeightsError(f"{named / diffusers_folder.INDEX}: {KEY} {problem}")
    return value


def invalid(value: Any) -> str | None:
    """Sentence on what is wrong with a reference, None if nothing is."""
    if not isinstance(value, str) or not value or "\0" in value:
        return f"{value!r} must be the path of a model's folder, relative to this one"
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive or "\\" in value:
        return f"{value!r} must be relative to this folder, with / between names, such as '../tiny'"
    return None


def place_of(named: Path, base: str) -> Path:
    """The folder that a reference from `named` leads to, without ".." where no link lies between."""
    place = named / base
    plain = Path(os.path.normpath(place))
    return plain if os.path.realpath(plain) == os.path.realpath(place) else place
