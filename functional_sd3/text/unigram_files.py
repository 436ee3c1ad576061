"""A T5 tokenizer on disk: `tokenizer.json`, or sentencepiece's `spiece.model`, and what transformers keeps beside them.

A file that asks for something this tokenizer does not do is refused by name; nothing of it is ignored silently.
"""

import base64
import binascii
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from functional_sd3.text import sentencepiece_file
from functional_sd3.text.bpe_files import SEVERAL, several_problems
from functional_sd3.text.sentencepiece_file import Piece, SentencePieceModel
from functional_sd3.text.unigram_tables import SPACE, UNBOUNDED, AddedToken, Spacing, Tables, build

_JSON, _MODEL, _CONFIG, _MAP = "tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json"
_NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def init(source: str | os.PathLike) -> Tables:
    """Tables of the tokenizer in a folder, a `tokenizer.json` or a `spiece.model`.

    In a folder `tokenizer.json` is preferred, and `tokenizer_config.json` tells the longest length and the names of the
    special tokens. A sentencepiece model gets T5's sentinels (100, or the config's `extra_ids`) behind its pieces, as
    transformers adds them. Raises ValueError naming the path and every problem found.
    """
    path = Path(source)
    try:
        config: Mapping[str, Any] = {}
        if path.is_dir():
            files = [path / name for name in (_JSON, _MODEL) if (path / name).is_file()]
            if not files:
                raise ValueError(f"holds neither {_JSON} nor {_MODEL}")
            if (path / _CONFIG).is_file():
                config = _object(json.loads((path / _CONFIG).read_bytes()), _CONFIG)
            path = files[0]
        data = path.read_bytes()
        if data[:1] == b"{" or path.suffix == ".json":
            return _from_json(_object(json.loads(data), "the file"), config)
        return _from_model(sentencepiece_file.parse(data), config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def save(folder: str | os.PathLike, tables: Tables) -> None:
    """Write `tables` as the four files of the tokenizer_3 folder of Stable Diffusion 3.5, for `init` and transformers.

    `init(folder)` equals `tables`. Each file is replaced whole or not at all. Raises ValueError when the pieces could
    not be read back by transformers' T5 classes: padding, end and unknown must be ids 0, 1 and 2.
    """
    ids = (tables.pad_id, tables.eos_id, tables.unk_id)
    if ids != (0, 1, 2):
        raise ValueError(f"padding, end and unknown are ids {ids}; the T5 format wants 0, 1 and 2")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _write(path / _MODEL, sentencepiece_file.serialize(_model(tables)))
    for name, content in ((_JSON, _json(tables)), (_CONFIG, _config(tables)), (_MAP, _token_map(tables))):
        end = "" if name == _JSON else "\n"
        _write(path / name, (json.dumps(content, indent=2, ensure_ascii=False) + end).encode())


def _from_json(content: Mapping[str, Any], config: Mapping[str, Any]) -> Tables:
    model = _object(content.get("model"), "model")
    kind, fallback = model.get("type"), model.get("byte_fallback")
    if kind != "Unigram" or fallback:
        raise ValueError(f"model is {kind!r}, its byte_fallback {fallback}; want 'Unigram' without")
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, list) or not vocabulary:
        raise ValueError("model.vocab is not a list of [piece, score] pairs")
    try:
        pieces, scores = zip(*vocabulary, strict=True)
        scores = tuple(map(float, scores))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.vocab is not a list of [piece, score] pairs: {error}") from None
    if not all(type(piece) is str for piece in pieces):
        raise ValueError("model.vocab holds pieces that are not strings")
    added = [_added(_object(token, "added_tokens")) for token in content.get("added_tokens") or ()]
    charsmap, steps = _normalizers(content.get("normalizer"))
    names = {token.content: token.id for token in added} | {piece: index for index, piece in enumerate(pieces)}
    eos = _end_token(content.get("post_processor"), config)
    return build(
        pieces,
        scores,
        charsmap=charsmap,
        added=added,
        spacing=_spacing(steps, content.get("pre_tokenizer")),
        unk_id=model.get("unk_id") if isinstance(model.get("unk_id"), int) else -1,
        eos_id=names.get(eos, -1),
        pad_id=names.get(_name(config, "pad_token"), -1),
        model_max_length=_max_length(config),
        several=_several(config, {token.content: token.id for token in added}),
    )


def _several(config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    problems = several_problems(config, ids)
    if problems:
        raise ValueError(problems[0])
    return {ids[names[0]]: tuple(ids[name] for name in names) for names in config.get(SEVERAL) or ()}


def _from_model(model: SentencePieceModel, config: Mapping[str, Any]) -> Tables:
    count = config.get("extra_ids", 100)
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(count))]
    pieces = [piece.text for piece in model.pieces] + sentinels
    scores = [piece.score for piece in model.pieces] + [0.0] * count
    ids = {piece: index for index, piece in enumerate(pieces)}
    flags = {
        token.get("content"): (bool(token.get("lstrip")), bool(token.get("rstrip")))
        for token in _object(config.get("added_tokens_decoder", {}), "added_tokens_decoder").values()
    }
    special = [piece.text for piece in model.pieces if piece.kind != sentencepiece_file.NORMAL] + sentinels
    return build(
        pieces,
        scores,
        charsmap=model.charsmap,
        added=[AddedToken(ids[name], name, *flags.get(name, (False, False))) for name in special],
        unk_id=ids.get(_name(config, "unk_token"), -1),
        eos_id=ids.get(_name(config, "eos_token"), -1),
        pad_id=ids.get(_name(config, "pad_token"), -1),
        model_max_length=_max_length(config),
    )


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {type(value).__name__}, want a JSON object")
    return value


def _name(config: Mapping[str, Any], role: str) -> str:
    value = config.get(role) or _NAMES[role]
    return value.get("content", "") if isinstance(value, dict) else value


def _max_length(config: Mapping[str, Any]) -> int:
    value = config.get("model_max_length") or UNBOUNDED
    if not isinstance(value, int | float) or value < 1:
        raise ValueError(f"model_max_length is {value!r}, want a positive number")
    return int(value)


def _added(token: Mapping[str, Any]) -> AddedToken:
    if token.get("single_word") or token.get("normalized") or not token.get("special", True):
        raise ValueError(
            f"added token {token.get('content')!r} is matched as a single word, in normalised text or as an ordinary "
            "word; want a special token, matched in the raw text"
        )
    lstrip, rstrip = bool(token.get("lstrip")), bool(token.get("rstrip"))
    return AddedToken(token.get("id", -1), token.get("content", ""), lstrip, rstrip)


_STRIP = {"type": "Strip", "strip_left": False, "strip_right": True}
_COLLAPSE = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE}
_METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
_WHITESPACE = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, _METASPACE]}


def _normalizers(normalizer: Any) -> tuple[bytes, list]:
    """The character map of the normaliser, empty for none, and the steps that follow it."""
    if normalizer is None:
        return b"", []
    normalizer = _object(normalizer, "normalizer")
    steps = list(normalizer.get("normalizers", ())) if normalizer.get("type") == "Sequence" else [normalizer]
    if not steps or not isinstance(steps[0], dict) or steps[0].get("type") != "Precompiled":
        return b"", steps
    try:
        return base64.b64decode(steps[0].get("precompiled_charsmap") or "", validate=True), steps[1:]
    except (binascii.Error, TypeError) as error:
        raise ValueError(f"normalizer: precompiled_charsmap is not base64 ({error})") from None


def _spacing(steps: Sequence[Any], pre_tokenizer: Any) -> Spacing:
    by_steps = {"[]": (False, False), _key([_STRIP]): (True, False), _key([_COLLAPSE]): (False, True)}
    by_steps[_key([_STRIP, _COLLAPSE])] = (True, True)
    by_splitter = {_key(_METASPACE): False, _key(_WHITESPACE): True}
    if _key(steps) not in by_steps:
        raise ValueError(f"normalizer: {_key(steps)[:200]} after the character map; want those of {sorted(by_steps)}")
    if _key(pre_tokenizer) not in by_splitter:
        raise ValueError(f"pre_tokenizer: {_key(pre_tokenizer)[:200]}; want one of {sorted(by_splitter)}")
    return Spacing(*by_steps[_key(steps)], split=by_splitter[_key(pre_tokenizer)])


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _template(eos: str, eos_id: int) -> dict[str, Any]:
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, end, second, end],
        "special_tokens": {eos: {"id": eos, "ids": [eos_id], "tokens": [eos]}},
    }


def _end_token(processor: Any, config: Mapping[str, Any]) -> str:
    """The token that the post-processor puts behind a text."""
    if processor is None:
        return _name(config, "eos_token")
    single = _object(processor, "post_processor").get("single") or ()
    try:
        if len(single) == 2 and "Sequence" in single[0]:
            return single[1]["SpecialToken"]["id"]
    except (KeyError, TypeError):
        pass
    raise ValueError(f"post_processor: {_key(single)[:200]} for a single text; want the text, then one special token")


def _model(tables: Tables) -> SentencePieceModel:
    """Pieces without the sentinels at the end, which transformers adds itself."""
    special = {token.id for token in tables.added} | {tables.eos_id, tables.pad_id}
    count = len(tables.pieces)
    while count and tables.pieces[count - 1].startswith("<extra_id_") and count - 1 in special:
        count -= 1
    kinds = {index: sentencepiece_file.CONTROL for index in special} | {tables.unk_id: sentencepiece_file.UNKNOWN}
    return SentencePieceModel(
        tuple(
            Piece(tables.pieces[index], tables.scores[index], kinds.get(index, sentencepiece_file.NORMAL))
            for index in range(count)
        ),
        tables.charsmap,
    )


def _token(token: AddedToken) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": False, "special": True}
    return {"id": token.id, "content": token.content, **flags}


def _json(tables: Tables) -> dict[str, Any]:
    charsmap = base64.b64encode(tables.charsmap).decode()
    steps = [{"type": "Precompiled", "precompiled_charsmap": charsmap}] if charsmap else []
    steps += [_STRIP] * tables.spacing.strip + [_COLLAPSE] * tables.spacing.collapse
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_token(token) for token in tables.added],
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": _WHITESPACE if tables.spacing.split else _METASPACE,
        "post_processor": _template(tables.pieces[tables.eos_id], tables.eos_id),
        "decoder": _METASPACE,
        "model": {
            "type": "Unigram",
            "unk_id": tables.unk_id,
            "vocab": [list(pair) for pair in zip(tables.pieces, tables.scores, strict=True)],
            "byte_fallback": False,
        },
    }


def _sentinels(tables: Tables) -> list[str]:
    names = [token.content for token in tables.added if token.content.startswith("<extra_id_")]
    return sorted(names, key=lambda name: (len(name), name))


def _config(tables: Tables) -> dict[str, Any]:
    decoder = {str(t.id): {k: v for k, v in sorted(_token(t).items()) if k != "id"} for t in tables.added}
    several = [[decoder[str(index)]["content"] for index in ids] for ids in tables.several.values()]
    return {
        "add_prefix_space": True,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": _sentinels(tables),
        "clean_up_tokenization_spaces": True,
        "eos_token": tables.pieces[tables.eos_id],
        "extra_ids": len(_sentinels(tables)),
        "legacy": True,
        "model_max_length": tables.model_max_length,
        "pad_token": tables.pieces[tables.pad_id],
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        "unk_token": tables.pieces[tables.unk_id],
        **({SEVERAL: several} if several else {}),
    }


def _token_map(tables: Tables) -> dict[str, Any]:
    by_id = {token.id: token for token in tables.added}
    named = {"eos_token": tables.eos_id, "pad_token": tables.pad_id, "unk_token": tables.unk_id}
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word")
    described = {
        role: _token(by_id.get(index, AddedToken(index, tables.pieces[index]))) for role, index in named.items()
    }
    return {
        "additional_special_tokens": _sentinels(tables),
        **{role: {flag: token[flag] for flag in flags} for role, token in described.items()},
    }


def _write(path: Path, data: bytes) -> None:
    """Replace the file whole: written beside, brought to disk, renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
