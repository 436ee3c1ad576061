"""Checks that a vocabulary, its merges and its special tokens are consistent; each returns the problems."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from functional_sd3.formats.errors import attempt
from functional_sd3.formats.json_fields import Object
from functional_sd3.formats.printable import shorten
from functional_sd3.text.token_fields import HIGHEST_ID, MAX_ADDED, MAX_ADDED_LENGTH, MAX_PIECES, token

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MODEL_MAX_LENGTH = 77  # CLIP's number of positions
NAMED = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
_UNLIMITED = 10**9  # transformers writes 1e30 where there is no limit
_MAX_TOKEN = 2**10
_MAX_LETTERS = 2**22
"""Characters of all tokens together, each of which is merged once when the files are read; CLIP's have 350,000."""


class Special(NamedTuple):
    """A special token, matched before the text is split into words: in the raw text, or from the normalised one."""

    content: str
    id: int
    normalized: bool
    special: bool


def vocab_problems(vocab: Any) -> list[str]:
    """Problems of a map from tokens to distinct ids; none for None, a file that could not be read."""
    if vocab is None:
        return []
    if not isinstance(vocab, Mapping) or not vocab:
        return [f"the vocabulary is {'empty' if vocab == {} else type(vocab).__name__}, not an object from token to id"]
    if len(vocab) > MAX_PIECES:
        return [f"the vocabulary has {len(vocab):,} tokens; at most {MAX_PIECES:,} are read"]
    wrong = [
        f"{shorten(repr(token))}: {shorten(repr(i))}"
        for token, i in vocab.items()
        if not isinstance(token, str) or type(i) is not int or not 0 <= i <= HIGHEST_ID
    ]
    if wrong:
        return [f"{len(wrong)} entries of the vocabulary are not token: id, such as {wrong[0]}"]
    owners: dict[int, str] = {}
    twice = [(owners[i], token, i) for token, i in vocab.items() if owners.setdefault(i, token) != token]
    if twice:
        one, other, i = twice[0]
        return [f"{len(twice)} tokens share an id with another, such as {shorten(one)!r} and {shorten(other)!r} ({i})"]
    longest = max(vocab, key=len)
    if len(longest) > _MAX_TOKEN:
        return [f"the token {shorten(longest)!r} has {len(longest):,} characters; at most {_MAX_TOKEN:,} are read"]
    if sum(map(len, vocab)) > _MAX_LETTERS:
        return [f"the tokens have more than {_MAX_LETTERS:,} characters together, the most that are read"]
    return [] if _is_unicode("".join(vocab)) else ["a token holds half of a surrogate pair, which is no character"]


def merge_problems(vocab: Mapping[str, int] | None, merges: Any) -> list[str]:
    """Problems of merges: each must be two tokens of the vocabulary, where known, whose join is a token too."""
    if merges is None:
        return []
    if not isinstance(merges, Sequence) or isinstance(merges, str | bytes):
        return [f"the merges are a {type(merges).__name__}, not a list"]
    if len(merges) > MAX_PIECES:
        return [f"there are {len(merges):,} merges; at most {MAX_PIECES:,} are read"]
    pairs = [pair(merge) for merge in merges]
    wrong = [merge for merge, halves in zip(merges, pairs, strict=True) if len(halves) != 2 or not all(halves)]
    if wrong:
        return [f"{len(wrong)} merges are not two tokens separated by one space, such as {shorten(repr(wrong[0]))}"]
    if vocab is None:
        return []
    unknown = [(a, b) for a, b in pairs if a not in vocab or b not in vocab or a + b not in vocab]
    if unknown:
        example = shorten(repr(" + ".join(unknown[0])))
        return [f"{len(unknown)} merges use or make a token that the vocabulary lacks, such as {example}"]
    return []


def pair(merge: Any) -> tuple[str, ...]:
    """The two halves of a merge: a pair in newer tokenizer.json files, a line of text elsewhere; () for anything
    else."""
    if isinstance(merge, str):
        return tuple(merge.split(" "))
    if not isinstance(merge, list | tuple) or not all(isinstance(half, str) for half in merge):
        return ()
    return tuple(merge)


def length_of(config: Object) -> int:
    """`model_max_length`, CLIP's 77 where there is none.

    Raises WeightsError for a length without room for the start and the end token.
    """
    length = config.number("model_max_length", MODEL_MAX_LENGTH)
    if length != int(length) or length < 2:
        raise config.error("model_max_length", "must be a whole number of at least 2")
    return MODEL_MAX_LENGTH if length > _UNLIMITED else int(length)


def tokens_of(
    vocab: Mapping[str, int] | None, config: Object, added: Mapping[str, Any]
) -> tuple[dict[str, Special], list[str]]:
    """The special tokens by content, and problems: those listed with their flags, and those that are only named."""
    problems: list[str] = []
    wrong = [(content, i) for content, i in added.items() if type(i) is not int or not 0 <= i <= HIGHEST_ID]
    if wrong:
        problems.append(f"added token {shorten(repr(wrong[0][0]))} has the id {shorten(repr(wrong[0][1]))}")
        added = {}
    tokens = attempt(problems, _listed, config) or {}
    named = attempt(problems, _named, config) or {}
    for name, (content, flags) in named.items():
        if content in tokens or vocab is None:
            continue
        i = vocab.get(content, added.get(content))
        if i is None:
            problems.append(f"{name} {shorten(repr(content))} is not in the vocabulary")
        else:
            tokens[content] = Special(content, i, flags.boolean("normalized", False), True)
    for content, i in added.items():
        tokens.setdefault(content, Special(content, i, True, False))
    return tokens, problems + _misplaced(vocab or {}, tokens)


def _listed(config: Object) -> dict[str, Special]:
    """The tokens of `added_tokens_decoder`, with the flags that it gives them."""
    decoder = config.mapping("added_tokens_decoder", {})
    if len(decoder.values) > MAX_ADDED:
        raise config.error("added_tokens_decoder", f"has {len(decoder.values):,} tokens, more than {MAX_ADDED:,}")
    tokens = {}
    for i, value in decoder.values.items():
        if not isinstance(value, dict) or not (i.isascii() and i.isdecimal() and len(i) <= 10):
            raise decoder.error(i, "must be an object with the content of a token, and its name the token's id")
        flags = decoder.mapping(i)
        content, special = flags.text("content", longest=MAX_ADDED_LENGTH), flags.boolean("special", False)
        _check_flags(flags, content)
        # a token without the flag is matched in the raw text if it is special and in the normalised text if it is not
        tokens[content] = Special(content, int(i), flags.boolean("normalized", not special), special)
    return tokens


def _named(config: Object) -> dict[str, tuple[str, Object]]:
    """Role -> content and flags of the tokens that are only named."""
    named = {name: (token(config, name, default), _flags(config, name)) for name, default in NAMED.items()}
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.values.get(name) or []
        if extra:
            # transformers takes the second as an object too, from role to token.
            values = list(extra.values()) if isinstance(extra, dict) else config.items(name, (), most=MAX_ADDED)
            listed = Object({f"special token {index}": value for index, value in enumerate(values)}, config.where)
            named |= {role: (token(listed, role, None), _flags(listed, role)) for role in listed.values}
            break
    checked: dict[str, tuple[str, Object]] = {}
    for role, (content, flags) in named.items():
        if content is None:
            raise config.error(role, "must be a token")
        _check_flags(flags, content)
        checked[role] = (content, flags)
    return checked


def _flags(config: Object, name: str) -> Object:
    return config.mapping(name) if isinstance(config.values.get(name), dict) else Object({}, config.where)


def _check_flags(flags: Object, content: str) -> None:
    if any(flags.boolean(flag, False) for flag in ("lstrip", "rstrip", "single_word")):
        raise flags.error("content", "has lstrip, rstrip or single_word set, which CLIP's tokens do not")


def _misplaced(vocab: Mapping[str, int], tokens: Mapping[str, Special]) -> list[str]:
    """Problems of the ids of added tokens, each of which must be the vocabulary's, or one that no other token has."""
    if len(tokens) > MAX_ADDED:
        return [f"there are {len(tokens):,} added tokens; at most {MAX_ADDED:,} are read"]
    problems = []
    owners = {i: content for content, i in vocab.items()}
    for content, entry in tokens.items():
        expected = vocab.get(content, entry.id)
        owner = owners.setdefault(entry.id, content)
        if entry.id != expected or owner != content:
            right = expected if entry.id != expected else f"taken by {shorten(repr(owner))}"
            problems.append(f"token {shorten(repr(content))} has id {entry.id}, which in the vocabulary is {right}")
        elif not content or not _is_unicode(content) or len(content) > MAX_ADDED_LENGTH or entry.id > HIGHEST_ID:
            problems.append(f"token {shorten(repr(content))} with id {entry.id} is empty, too long or no text")
    return problems


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
