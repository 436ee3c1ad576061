"""A T5 tokenizer written as the four files of a `tokenizer_3` folder, for `unigram.init` and transformers."""

import base64
import json
import os
from pathlib import Path
from typing import Any

from functional_sd3.formats.files import write_atomic
from functional_sd3.text.token_fields import MULTI_TOKEN
from functional_sd3.text.unigram import sentencepiece_file
from functional_sd3.text.unigram.files import COLLAPSE, CONFIG, JSON, METASPACE, MODEL, STRIP, WHITESPACE
from functional_sd3.text.unigram.sentencepiece_file import Piece, SentencePieceModel
from functional_sd3.text.unigram.tables import AddedToken, Tables

_MAP = "special_tokens_map.json"


def save(folder: str | os.PathLike, tables: Tables) -> None:
    """Write `tables` as the four files of the tokenizer_3 folder of Stable Diffusion 3.5, for `init` and transformers.

    `init(folder)` equals `tables`. Each file is replaced whole or not at all. Raises ValueError when the pieces could
    not be read back by transformers' T5 classes: padding, end and unknown must be ids 0, 1 and 2.
    """
    ids = (tables.pad_id, tables.eos_id, tables.unk_id)
    if ids != (0, 1, 2):
        raise ValueError(f"padding, end and unknown are ids {ids}; the T5 format needs 0, 1 and 2")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_atomic(path / MODEL, sentencepiece_file.serialize(_model(tables)))
    for name, content in ((JSON, _json(tables)), (CONFIG, _config(tables)), (_MAP, _token_map(tables))):
        end = "" if name == JSON else "\n"
        write_atomic(path / name, (json.dumps(content, indent=2, ensure_ascii=False) + end).encode())


def _template(eos: str, eos_id: int) -> dict[str, Any]:
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, end, second, end],
        "special_tokens": {eos: {"id": eos, "ids": [eos_id], "tokens": [eos]}},
    }


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
    steps: list[dict[str, Any]] = [{"type": "Precompiled", "precompiled_charsmap": charsmap}] if charsmap else []
    steps += [STRIP] * tables.spacing.strip + [COLLAPSE] * tables.spacing.collapse
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_token(token) for token in tables.added],
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": WHITESPACE if tables.spacing.split else METASPACE,
        "post_processor": _template(tables.pieces[tables.eos_id], tables.eos_id),
        "decoder": METASPACE,
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
    multi_token = [[decoder[str(index)]["content"] for index in ids] for ids in tables.multi_token.values()]
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
        **({MULTI_TOKEN: multi_token} if multi_token else {}),
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
