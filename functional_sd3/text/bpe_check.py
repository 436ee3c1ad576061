"""Whether a vocabulary, its merges and its special tokens fit together: each check returns the problems it found."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MODEL_MAX_LENGTH = 77  # CLIP's number of positions
NAMED = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
_UNLIMITED = 10**9  # transformers writes 1e30 where there is no limit


class Special(NamedTuple):
    """A token that is cut out of the text before anything else: from the raw text, or from the normalised one."""

    content: str
    id: int
    normalized: bool
    special: bool


def vocab_problems(vocab: Any) -> list[str]:
    """Whether it maps strings to ids of their own; None is a file that could not be read."""
    if vocab is None:
        return []
    if not isinstance(vocab, Mapping) or not vocab:
        return [f"the vocabulary is {'empty' if vocab == {} else type(vocab).__name__}, not an object from token to id"]
    wrong = [(token, i) for token, i in vocab.items() if not isinstance(token, str) or type(i) is not int or i < 0]
    if wrong:
        return [f"{len(wrong)} entries of the vocabulary are not token: id, such as {wrong[0][0]!r}: {wrong[0][1]!r}"]
    owners: dict[int, str] = {}
    twice = [f"{owners[i]!r} and {token!r} ({i})" for token, i in vocab.items() if owners.setdefault(i, token) != token]
    return [f"{len(twice)} tokens share an id with another, such as {twice[0]}"] if twice else []


def merge_problems(vocab: Mapping[str, int] | None, merges: Any) -> list[str]:
    """Whether each is two tokens whose join is in the vocabulary too, where that is known."""
    if merges is None:
        return []
    if not isinstance(merges, Sequence) or isinstance(merges, str):
        return [f"the merges are a {type(merges).__name__}, not a list"]
    wrong = [merge for merge in merges if len(pair(merge)) != 2 or not all(pair(merge))]
    if wrong:
        return [f"{len(wrong)} merges are not two tokens parted by one space, such as {wrong[0]!r}"]
    if vocab is None:
        return []
    unknown = [(a, b) for a, b in map(pair, merges) if a not in vocab or b not in vocab or a + b not in vocab]
    if unknown:
        example = " + ".join(unknown[0])
        return [f"{len(unknown)} merges use or make a token that the vocabulary lacks, such as {example!r}"]
    return []


def pair(merge: Any) -> tuple[str, ...]:
    """The two halves of a merge: a pair already in newer tokenizer.json files, a line of text elsewhere."""
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)


def length_of(config: Mapping[str, Any]) -> Any:
    """`model_max_length`, with CLIP's own where none is given."""
    length = config.get("model_max_length")
    unlimited = isinstance(length, int | float) and length > _UNLIMITED
    return MODEL_MAX_LENGTH if length is None or unlimited else length


def length_problems(config: Mapping[str, Any]) -> list[str]:
    """Whether the length is a number that leaves room for the start and the end token."""
    length = length_of(config)
    if type(length) is not int or length < 2:
        return [f"model_max_length is {length!r}, not a whole number of at least 2"]
    return []


def tokens_of(
    vocab: Mapping[str, int] | None, config: Mapping[str, Any], added: Mapping[str, Any]
) -> tuple[dict[str, Special], list[str]]:
    """The tokens to cut out of texts, by content: those listed with their flags, and those only named."""
    tokens: dict[str, Special] = {}
    problems: list[str] = []
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        if not isinstance(content_of(token), str) or not isinstance(token, dict) or not i.isdecimal():
            problems.append(f"added token {i!r} is {token!r}, not an object with its content")
        else:
            tokens[token["content"]] = _special(int(i), token, special=token.get("special", False))
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    named = {name: config.get(name) or default for name, default in NAMED.items()}
    named |= {f"special token {index}": token for index, token in enumerate(extra)}
    for name, token in named.items():
        content = content_of(token)
        if not isinstance(content, str):
            problems.append(f"{name} is {token!r}, not a string")
        elif content not in tokens and vocab is not None:
            i = vocab.get(content, added.get(content))
            if i is None:
                problems.append(f"{name} {content!r} is not in the vocabulary")
            else:
                tokens[content] = _special(i, token if isinstance(token, dict) else {"content": token}, special=True)
    for content, i in added.items():
        tokens.setdefault(content, _special(i, {"content": content}, special=False))
    owners = {i: content for content, i in (vocab or {}).items()}
    for content, token in tokens.items():
        expected = (vocab or {}).get(content, token.id)
        if type(token.id) is not int or token.id != expected or owners.get(token.id, content) != content:
            right = expected if token.id != expected else f"taken by {owners.get(token.id)!r}"
            problems.append(f"token {content!r} has id {token.id!r}, which in the vocabulary is {right}")
    flagged = [token for token in (config.get("added_tokens_decoder") or {}).values() if isinstance(token, dict)]
    for token in flagged + [token for token in named.values() if isinstance(token, dict)]:
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            problems.append(f"token {content_of(token)!r} has lstrip, rstrip or single_word set, which CLIP's do not")
    return tokens, problems


def content_of(token: Any) -> Any:
    """A token is written as its string or as an object with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _special(i: Any, token: Mapping[str, Any], *, special: bool) -> Special:
    # a token without the flag is matched in the raw text if it is special and in the normalised text if it is not
    return Special(token["content"], i, bool(token.get("normalized", not special)), special)
