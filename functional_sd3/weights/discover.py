"""Identify the files at a path by their content: pipelines, folders of one component, single files, shards, tokenizers.

Only headers and small files are read here; tensors are mapped.
"""

import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from functional_sd3.formats import atomic, files, json_fields, magic, pickles, shards
from functional_sd3.formats.errors import WeightsError, attempt, reason
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.tensors import open_tensors
from functional_sd3.layouts import diffusers_folder, registry, taesd
from functional_sd3.text import bpe, unigram
from functional_sd3.text.token_fields import FILE_LIMIT
from functional_sd3.weights import base_folder, diffusers, metadata, nested, shipped
from functional_sd3.weights.read import ComponentFiles, Discovered

NATIVE_FOLDER = "parameters"
STABILITY_FILES = {
    "sd3.safetensors": ("transformer", "vae"),
    "clip_l.safetensors": ("clip_l",),
    "clip_g.safetensors": ("clip_g",),
    "t5xxl.safetensors": ("t5",),
    "taesd3.safetensors": ("taesd",),
}
"""The files of a `models/` folder, as Stability's reference and ComfyUI look for them, and what `save` puts in each."""
_MAX_LISTED = 5
OWNED = {
    "diffusers": diffusers_folder.OWNED,
    "stability": (*diffusers_folder.OWNED, NATIVE_FOLDER, *STABILITY_FILES),
    "native": (*diffusers_folder.OWNED, NATIVE_FOLDER),
}
"""Layout -> the entries of a folder that are of the old model when one is saved there; all others stay.

Files that would be read before the new model must be deleted, files of others (a user's `clip_l.safetensors`) not."""
_KINDS = {
    "SD3Transformer2DModel": "transformer",
    "AutoencoderKL": "vae",
    "AutoencoderTiny": "taesd",
    "CLIPTextModelWithProjection": "clip",
    "CLIPTextModel": "clip",
    "clip_text_model": "clip",
    "T5EncoderModel": "t5",
    "t5": "t5",
}
"""Class or model type in a config.json -> the component."""


def open_path(path: Path, only: Collection[str], variant: str | None) -> Discovered:
    """The contents of a path. Raises WeightsError where it is absent or holds nothing that is known."""
    path = shipped.resolve(path)
    try:
        kind = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        cause = reason(error) if isinstance(error, OSError) else str(error)
        raise WeightsError(f"{path}: cannot be opened: {cause}") from error
    if not stat.S_ISDIR(kind):
        return _file(path)
    return atomic.read_stable(path, lambda folder: _folder(path, folder, only, variant), OWNED["stability"])


def _folder(named: Path, folder: Path, only: Collection[str], variant: str | None) -> Discovered:
    try:
        names = {entry.name for entry in os.scandir(folder)}
    except OSError as error:
        raise WeightsError(f"{named}: cannot be opened: {reason(error)}") from error
    inner = [folder / name for name in sorted(names & set(nested.MODEL_FOLDERS))]
    return _entire(named, folder, names, only, variant) or _loose(named, folder, names, only, inner, variant)


def _entire(
    named: Path, folder: Path, names: Collection[str], only: Collection[str], variant: str | None
) -> Discovered | None:
    """Contents of a folder that is a model, a component or a tokenizer as a whole; None for any other."""
    if diffusers_folder.INDEX in names:
        return base_folder.open_folder(named, folder, only, variant)
    if "config.json" in names:
        return _component(folder, variant)
    return Discovered([], _tokenizer(folder, names)) if nested.TOKENIZER & set(names) else None


def _component(folder: Path, variant: str | None) -> Discovered:
    path = folder / "config.json"
    values = files.read_json(path)
    architectures = values.get("architectures")
    claims = [values.get("_class_name"), *(architectures if isinstance(architectures, list) else ())]
    claims.append(values.get("model_type"))
    name = next((_KINDS[claim] for claim in claims if isinstance(claim, str) and claim in _KINDS), None)
    names = {entry.name for entry in os.scandir(folder)}
    has_weights = any(entry.endswith((".safetensors", ".index.json")) for entry in names)
    if names & nested.TOKENIZER and (name is None or not has_weights):
        # A whole CLIPModel or T5, of which the tokenizer is what SD3 uses.
        return Discovered([], _tokenizer(folder, names))
    if name is None:
        claimed = next((claim for claim in claims if claim), None)
        if claimed == "SD3ControlNetModel":
            raise registry.ForeignWeights(
                f"{path.parent}: is a ControlNet, which weights.load_controlnet reads (--controlnet)"
            )
        raise registry.ForeignWeights(f"{path}: describes {claimed!r}; known are {', '.join(_KINDS)}")
    folders = {**diffusers_folder.COMPONENTS, "taesd": diffusers_folder.TAESD}
    piece, _ = diffusers.open_component(name, folders["clip_l" if name == "clip" else name], folder, variant)
    return Discovered([piece], {})


def _inner_contents(
    inner: Collection[Path], only: Collection[str], variant: str | None, problems: list[str], passed: list[str]
) -> list[Discovered]:
    """Contents of the subfolders of a `models/` folder. passed: files of no part of SD3 are added to it."""
    contents: list[Discovered] = []
    tokenizers: dict[str, tuple[Path, Any]] = {}
    for folder, names in attempt(problems, nested.folders, inner, passed) or ():
        try:
            whole = _entire(folder, folder, names, only, variant)
            contents.append(whole or _loose(folder, folder, names, (), None, variant))
        except registry.ForeignWeights as error:
            passed.extend(error.problems)
            continue
        except WeightsError as error:
            problems.extend(error.problems)
            continue
        for name, tables in contents[-1].tokenizers.items():
            first, others = tokenizers.setdefault(name, (folder, tables))
            if others != tables:
                problems.append(f"a tokenizer of {name} is in {first} and another in {folder}: give one by its path")
    return contents


def _loose(
    named: Path,
    folder: Path,
    names: Collection[str],
    only: Collection[str],
    inner: Collection[Path] | None,
    variant: str | None,
) -> Discovered:
    """Contents of a folder of separate files, such as those of Stability and of ComfyUI, and of the folders in it.

    inner: the folders in it that hold such files, models or components too; None for one of these, in which files that
    are no part of SD3 are passed over.
    """
    problems: list[str] = []
    passed: list[str] = []
    own = _of_variant(names, variant)
    contents: list[Discovered] = []
    shard_names: set[str] = set()
    native = NATIVE_FOLDER in names
    for name in sorted(own if not native else ()):
        if ".safetensors.index." in name and name.endswith(".json"):
            tensors = attempt(problems, shards.open_indexed, folder / name)
            if tensors is not None:
                shard_names |= {mapped.path.name for mapped in tensors.values()}
                indexed = attempt(problems, _contents, str(folder / name), tensors)
                contents += [] if indexed is None else [indexed]
    states: list[str] = []
    for name in sorted(own - shard_names if not native else ()):
        if name.lower().endswith(nested.WEIGHTS):
            try:
                contents.append(_file(folder / name))
            except registry.TrainingState as error:
                states.extend(error.problems)
            except registry.ForeignWeights as error:
                (passed if inner is None else problems).extend(error.problems)
            except WeightsError as error:
                problems.extend(error.problems)
    # One sentence for all checkpoints of a run: that of the newest, whose name is the last.
    (passed if inner is None else problems).extend(states[-1:])
    if inner and not native:
        contents += _inner_contents(inner, only, variant, problems, passed)
    if native:
        weights = attempt(problems, shards.open_weights, folder / NATIVE_FOLDER, NATIVE_FOLDER, None, False)
        if weights:
            saved = attempt(problems, _contents, str(folder / NATIVE_FOLDER), weights.tensors)
            contents += [] if saved is None else [saved]
    tokenizers = {
        name: attempt(problems, diffusers.read_tokenizer, folder / tokenizer.folder, tokenizer)
        for name, tokenizer in diffusers_folder.TOKENIZERS.items()
        if tokenizer.folder in names and name in only
    }
    if not any(part.pieces or part.tokenizers or part.problems for part in contents) and not (tokenizers or problems):
        if inner is None:
            return merged(contents)._replace(passed=tuple(passed))
        passed += [sentence for part in contents for sentence in part.passed]
        raise WeightsError(
            f"{named}: holds no weights that are known: no {diffusers_folder.INDEX}, no config.json "
            "and no safetensors or GGUF file" + _listed(passed)
        )
    whole = merged(contents)
    return whole._replace(
        tokenizers={**whole.tokenizers, **{name: tables for name, tables in tokenizers.items() if tables}},
        problems=(*problems, *whole.problems),
        passed=(*passed, *whole.passed),
    )


def _of_variant(names: Collection[str], variant: str | None) -> set[str]:
    """The names without those of plain files beside which there are files of the variant."""
    middles = (f".{variant}.", f".{variant}-")
    plain = {name.replace(middle, middle[-1], 1) for middle in middles for name in names if variant and middle in name}
    return set(names) - plain


def _listed(passed: Collection[str]) -> str:
    return f"; passed over: {'; '.join(list(passed)[:_MAX_LISTED])}" if passed else ""


def merged(parts: Collection[Discovered]) -> Discovered:
    """Several contents as one; of schedules and tokenizers the first counts."""
    schedule = next((part.schedule for part in parts if part.schedule is not None), None)
    tokenizers: dict[str, Any] = {}
    for part in parts:
        tokenizers = {**part.tokenizers, **tokenizers}
    return Discovered(
        [piece for part in parts for piece in part.pieces],
        tokenizers,
        schedule,
        any(part.has_schedule for part in parts),
        tuple(problem for part in parts for problem in part.problems),
        tuple(sentence for part in parts for sentence in part.passed),
    )


def _tokenizer(folder: Path, names: Collection[str]) -> dict[str, Any]:
    module = unigram if "spiece.model" in names or _is_unigram(folder, names) else bpe
    tables = diffusers.read_tokenizer(folder, diffusers_folder.TOKENIZERS["t5" if module is unigram else "clip_l"])
    # The two of CLIP differ in what they pad with: G has the token 0.
    return {"t5" if module is unigram else "clip_g" if tables.pad_id == 0 else "clip_l": tables}


def _is_unigram(folder: Path, names: Collection[str]) -> bool:
    """True for a tokenizer.json alone that holds a Unigram model: transformers 5 saves T5's tokenizer so."""
    if "vocab.json" in names or unigram.files.JSON not in names:
        return False
    try:
        content = json_fields.read(folder / unigram.files.JSON, limit=FILE_LIMIT)
        return content.mapping("model").text("type", "") == "Unigram"
    except ValueError:  # The reader of byte pairs names what is wrong with it.
        return False


def _file(path: Path) -> Discovered:
    start = files.start(path)
    if start.startswith(magic.ZIP) and start[8:9] != b"{":
        return _pickled(path)
    return _contents(str(path), open_tensors(path))


def _pickled(path: Path) -> Discovered:
    mapped = pickles.open_pickle(path)
    tiny = [format for format in registry.FORMATS if format.component == "taesd"]
    if not any(format.has(name) for format in tiny for name in mapped.header.tensors):
        raise WeightsError(f"{path}: {magic.HOW_TO_CONVERT}")
    return _contents(str(path), dict.fromkeys(mapped.header.tensors, mapped))


def _contents(where: str, tensors: Mapping[str, Mapped]) -> Discovered:
    """The components among the tensors of one file, or of its shards."""
    try:
        formats = registry.recognise(tensors)
    except WeightsError as error:
        raise type(error)([f"{where}: {problem}" for problem in error.problems]) from None
    notes = metadata.shared(tensors.values(), where)
    configs = metadata.read(notes, where)
    pieces = []
    for format, names in formats.items():
        places = {name: tensors[name] for name in names}
        if format is registry.TAESD_HALF:
            format, places = registry.TAESD_WHOLE, _half(places)
        elif format in registry.NATIVE.values() and not metadata.is_unsaid(notes):
            is_old = metadata.version(notes, where) == 1 and format.component == "transformer"
            format = registry.NATIVE_1 if is_old else format
        # Two CLIPs in stand-alone files have one format; their metadata distinguish L from G.
        known = [
            name
            for name in configs or ()
            if name == format.component or (name in registry.CLIPS and format.component == "clip")
        ]
        name = known[0] if len(known) == 1 else format.component
        pieces.append(ComponentFiles(name, format, where, places, (configs or {}).get(name)))
    return Discovered(pieces, {}, (configs or {}).get("schedule"), configs is not None)


def _half(places: Mapping[str, Mapped]) -> dict[str, Mapped]:
    """One of the author's two files of TAESD under the names that files of both halves have."""
    shapes = {name: mapped.header.tensors[name].shape for name, mapped in places.items()}
    naming = taesd.ORIGINAL
    prefix = naming.encoder if taesd.is_encoder(shapes) else naming.decoder
    path, header, buffer = next(iter(places.values()))
    renamed = Mapped(path, header._replace(tensors={prefix + n: e for n, e in header.tensors.items()}), buffer)
    return dict.fromkeys(renamed.header.tensors, renamed)
