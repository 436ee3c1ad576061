"""CLIP tokenizers on disk: vocab.json and merges.txt with two configs, or one tokenizer.json.

Flags and precedence are those of transformers 5: tokens listed in `added_tokens_decoder` bring their own, tokens that
are only named are matched in the raw text. Files are read whole or not at all.
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .bpe_check import (
    NAMED,
    Special,
    content_of,
    length_of,
    length_problems,
    merge_problems,
    pair,
    tokens_of,
    vocab_problems,
)

_LITERAL = r"<\|startoftext\|>"
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Files(NamedTuple):
    """What the files say, checked."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    specials: tuple[Special, ...]
    names: dict[str, str]  # bos_token, eos_token, unk_token, pad_token
    model_max_length: int
    keeps_literals: bool  # whether the words pattern holds the special tokens as literals, as transformers 5 has it
    several: tuple[tuple[str, ...], ...] = ()  # tokens that stand for themselves and others


SEVERAL = "several_vectors"
"""Our own key of a tokenizer_config.json, which transformers skips: lists of tokens that their first stands for."""


def read(source: Any, *, pad_token: str | None, model_max_length: int | None) -> Files:
    """Files of a folder, a tokenizer.json or a (vocab, merges) pair. ValueError names every problem found."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        label, (raw, problems) = str(path), _raw_folder(path) if path.is_dir() else _raw_json(path)
    elif isinstance(source, Sequence) and len(source) == 2:
        label, (raw, problems) = "(vocab, merges)", _raw_pair(*source)
    else:
        kind = type(source).__name__
        raise ValueError(f"source is a {kind}; a folder, a tokenizer.json or a (vocab, merges) pair is right")
    overrides = {"pad_token": pad_token, "model_max_length": model_max_length}
    config = {**raw.config, **{key: value for key, value in overrides.items() if value is not None}}
    in_vocab = vocab_problems(raw.vocab)
    vocab = None if in_vocab else raw.vocab
    tokens, in_tokens = tokens_of(vocab, config, raw.added)
    problems = [*problems, *in_vocab, *merge_problems(vocab, raw.merges), *in_tokens, *length_problems(config)]
    problems += several_problems(config, tokens)
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise ValueError(f"{label} is not a CLIP byte-pair tokenizer: {shown}")
    return Files(
        vocab=dict(raw.vocab),
        merges=[pair(merge) for merge in raw.merges],
        specials=tuple(sorted(tokens.values())),
        names={name: content_of(config.get(name) or default) for name, default in NAMED.items()},
        model_max_length=length_of(config),
        keeps_literals=raw.keeps_literals,
        several=tuple(map(tuple, config.get(SEVERAL) or ())),
    )


def several_problems(config: Mapping[str, Any], tokens: Collection[str]) -> list[str]:
    """Whether what stands for several tokens is a list of lists of tokens that are there."""
    found = config.get(SEVERAL) or []
    if not isinstance(found, list) or not all(isinstance(names, list) and names for names in found):
        return [f"{SEVERAL} is {found!r}, not a list of lists of tokens"]
    unknown = [name for names in found for name in names if name not in tokens]
    return [f"{SEVERAL} names {unknown[0]!r}, which is no added token"] if unknown else []


class _Raw(NamedTuple):
    """What the files say, unchecked; None where a file could not be read, which is a problem told already."""

    vocab: Any
    merges: Any
    config: dict[str, Any]
    added: dict[str, Any]
    keeps_literals: bool


def _raw_folder(folder: Path) -> tuple[_Raw, list[str]]:
    if not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists():
        raw, problems = _raw_json(folder / "tokenizer.json")
    else:
        raw, problems = _raw_pair(folder / "vocab.json", folder / "merges.txt")
    config, more = _optional_json(folder / "tokenizer_config.json")
    problems, config, added = [*problems, *more], {**raw.config, **config}, raw.added
    if "added_tokens_decoder" not in config:  # older folders keep the same facts in two files of their own
        named, more = _optional_json(folder / "special_tokens_map.json")
        added, still_more = _optional_json(folder / "added_tokens.json")
        # transformers forgets that these are special where added_tokens.json lists them too
        extra = [token for token in named.pop("additional_special_tokens", []) if content_of(token) not in added]
        config = {**config, **named, **({"additional_special_tokens": extra} if extra else {})}
        problems = [*problems, *more, *still_more]
    return raw._replace(config=config, added=added, keeps_literals=True), problems


def _raw_pair(vocab: Any, merges: Any) -> tuple[_Raw, list[str]]:
    problems: list[str] = []
    if isinstance(vocab, str | os.PathLike):
        vocab, problems = _json(Path(vocab))
    if isinstance(merges, str | os.PathLike):
        path, merges = Path(merges), None
        try:
            # not splitlines(): tokens may hold characters that it takes for the end of a line
            lines = [line.rstrip("\r") for line in path.read_text(encoding="utf-8").split("\n")]
            merges = [line for line in lines if line and not line.startswith("#version")]
        except (OSError, UnicodeDecodeError) as error:
            problems = [*problems, f"{path}: {error}"]
    return _Raw(vocab, merges, {}, {}, True), problems


def _raw_json(path: Path) -> tuple[_Raw, list[str]]:
    content, problems = _json(path)
    if content is None:
        return _Raw(None, None, {}, {}, False), problems
    model, ends = _object(content, "model"), _object(content, "post_processor")
    if (model.get("type", "BPE"), model.get("end_of_word_suffix")) != ("BPE", "</w>"):
        kind = f"{model.get('type')!r} with end_of_word_suffix {model.get('end_of_word_suffix')!r}"
        problems = [*problems, f"{path}: the model is {kind}, not 'BPE' with '</w>'"]
    pattern = json.dumps(content.get("pre_tokenizer"))
    if json.dumps(_PATTERN)[1:-1] not in pattern:
        problems = [*problems, f"{path}: pre_tokenizer does not split by CLIP's pattern"]
    added = [token for token in content.get("added_tokens") or [] if isinstance(token, dict)]
    config = {
        "added_tokens_decoder": {str(token.get("id")): token for token in added},
        "bos_token": (ends.get("cls") or [None])[0],
        "eos_token": (ends.get("sep") or [None])[0],
        "unk_token": model.get("unk_token"),
        "pad_token": _object(content, "padding").get("pad_token"),
        "model_max_length": _object(content, "truncation").get("max_length"),
    }
    literals = json.dumps(_LITERAL)[1:-1] in pattern
    return _Raw(model.get("vocab", {}), model.get("merges", []), config, {}, literals), problems


def _object(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _json(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return None, [f"{path}: {error}"]
    if not isinstance(content, dict):
        return None, [f"{path}: holds a {type(content).__name__}, not an object"]
    return content, []


def _optional_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    content, problems = _json(path) if path.exists() else ({}, [])
    return content or {}, problems


def write(folder: str | os.PathLike[str], files: Files) -> None:
    """The four files of a diffusers tokenizer folder, each put in place only when it is whole on disk."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {special.content: _flags(special) for special in files.specials}
    decoder = {str(s.id): {**_flags(s), "special": s.special} for s in sorted(files.specials, key=lambda s: s.id)}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        **files.names,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": files.model_max_length,
        "tokenizer_class": "CLIPTokenizer",
        **({SEVERAL: [list(names) for names in files.several]} if files.several else {}),
    }
    named = {name: tokens[content] for name, content in files.names.items()}
    _write(folder / "vocab.json", _dumps(files.vocab))
    _write(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in files.merges))
    _write(folder / "tokenizer_config.json", _dumps(config))
    _write(folder / "special_tokens_map.json", _dumps(named))


def _flags(token: Special) -> dict[str, Any]:
    stripping = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": token.content, "normalized": token.normalized, **stripping}


def _dumps(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
