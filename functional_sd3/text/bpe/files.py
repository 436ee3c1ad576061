"""CLIP tokenizers on disk: vocab.json and merges.txt with two configs, or one tokenizer.json.

Flags and precedence are those of transformers 5: tokens listed in `added_tokens_decoder` bring their own, tokens that
are only named are matched in the raw text. Files are read whole or not at all.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from functional_sd3.formats import bounded, json_fields
from functional_sd3.formats.errors import WeightsError, attempt
from functional_sd3.formats.files import write_atomic
from functional_sd3.formats.json_fields import Object
from functional_sd3.formats.printable import shorten
from functional_sd3.text.bpe.check import NAMED, Special, length_of, merge_problems, pair, tokens_of, vocab_problems
from functional_sd3.text.token_fields import FILE_LIMIT, HIGHEST_ID, MAX_ADDED, MULTI_TOKEN, multi_token, token

_LITERAL = r"<\|startoftext\|>"
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Files(NamedTuple):
    """Checked contents of the files."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    specials: tuple[Special, ...]
    names: dict[str, str]  # bos_token, eos_token, unk_token, pad_token
    model_max_length: int
    keeps_literals: bool  # True if the pattern of words has the special tokens as literals, as in transformers 5
    multi_token: tuple[tuple[str, ...], ...] = ()  # tokens that are replaced by themselves and others


def read(source: Any, *, pad_token: str | None, model_max_length: int | None) -> Files:
    """Files of a folder, a tokenizer.json or a (vocab, merges) pair.

    Raises WeightsError, a ValueError, with every problem in the files.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        label, (raw, problems) = str(path), _raw_folder(path) if path.is_dir() else _raw_json(path)
    elif isinstance(source, Sequence) and len(source) == 2:
        label, (raw, problems) = "(vocab, merges)", _raw_pair(*source)
    else:
        kind = type(source).__name__
        raise ValueError(f"source is a {kind}; a folder, a tokenizer.json or a (vocab, merges) pair is right")
    overrides = {"pad_token": pad_token, "model_max_length": model_max_length}
    values = {**raw.config, **{key: value for key, value in overrides.items() if value is not None}}
    config = Object(values, raw.where)
    in_vocab = vocab_problems(raw.vocab)
    vocab = None if in_vocab else raw.vocab
    tokens, in_tokens = tokens_of(vocab, config, raw.added)
    problems = [*problems, *in_vocab, *merge_problems(vocab, raw.merges), *in_tokens]
    length = attempt(problems, length_of, config)
    groups = attempt(problems, multi_token, config, tokens)
    if problems or length is None or groups is None:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise WeightsError(f"{label}: is not a CLIP byte-pair tokenizer: {shown}")
    return Files(
        vocab=dict(raw.vocab),
        merges=[(first, second) for first, second in map(pair, raw.merges)],
        specials=tuple(sorted(tokens.values())),
        names={name: token(config, name, default) or default for name, default in NAMED.items()},
        model_max_length=length,
        keeps_literals=raw.keeps_literals,
        multi_token=tuple(map(tuple, groups)),
    )


class _Raw(NamedTuple):
    """Unchecked contents of the files; None where a file could not be read, which is already a problem."""

    vocab: Any
    merges: Any
    config: dict[str, Any]
    added: dict[str, Any]
    keeps_literals: bool
    where: str


def _raw_folder(folder: Path) -> tuple[_Raw, list[str]]:
    if not os.path.lexists(folder / "vocab.json") and os.path.lexists(folder / "tokenizer.json"):
        raw, problems = _raw_json(folder / "tokenizer.json")
    else:
        raw, problems = _raw_pair(folder / "vocab.json", folder / "merges.txt")
    config, added = {**raw.config, **_optional_json(folder / "tokenizer_config.json", problems)}, raw.added
    if "added_tokens_decoder" not in config:  # older folders keep the same facts in two files of their own
        named = dict(_optional_json(folder / "special_tokens_map.json", problems))
        added = dict(_optional_json(folder / "added_tokens.json", problems))
        extra = named.pop("additional_special_tokens", None)
        if isinstance(extra, list):
            # transformers forgets that these are special where added_tokens.json lists them too
            extra = [token for token in extra if not _is_listed(token, added)]
        config = {**config, **named, **({"additional_special_tokens": extra} if extra else {})}
    where = str(folder / "tokenizer_config.json")
    return raw._replace(config=config, added=added, keeps_literals=True, where=where), problems


def _is_listed(token: Any, added: Mapping[str, Any]) -> bool:
    content = token.get("content") if isinstance(token, dict) else token
    return isinstance(content, str) and content in added


def _raw_pair(vocab: Any, merges: Any) -> tuple[_Raw, list[str]]:
    problems: list[str] = []
    if isinstance(vocab, str | os.PathLike):
        content = attempt(problems, json_fields.read, vocab, limit=FILE_LIMIT)
        vocab = None if content is None else content.values
    if isinstance(merges, str | os.PathLike):
        text = attempt(problems, bounded.read_text, merges, FILE_LIMIT)
        # not splitlines(): tokens may hold characters that it takes for the end of a line
        lines = None if text is None else [line.rstrip("\r") for line in text.split("\n")]
        merges = None if lines is None else [line for line in lines if line and not line.startswith("#version")]
    return _Raw(vocab, merges, {}, {}, True, "(vocab, merges)"), problems


def _raw_json(path: Path) -> tuple[_Raw, list[str]]:
    problems: list[str] = []
    raw = attempt(problems, _read_tokenizer_json, path, problems)
    return raw or _Raw(None, None, {}, {}, False, str(path)), problems


def _read_tokenizer_json(path: Path, problems: list[str]) -> _Raw:
    content = json_fields.read(path, limit=FILE_LIMIT)
    model, ends = content.mapping("model", {}), content.mapping("post_processor", {})
    kind, suffix = model.text("type", "BPE"), model.text("end_of_word_suffix", None)
    if (kind, suffix) != ("BPE", "</w>"):
        described = f"{shorten(repr(kind))} with end_of_word_suffix {shorten(repr(suffix))}"
        problems.append(f"{path}: the model is {described}, not 'BPE' with '</w>'")
    pattern = json.dumps(content.values.get("pre_tokenizer"))
    if json.dumps(_PATTERN)[1:-1] not in pattern:
        problems.append(f"{path}: pre_tokenizer does not split by CLIP's pattern")
    added = content.mappings("added_tokens", (), most=MAX_ADDED)
    config = {
        "added_tokens_decoder": {str(token.integer("id", low=0, high=HIGHEST_ID)): token.values for token in added},
        "bos_token": next(iter(ends.items("cls", ())), None),
        "eos_token": next(iter(ends.items("sep", ())), None),
        "unk_token": model.text("unk_token", None),
        "pad_token": content.mapping("padding", {}).text("pad_token", None),
        "model_max_length": content.mapping("truncation", {}).number("max_length", None),
    }
    vocab, merges = model.mapping("vocab", {}).values, model.items("merges", [])
    return _Raw(vocab, merges, config, {}, json.dumps(_LITERAL)[1:-1] in pattern, str(path))


def _optional_json(path: Path, problems: list[str]) -> Mapping[str, Any]:
    content = attempt(problems, json_fields.read, path, limit=FILE_LIMIT) if os.path.lexists(path) else None
    return {} if content is None else content.values


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
        **({MULTI_TOKEN: [list(names) for names in files.multi_token]} if files.multi_token else {}),
    }
    named = {name: tokens[content] for name, content in files.names.items()}
    write_atomic(folder / "vocab.json", _dumps(files.vocab).encode())
    merges = "".join(f"{a} {b}\n" for a, b in files.merges)
    write_atomic(folder / "merges.txt", f"#version: 0.2\n{merges}".encode())
    write_atomic(folder / "tokenizer_config.json", _dumps(config).encode())
    write_atomic(folder / "special_tokens_map.json", _dumps(named).encode())


def _flags(token: Special) -> dict[str, Any]:
    stripping = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": token.content, "normalized": token.normalized, **stripping}


def _dumps(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
