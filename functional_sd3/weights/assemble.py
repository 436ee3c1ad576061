"""One model from the contents of one path or of several."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from functional_sd3.flow import schedule
from functional_sd3.formats import default_dtype, trees
from functional_sd3.formats.default_dtype import Dtype
from functional_sd3.formats.errors import WeightsError, attempt
from functional_sd3.formats.notes import note
from functional_sd3.layouts import native, registry, taesd
from functional_sd3.layouts.components import SPECS, Config
from functional_sd3.text import unigram
from functional_sd3.weights import discover, metadata, read
from functional_sd3.weights.model import Model, Tokenizers
from functional_sd3.weights.read import ComponentFiles, Discovered, LoadPlan

_MAX_SHOWN = 5


def load(
    paths: Sequence[Path],
    *,
    dtype: Dtype,
    device: torch.device | str,
    only: Collection[str],
    variant: str | None,
    finite: bool,
    quantized: bool,
) -> Model:
    """The model of `weights.load`; see there for the arguments."""
    contents, plans = plan(paths, only, variant)
    if default_dtype.is_default(dtype):
        default_dtype.say(dtype, [trees.kinds(one.tree, quantized) for one in plans.values()], device)
    params = {
        name: trees.read(plans[name].tree, dtype=dtype, device=device, finite=finite, quantized=quantized)
        for name in SPECS
        if name in plans
    }
    return _outlined(contents, plans, only)._replace(params=params)


def outline(paths: Sequence[Path], *, only: Collection[str], variant: str | None) -> Model:
    """The model of `weights.outline`; see there for the arguments."""
    return _outlined(*plan(paths, only, variant), only)


def _outlined(contents: Discovered, plans: Mapping[str, LoadPlan], only: Collection[str]) -> Model:
    levels = contents.schedule
    if levels is None and not contents.has_schedule and "transformer" in plans:
        # Files of tensors alone have no config; all released models were trained with this one.
        levels = schedule.Config()
    config = Config(**{name: one.config for name, one in plans.items()}, schedule=levels)
    tokenizers = {name: tables for name, tables in contents.tokenizers.items() if name in only}
    return Model({}, config, Tokenizers(**tokenizers))


def plan(paths: Sequence[Path], only: Collection[str], variant: str | None) -> tuple[Discovered, dict[str, LoadPlan]]:
    """The contents of the paths, and a checked plan for each component. Raises one WeightsError with every problem."""
    problems: list[str] = []
    parts = [attempt(problems, discover.open_path, path, only, variant) for path in paths]
    contents = discover.merged([part for part in parts if part is not None])
    problems += contents.problems
    if contents.passed:
        shown, more = contents.passed[:_MAX_SHOWN], len(contents.passed) - _MAX_SHOWN
        note(f"passed over: {'; '.join(shown)}" + (f"; and {more} more" if more > 0 else ""))
    pieces = [piece for piece in _joined_halves(contents.pieces) if _is_chosen(piece.component, only)]
    planned = [attempt(problems, read.plan, piece) for piece in pieces]
    named = _with_clips_named([one for one in planned if one is not None])
    problems += _duplicated(named)
    problems += _ids_beyond_embeddings(named, contents.tokenizers)
    if problems:
        raise WeightsError(problems)
    _note_unsaid_versions(named)
    return contents, {one.component: one for one in named if one.component in only}


def _note_unsaid_versions(plans: Sequence[LoadPlan]) -> None:
    """Two versions of a transformer under our own names differ in nothing but the order of some rows."""
    for one in plans:
        files = one.tree.places.values()
        if one.format is registry.NATIVE["transformer"] and all(metadata.is_unsaid(m.header.metadata) for m in files):
            note(
                f"{one.tree.where} does not say the version of its names; its modulations are read as written now, in "
                f"version {native.VERSION}, shift before scale"
            )


def _ids_beyond_embeddings(plans: Sequence[LoadPlan], tokenizers: Mapping[str, Any]) -> list[str]:
    """Tokenizers with ids for which the encoder has no row: some prompts would end in an IndexError."""
    rows = {one.component: one.config.vocab for one in plans if one.component in Tokenizers._fields}
    largest = {name: _largest_id(tables) for name, tables in tokenizers.items()}
    return [
        f"the tokenizer of {name} has ids up to {largest[name]}, but {name} has embeddings of {count} tokens: "
        "it is another model's tokenizer"
        for name, count in rows.items()
        if largest.get(name, 0) >= count
    ]


def _largest_id(tables: Any) -> int:
    if isinstance(tables, unigram.Tables):
        return max((len(tables.pieces) - 1, *(token.id for token in tables.added)))
    own = (tables.bos_id, tables.eos_id, tables.unk_id, tables.pad_id)
    return max((*tables.vocab.values(), *own))


def _is_chosen(component: str, only: Collection[str]) -> bool:
    return bool(set(registry.CLIPS) & set(only)) if component == "clip" else component in only


def _joined_halves(pieces: Sequence[ComponentFiles]) -> list[ComponentFiles]:
    """The pieces, with an encoder and a decoder of TAESD that come in files of their own as one."""
    halves: dict[bool, ComponentFiles] = {}
    for piece in pieces:
        if piece.format is registry.TAESD_WHOLE:
            starts = {name.startswith(taesd.ORIGINAL.encoder) for name in piece.places}
            if len(starts) == 1:
                halves.setdefault(starts.pop(), piece)
    if len(halves) < 2:
        return list(pieces)
    encoder, decoder = halves[True], halves[False]
    joined = encoder._replace(where=f"{encoder.where} and {decoder.where}", places={**encoder.places, **decoder.places})
    return [piece for piece in pieces if piece is not encoder and piece is not decoder] + [joined]


def _with_clips_named(plans: Sequence[LoadPlan]) -> list[LoadPlan]:
    """The plans, with those of a CLIP that may be either named L or G."""
    open_ones = [one for one in plans if one.component == "clip"]
    taken = {one.component for one in plans}
    if len(open_ones) == 1:
        other = {"clip_l": "clip_g", "clip_g": "clip_l"}
        guess = _guess(open_ones[0])
        names = [other[guess] if guess in taken and other[guess] not in taken else guess]
    else:
        names = [_guess(one) for one in open_ones]
        if len(names) == 2 and names[0] == names[1]:
            # G is the larger; of two alike, L comes first as it does everywhere.
            sizes = [(one.config.width, one.config.layers) for one in open_ones]
            names = ["clip_g", "clip_l"] if sizes[0] > sizes[1] else ["clip_l", "clip_g"]
    chosen = dict(zip(map(id, open_ones), names, strict=True))
    return [_as(chosen[id(one)], one) if id(one) in chosen else one for one in plans]


def _guess(one: LoadPlan) -> str:
    if one.has_config:
        return "clip_g" if one.config.activation == "gelu" else "clip_l"
    return registry.clip_named(one.config)


def _as(name: str, one: LoadPlan) -> LoadPlan:
    return one._replace(component=name, config=one.config if one.has_config else registry.activated(name, one.config))


def _duplicated(plans: Sequence[LoadPlan]) -> list[str]:
    places: dict[str, list[str]] = {}
    for one in plans:
        places.setdefault(one.component, []).append(one.tree.where)
    return [f"{name} is in {' and in '.join(at)}: give it once" for name, at in places.items() if len(at) > 1]
