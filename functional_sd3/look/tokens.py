"""Tokens of a prompt as each text encoder reads them, and the words that they are parts of."""

import bisect
import re
from typing import Any, Literal, NamedTuple

from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.request import TextOptions
from functional_sd3.text import bpe, unigram, weighting
from functional_sd3.text.tokenization import Ids, tokenize_prompts
from functional_sd3.weights.model import Tokenizers

Stream = Literal["clip", "t5"]
"""Tokens of the context: those of both CLIPs, which share their places, or those of T5."""
Kind = Literal["start", "text", "unknown", "end", "padding", "cut"]

_WORDS = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")


class Token(NamedTuple):
    """One token: its id, its spelling in the vocabulary, and the text it encodes."""

    id: int
    text: str
    kind: Kind
    """"cut": beyond the length of the encoder, which does not read it."""
    position: int | None
    """Among the tokens that this encoder reads; None if cut."""
    word: int | None
    """Index into `Prompt.words`; None for start, end and padding."""


class EncoderTokens(NamedTuple):
    """Tokens of one text encoder, in order; those that were cut are where they would have been."""

    encoder: str
    """"clip_l", "clip_g" or "t5"."""
    tokens: tuple[Token, ...]
    length: int
    """Tokens that the encoder reads at once, padding included."""


class Prompt(NamedTuple):
    """A prompt without the notation of weights, its words, and its tokens for each encoder that there is."""

    text: str
    words: tuple[str, ...]
    encoders: tuple[EncoderTokens, ...]
    clip_tokens: int
    """Tokens of the context before those of T5."""
    t5_tokens: int

    def positions(self, stream: Stream, word: int) -> tuple[int, ...]:
        """Places in the context of the tokens of a word: those of CLIP, which both CLIPs share, or those of T5."""
        names = ("t5",) if stream == "t5" else ("clip_l", "clip_g")
        first = self.clip_tokens if stream == "t5" else 0
        of_stream = [one for one in self.encoders if one.encoder in names][:1]
        tokens = of_stream[0].tokens if of_stream else ()
        return tuple(first + each.position for each in tokens if each.word == word and each.position is not None)


def read(
    config: Config, tokenizers: Tokenizers, prompt: str, options: TextOptions, encoders: tuple[str, ...], t5_length: int
) -> Prompt:
    """The tokens of a prompt for the encoders named; others contribute zeros to the context."""
    ids: Ids = tokenize_prompts(
        config,
        tokenizers,
        [prompt],
        t5_length=t5_length,
        weighted=options.weighted,
        long_prompts=options.long_prompts,
    )[0]
    text = weighting.parse(prompt).text if options.weighted else prompt
    matches = list(_WORDS.finditer(text))
    starts = [match.start() for match in matches]
    of_encoders = []
    for name in encoders:
        tables, rows = getattr(tokenizers, name), getattr(ids, name)[0]
        module: Any = unigram if name == "t5" else bpe
        every = module.apply(tables, [text], length=None)[0]
        spans = module.offsets(tables, [text], length=None)[0]
        # A token may begin with the space before its word, so its word is that of its last character.
        words = [bisect.bisect_right(starts, end - 1) - 1 if end > start else -1 for start, end in spans]
        pairs = list(zip(every, words, strict=True))[0 if name == "t5" else 1 : -1]
        chunks = rows.tolist() if rows.ndim == 2 else [rows.tolist()]
        of_encoders.append(EncoderTokens(name, _tokens(name, tables, chunks, pairs), len(chunks[0])))
    return Prompt(
        text,
        tuple(match.group() for match in matches),
        tuple(of_encoders),
        ids.clip_l[0].numel(),
        ids.t5[0].numel(),
    )


def _tokens(name: str, tables: Any, chunks: list[list[int]], pairs: list[tuple[int, int]]) -> tuple[Token, ...]:
    """Tokens of chunks that were read, each with as many of the `pairs` (id, word) as have room; the rest is cut."""
    first = 0 if name == "t5" else 1
    length, tokens = len(chunks[0]), []
    room = length - 1 - first
    for number, chunk in enumerate(chunks):
        inside = pairs[number * room : (number + 1) * room]
        for index, id in enumerate(chunk):
            place, word = index - first, None
            kind: Kind = "padding"
            if place < 0:
                kind = "start"
            elif place < len(inside):
                kind, word = "unknown" if id == tables.unk_id != tables.eos_id else "text", inside[place][1]
            elif place == len(inside):
                kind = "end"
            tokens.append(Token(id, spelling(name, tables, id), kind, number * length + index, _word(word)))
    cut = pairs[len(chunks) * room :]
    last = next((index for index, token in enumerate(tokens) if token.kind == "end"), len(tokens)) if cut else 0
    beyond = [Token(id, spelling(name, tables, id), "cut", None, _word(word)) for id, word in cut]
    return (*tokens[:last], *beyond, *tokens[last:]) if cut else tuple(tokens)


def _word(index: int | None) -> int | None:
    return None if index is None or index < 0 else index


def spelling(encoder: str, tables: Any, id: int) -> str:
    """A token as its vocabulary writes it: CLIP's `</w>` ends a word, T5's `▁` begins one."""
    if encoder == "t5":
        return tables.pieces[id] if id < len(tables.pieces) else f"<{id}>"
    name = tables.names.get(id, f"<{id}>")
    if name.isascii():
        return name
    # Bytes of other letters have symbols of their own in the vocabulary.
    decoded = bpe.decode(tables, [id], skip_special=False)
    ending = "</w>" if name.endswith("</w>") else ""
    return name if "\ufffd" in decoded else f"{decoded}{ending}"
