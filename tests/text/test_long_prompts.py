"""Long and hostile prompts: time grows at most linearly, and the kept ids are those of the whole prompt."""

import random
import re
import time
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.text import bpe, unigram, weighting
from functional_sd3.text.bpe import words as bpe_text
from functional_sd3.text.bpe.merge import Merges, merge, merge_first
from functional_sd3.text.unigram import viterbi
from functional_sd3.weights import shipped

SIZE = 9_000
SECONDS = 15
"""Twenty times and more what the slowest takes; work that grows with the square of the sizes below takes longer."""
PROMPTS = {
    "combining marks in turn": "\u0301\u0316" * (SIZE // 2),
    "a letter with marks": "e" + "\u0316\u0301" * (SIZE // 2),
    "marks that decompose": "\u0f73" * SIZE,
    "sentinels": "<extra_id_0>" * (SIZE // 12),
    "sentinels and spaces": ("<extra_id_0>" + " " * 20) * (SIZE // 32),
    "end tokens": "<|endoftext|>" * (SIZE // 13),
    "one letter": "x" * SIZE,
    "two letters": "ab" * (SIZE // 2),
    "one word of words": "redcircle" * (SIZE // 9),
    "spaces": " " * SIZE,
    "tabs and line ends": "\t\r\n" * (SIZE // 3),
    "no-break spaces": "\u00a0" * SIZE,
    "short words": "a " * (SIZE // 2),
    "unknown characters": "☃" * SIZE,
    "emoji joined": "👩\u200d🚀\u200d" * (SIZE // 4),
    "flags": "🇩" * SIZE,
    "consonants and viramas": "\u0915\u094d" * (SIZE // 2),
    "exclamation marks": "!" * SIZE,
    "apostrophes": "'" * SIZE,
    "angle brackets": "<|" * (SIZE // 2),
    "parentheses": "(" * SIZE,
    "nested groups": "(a" * (SIZE // 3) + ")" * (SIZE // 3),
    "weights": "(:1" * (SIZE // 4) + ")" * (SIZE // 4),
    "a long weight": "(:" + "1" * SIZE + "x)",
    "white space in groups": "(" * (SIZE // 3) + " " * (SIZE // 3) + ")" * (SIZE // 3),
    "backslashes": "\\" * SIZE,
}


@pytest.fixture(scope="module")
def tables():
    return bpe.init(shipped.folder() / "tokenizer_2"), unigram.init(shipped.folder() / "tokenizer_3")


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_the_kept_part_of_a_long_prompt_has_the_ids_of_the_whole(tables, prompt):
    clip_tables, t5_tables = tables
    kept = bpe.apply(clip_tables, prompt)[0].tolist()
    (whole,) = bpe.apply(clip_tables, prompt, length=None)
    content = whole[1:-1][:75]
    padding = [clip_tables.pad_id] * (75 - len(content))
    assert kept == [clip_tables.bos_id, *content, clip_tables.eos_id, *padding]
    kept = unigram.apply(t5_tables, prompt)[0].tolist()
    (whole,) = unigram.apply(t5_tables, prompt, length=None)
    content = whole[:-1][:255]
    assert kept == [*content, t5_tables.eos_id, *[t5_tables.pad_id] * (255 - len(content))]
    parsed = [weighting.parse(prompt)]
    weighting.clip_rows(clip_tables, parsed, 77, long=False)
    weighting.t5_rows(t5_tables, parsed, 256)


@pytest.mark.parametrize(
    ("function", "prompt"),
    [
        ("clip", "\u0301\u0316" * 100_000),  # 41 seconds, before
        ("clip whole", "e" + "\u0f73" * 100_000),
        ("clip", "x" * 1_000_000),
        ("clip", "<|endoftext|>" * 80_000),
        ("t5", "<extra_id_0>" * 80_000),
        ("t5 whole", ("<extra_id_0>" + " " * 20) * 20_000),
        ("t5", "x" * 1_000_000),
        ("weights", "(a" * 50_000 + ")" * 50_000),
        ("weights", "(" * 50_000 + " " * 50_000 + ")" * 50_000),
        ("weights", "(:" + "1" * 200_000 + "x)"),
    ],
    ids=range(10),
)
def test_a_hostile_prompt_takes_bounded_time(tables, function, prompt):
    functions = {
        "clip": lambda: bpe.apply(tables[0], prompt),
        "clip whole": lambda: bpe.apply(tables[0], prompt, length=None),
        "t5": lambda: unigram.apply(tables[1], prompt),
        "t5 whole": lambda: unigram.apply(tables[1], prompt, length=None),
        "weights": lambda: weighting.parse(prompt),
    }
    started = time.process_time()
    functions[function]()
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("prompt", ["two letters", "unknown characters", "a letter with marks", "end tokens"])
def test_all_chunks_of_a_long_prompt_are_read(tables, prompt):
    (chunks,) = weighting.clip_rows(tables[0], [weighting.parse(PROMPTS[prompt])], 77, long=True)
    (whole,) = bpe.apply(tables[0], PROMPTS[prompt], length=None)
    assert torch.cat([chunk.ids[1:76] for chunk in chunks]).tolist()[: len(whole) - 2] == whole[1:-1]


@settings(max_examples=100)
@given(st.data())
def test_the_first_merged_tokens_are_those_of_the_whole_for_any_merges(data):
    """Merges over three symbols in any order: the beginnings of a word decide its first tokens."""
    spelt = {0: "a", 1: "b", 2: "c"}
    ranks: dict[tuple[int, int], int] = {}
    merged: list[int] = []
    for _ in range(data.draw(st.integers(0, 6))):
        pair = tuple(data.draw(st.sampled_from(sorted(spelt))) for _ in range(2))
        if pair in ranks or len(spelt[pair[0]] + spelt[pair[1]]) > 5:
            continue
        ranks[pair] = len(merged)
        merged.append(len(spelt))
        spelt[len(spelt)] = spelt[pair[0]] + spelt[pair[1]]
    merges = Merges(ranks, merged, max(map(len, spelt.values())))
    pattern = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
    symbols = (pattern * 300)[: data.draw(st.integers(1, 300))] + data.draw(st.lists(st.integers(0, 2), max_size=5))
    count = data.draw(st.integers(0, 9))
    assert merge_first(merges, symbols, count) == merge(merges, symbols)[:count]


@pytest.mark.parametrize("size", [400, 401])
def test_first_tokens_that_the_end_of_a_word_decides_are_those_of_the_whole(size):
    """Pairs are joined from the end, so that whether the first two symbols are depends on how many there are."""
    ranks = {(index, index + 1): size - index for index in range(size)}
    merges = Merges(ranks, [1000 + rank for rank in range(size + 1)], 2)
    symbols = list(range(size))
    assert merge_first(merges, symbols, 5) == merge(merges, symbols)[:5]
    assert (merge(merges, symbols)[0] == 0) == (size % 2 == 1)


@pytest.mark.parametrize("size", [2000, 2001])
def test_first_pieces_that_the_end_of_a_word_decides_are_those_of_the_whole(size, monkeypatch):
    """A single letter costs much, so that the number of letters decides how they are paired."""
    monkeypatch.setattr(viterbi, "_LONG_WORD", 0)
    built = unigram.from_pieces([("▁", -1.0), ("▁a", -9.0), ("a", -90.0), ("aa", -1.0)])
    (whole,) = unigram.apply(built, "a" * size, length=None)
    assert unigram.apply(built, "a" * size, length=4)[0].tolist() == [*whole[:3], built.eos_id]


def test_a_long_word_is_merged_from_its_beginning_alone(tables, monkeypatch):
    merges = tables[0].merges
    sizes = []

    def counted(merges, symbols):
        sizes.append(len(symbols))
        return merge(merges, symbols)

    monkeypatch.setattr("functional_sd3.text.bpe.merge.merge", counted)
    symbols = [tables[0].inner[ord(letter)] for letter in "redcircle" * 20_000]
    assert merge_first(merges, symbols, 75) == merge(merges, symbols)[:75]
    assert max(sizes) < 2_000 and sum(sizes) < len(symbols)


@pytest.mark.parametrize("seed", range(25))
def test_the_first_pieces_are_those_of_the_whole_for_any_pieces(seed, monkeypatch):
    monkeypatch.setattr(viterbi, "_LONG_WORD", 0)
    draw = random.Random(seed)
    names = {"".join(draw.choices("abc", k=draw.randrange(1, 5))) for _ in range(draw.randrange(1, 8))}
    built = unigram.from_pieces([("▁", -2.0), *((name, -draw.randrange(1, 40) / 8) for name in sorted(names))])
    pattern = "".join(draw.choices("abcd", k=draw.randrange(1, 12)))
    text = pattern * (1500 // len(pattern)) + "".join(draw.choices("abc", k=draw.randrange(6)))
    length = draw.randrange(1, 12)
    for mode in ("hf", "sentencepiece"):
        (whole,) = unigram.apply(built, text, length=None, mode=mode)
        assert unigram.apply(built, text, length=length, mode=mode)[0].tolist() == (
            whole if len(whole) <= length else [*whole[: length - 1], built.eos_id]
        ) + [built.pad_id] * (length - len(whole))


def test_a_long_text_without_spaces_is_segmented_from_its_beginning_alone(tables, monkeypatch):
    sizes = []
    origins = viterbi._origins

    def counted(lattice, text):
        sizes.append(len(text))
        return origins(lattice, text)

    monkeypatch.setattr(viterbi, "_origins", counted)
    unigram.apply(tables[1], "redcircle" * 20_000, length=64)
    assert sizes and max(sizes) < 5_000


@pytest.mark.parametrize("length", [2, 3, 10, 77])
def test_offsets_of_the_kept_ids_are_the_first_of_all(tables, length):
    for text in ("a large red circle! <extra_id_0> <|endoftext|> e\u0301☃ xyz" * 3, ""):
        (whole,) = bpe.offsets(tables[0], text)
        assert bpe.offsets(tables[0], text, length=length) == [[*whole[:-1][: length - 1], (0, 0)]]
        (whole,) = unigram.offsets(tables[1], text)
        assert unigram.offsets(tables[1], text, length=length) == [[*whole[:-1][: length - 1], (0, 0)]]


def test_long_runs_of_marks_are_normalised_as_unicodedata_does():
    draw = random.Random(0)
    marks = [c for c in map(chr, range(0x300, 0x370)) if unicodedata.combining(c)]
    for _ in range(20):
        text = "Ae" + "".join(draw.choices(marks, k=300)) + draw.choice(["", "b", "Σ", "\u0f73"])
        assert bpe_text._has_long_run(text) and not bpe_text._has_long_run(text[:200])
        assert bpe_text.normalize(text) == unicodedata.normalize("NFC", text).replace("Σ", "σ").lower()


def test_three_characters_that_are_no_marks_decompose_to_marks():
    """They are counted as marks; a fourth would hide a long run."""
    actual = [
        character
        for character in map(chr, range(0x110000))
        if not unicodedata.combining(character)
        and (first := unicodedata.normalize("NFD", character)[:1]) != character
        and unicodedata.combining(first)
    ]
    assert [ord(character) for character in actual] == list(bpe_text._DECOMPOSING_TO_MARKS)


def by_recursion(prompt):
    """The notation read by its definition: the innermost group first. [(character, weight)] of a prompt."""
    read = [(part, 1.0) for part in re.findall(r"\\[()\\]|.", prompt, re.DOTALL)]
    opened = []
    index = 0
    while index < len(read):
        if read[index][0] == "(":
            opened.append(index)
        elif read[index][0] == ")" and opened:
            start = opened.pop()
            inside = read[start + 1 : index]
            written = "".join("\0" if len(part) > 1 else part for part, _ in inside)
            match = re.search(r"\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*$", written)
            weight = float(match[1]) if match else 1.1
            inside = [(part, one * weight) for part, one in (inside[: match.start()] if match else inside)]
            # A parenthesis without its other half is a character, which later groups must not see as their own.
            read[start : index + 1] = inside
            index = start + len(inside) - 1
        index += 1
    return read


@settings(max_examples=150)
@given(st.lists(st.sampled_from(["(", ")", "(", ")", ":1.3)", ":", "1.3", ".5", "-2", " ", "\n", "\\", "a", "b"])))
def test_groups_are_those_of_the_definition(parts):
    prompt = "".join(parts)
    expected = by_recursion(prompt)
    parsed = weighting.parse(prompt)
    assert parsed.text == "".join(part[-1] for part, _ in expected)
    assert parsed.weights == pytest.approx([weight for _, weight in expected], rel=1e-12)


def test_weights_of_thousands_of_groups_stay_finite():
    assert weighting.parse("(" * 20_000 + "a" + ")" * 20_000) == weighting.Weighted("a", (1e30,))
    assert weighting.parse("(" * 20_000 + "(a:0)" + ")" * 20_000) == weighting.Weighted("a", (0.0,))


@pytest.mark.parametrize("texts", [None, 5, b"abc", bytearray(b"a"), [b"a"], [None], [["a"]], "\ud800", ["\udfff"]])
@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_texts_of_another_type_are_named(tables, name, texts):
    module, own = (bpe, tables[0]) if name == "bpe" else (unigram, tables[1])
    for call in (module.apply, module.offsets):
        with pytest.raises(ValueError, match="text"):
            call(own, texts)


@pytest.mark.parametrize("length", ["77", 77.0, True, -1, float("inf"), [77]])
@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_lengths_of_another_type_are_named(tables, name, length):
    module, own = (bpe, tables[0]) if name == "bpe" else (unigram, tables[1])
    with pytest.raises(ValueError, match="length"):
        module.apply(own, "a", length=length)
