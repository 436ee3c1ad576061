"""Fields common to the configs of all tokenizers, and the limits of what is read."""

from collections.abc import Collection

from functional_sd3.formats.bounded import MEBIBYTE
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.json_fields import Object

FILE_LIMIT = 32 * MEBIBYTE
"""Bytes of one file of a tokenizer; the largest of SD3's has 2.4 million, of multilingual T5's 17 million."""
MAX_PIECES = 2**19
"""Tokens of a vocabulary; CLIP's has 49,408, T5's 32,100, multilingual T5's 256,300."""
MAX_ADDED = 2**13
"""Added tokens, each of which is matched at every position of a text."""
MAX_ADDED_LENGTH = 2**10
HIGHEST_ID = 2**31 - 1

MULTI_TOKEN = "several_vectors"
"""Key of this project in tokenizer_config.json, which transformers ignores: lists of tokens, of which the first
is replaced by all of them."""


def token(config: Object, name: str, default: str | None) -> str | None:
    """The content of a named token, which is written as a string or as an object with its flags."""
    value = config.values.get(name)
    if isinstance(value, dict):
        return config.mapping(name).text("content", longest=MAX_ADDED_LENGTH)
    return config.text(name, default, longest=MAX_ADDED_LENGTH) or default


def multi_token(config: Object, known: Collection[str]) -> list[list[str]]:
    """Lists of tokens, of which the first is replaced by all of them. Raises WeightsError for tokens that are not
    `known`."""
    groups = config.items(MULTI_TOKEN, (), list, most=MAX_ADDED)
    if sum(map(len, groups)) > MAX_ADDED:
        raise config.error(MULTI_TOKEN, f"names more than {MAX_ADDED:,} tokens")
    for names in groups:
        wrong = next((name for name in names if not isinstance(name, str) or name not in known), None)
        if wrong is not None or not names:
            raise WeightsError(f"{config.where}: {MULTI_TOKEN} names {wrong!r:.80}, which is no added token")
    return list(groups)
