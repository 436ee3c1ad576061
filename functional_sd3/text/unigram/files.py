"""A T5 tokenizer read from disk: `tokenizer.json`, or sentencepiece's `spiece.model`, and the config beside them.

Settings that this tokenizer does not implement raise an error that names them; none is ignored silently.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from functional_sd3.formats import bounded, json_fields
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.json_fields import Object
from functional_sd3.formats.printable import shorten
from functional_sd3.text.token_fields import (
    FILE_LIMIT,
    HIGHEST_ID,
    MAX_ADDED,
    MAX_ADDED_LENGTH,
    MAX_PIECES,
    multi_token,
    token,
)
from functional_sd3.text.unigram import sentencepiece_file
from functional_sd3.text.unigram.sentencepiece_file import SentencePieceModel
from functional_sd3.text.unigram.tables import SPACE, UNBOUNDED, AddedToken, Spacing, Tables, build

JSON, MODEL, CONFIG = "tokenizer.json", "spiece.model", "tokenizer_config.json"
_NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
STRIP: dict[str, Any] = {"type": "Strip", "strip_left": False, "strip_right": True}
COLLAPSE: dict[str, Any] = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE}
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
WHITESPACE = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]}


def init(source: str | os.PathLike) -> Tables:
    """Tables of the tokenizer in a folder, a `tokenizer.json` or a `spiece.model`.

    In a folder `tokenizer.json` is preferred, and `tokenizer_config.json` has the maximum length and the names of the
    special tokens. A sentencepiece model gets T5's sentinels (100, or the config's `extra_ids`) behind its pieces, as
    transformers adds them. Raises WeightsError, a ValueError, naming the file and what is wrong with it.
    """
    path = Path(source)
    try:
        config = Object({}, str(path))
        if path.is_dir():
            files = [path / name for name in (JSON, MODEL) if os.path.lexists(path / name)]
            if not files:
                raise WeightsError(f"{path}: holds neither {JSON} nor {MODEL}")
            if os.path.lexists(path / CONFIG):
                config = json_fields.read(path / CONFIG, limit=FILE_LIMIT)
            path = files[0]
        data = bounded.read_bytes(path, FILE_LIMIT)
        if data.lstrip(b"\xef\xbb\xbf")[:1] == b"{" or path.suffix == ".json":
            return _from_json(json_fields.parse_object(data, path), config)
        return _from_model(sentencepiece_file.parse(data), config)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error


def _from_json(content: Object, config: Object) -> Tables:
    model = content.mapping("model")
    kind, fallback = model.text("type", None), model.boolean("byte_fallback", False)
    if kind != "Unigram" or fallback:
        raise ValueError(f"model is {shorten(repr(kind))}, its byte_fallback {fallback}; want 'Unigram' without")
    pieces, scores = _vocabulary(model.items("vocab", kind=list, most=MAX_PIECES))
    added = [_added(token) for token in content.mappings("added_tokens", (), most=MAX_ADDED)]
    charsmap, steps = _normalizers(content.mapping("normalizer", None))
    names = {token.content: token.id for token in added} | {piece: index for index, piece in enumerate(pieces)}
    return build(
        pieces,
        scores,
        charsmap=charsmap,
        added=added,
        spacing=_spacing(steps, content.values.get("pre_tokenizer")),
        unk_id=model.integer("unk_id", -1),
        eos_id=names.get(_end_token(content.mapping("post_processor", None), config), -1),
        pad_id=names.get(_name(config, "pad_token"), -1),
        model_max_length=_max_length(config),
        multi_token=_multi_token(config, {token.content: token.id for token in added}),
    )


def _vocabulary(pairs: Sequence[list]) -> tuple[Sequence[str], Sequence[float]]:
    try:
        pieces, scores = [piece for piece, _ in pairs], [score for _, score in pairs]
    except ValueError:
        raise ValueError("model.vocab is not a list of [piece, score] pairs") from None
    if not pairs:
        raise ValueError("model.vocab is empty, not a list of [piece, score] pairs")
    if set(map(type, pieces)) != {str}:
        wrong = next(piece for piece in pieces if type(piece) is not str)
        raise ValueError(f"model.vocab is not a list of [piece, score] pairs: a piece is {shorten(repr(wrong))}")
    if not set(map(type, scores)) <= {int, float}:
        wrong = next(score for score in scores if type(score) not in (int, float))
        raise ValueError(f"model.vocab is not a list of [piece, score] pairs: a score is {shorten(repr(wrong))}")
    try:
        return pieces, tuple(map(float, scores))
    except OverflowError:  # A whole number of more than 308 digits.
        raise ValueError("model.vocab holds scores that are not finite") from None


def _multi_token(config: Object, ids: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    return {ids[names[0]]: tuple(ids[name] for name in names) for names in multi_token(config, ids)}


def _from_model(model: SentencePieceModel, config: Object) -> Tables:
    count = config.integer("extra_ids", 100, low=0, high=MAX_ADDED)
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(count))]
    pieces = [piece.text for piece in model.pieces] + sentinels
    scores = [piece.score for piece in model.pieces] + [0.0] * count
    ids = {piece: index for index, piece in enumerate(pieces)}
    special = [piece.text for piece in model.pieces if piece.kind != sentencepiece_file.NORMAL] + sentinels
    flags = _flags(config)
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


def _flags(config: Object) -> dict[str, tuple[bool, bool]]:
    """Flags (lstrip, rstrip) of each token that the config lists: white space it absorbs to its left and right."""
    decoder = config.mapping("added_tokens_decoder", {})
    if len(decoder.values) > MAX_ADDED:
        raise config.error("added_tokens_decoder", f"has {len(decoder.values):,} tokens, more than {MAX_ADDED:,}")
    tokens = [decoder.mapping(name) for name in decoder.values]
    return {
        token.text("content", longest=MAX_ADDED_LENGTH): (
            token.boolean("lstrip", False),
            token.boolean("rstrip", False),
        )
        for token in tokens
    }


def _name(config: Object, role: str) -> str:
    return token(config, role, _NAMES[role]) or _NAMES[role]


def _max_length(config: Object) -> int:
    return config.integer("model_max_length", UNBOUNDED, low=1, high=UNBOUNDED)


def _added(token: Object) -> AddedToken:
    content = token.text("content", longest=MAX_ADDED_LENGTH)
    single_word, normalized = token.boolean("single_word", False), token.boolean("normalized", False)
    if single_word or normalized or not token.boolean("special", True):
        raise ValueError(
            f"added token {shorten(repr(content))} is matched as a single word, in normalised text or as an ordinary "
            "word; want a special token, matched in the raw text"
        )
    index = token.integer("id", low=0, high=HIGHEST_ID)
    return AddedToken(index, content, token.boolean("lstrip", False), token.boolean("rstrip", False))


def _normalizers(normalizer: Object | None) -> tuple[bytes, list]:
    """The character map of the normaliser, empty for none, and the steps that follow it."""
    if normalizer is None:
        return b"", []
    single = normalizer.text("type") != "Sequence"
    steps = [normalizer] if single else normalizer.mappings("normalizers", (), most=_MAX_STEPS)
    following = [step.values for step in steps]
    if not steps or steps[0].text("type") != "Precompiled":
        return b"", following
    encoded = steps[0].text("precompiled_charsmap", "", longest=FILE_LIMIT)
    try:
        return base64.b64decode(encoded, validate=True), following[1:]
    except ValueError as error:
        raise ValueError(f"normalizer: precompiled_charsmap is not base64 ({error})") from None


def _spacing(steps: Sequence[Any], pre_tokenizer: Any) -> Spacing:
    by_steps = {"[]": (False, False), _key([STRIP]): (True, False), _key([COLLAPSE]): (False, True)}
    by_steps[_key([STRIP, COLLAPSE])] = (True, True)
    by_splitter = {_key(METASPACE): False, _key(WHITESPACE): True}
    if _key(steps) not in by_steps:
        raise ValueError(f"normalizer: {_key(steps)[:200]} after the character map; want those of {sorted(by_steps)}")
    if _key(pre_tokenizer) not in by_splitter:
        raise ValueError(f"pre_tokenizer: {_key(pre_tokenizer)[:200]}; want one of {sorted(by_splitter)}")
    return Spacing(*by_steps[_key(steps)], split=by_splitter[_key(pre_tokenizer)])


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _end_token(processor: Object | None, config: Object) -> str:
    """The token that the post-processor puts behind a text."""
    if processor is None:
        return _name(config, "eos_token")
    single = processor.mappings("single", (), most=_MAX_STEPS)
    if len(single) == 2 and "Sequence" in single[0].values and "SpecialToken" in single[1].values:
        return single[1].mapping("SpecialToken").text("id")
    given = _key(processor.values.get("single"))[:200]
    raise ValueError(f"post_processor: {given} for a single text; want the text, then one special token")


_MAX_STEPS = 64
