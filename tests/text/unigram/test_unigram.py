import copy
import dataclasses
import itertools
import json
import math
import pickle
import random
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.formats.errors import WeightsError
from functional_sd3.text import unigram
from functional_sd3.text.unigram import charsmap, sentencepiece_file, training
from functional_sd3.text.unigram.graphemes import clusters
from functional_sd3.text.unigram.tables import SPACE

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
CAPTIONS = [
    f"a {size} {colour} {shape} on a {ground} background"
    for size, colour, shape, ground in itertools.product(("small", "large"), COLOURS, SHAPES, COLOURS)
    if colour != ground
]
SMALL_WORLD = st.text(alphabet="abcdelrst ▁AZ\t\n\u00a0é\u0301☃<>/", max_size=40)


@pytest.fixture(scope="module")
def tables():
    plain = unigram.plain_charsmap()
    return unigram.from_pieces(
        unigram.train(CAPTIONS, 70, charsmap=plain), charsmap=plain, extra_ids=3, model_max_length=77
    )


@pytest.fixture(scope="module")
def bare():
    """No character map, scores that leave room for ties and for better paths than the longest piece."""
    pieces = {"▁": -2.0, "a": -1.0, "b": -1.5, "ab": -2.5, "ba": -2.0, "aba": -3.75, "bb": -4.0}
    pieces |= {"▁a": -3.0, "▁ab": -4.75}
    return unigram.from_pieces(pieces.items(), extra_ids=2)


def segmentations(text, scores, unknown):
    """Every way to cut `text`, with its score."""
    if not text:
        yield 0.0, ()
        return
    for end in range(1, len(text) + 1):
        piece = text[:end]
        score = scores.get(piece, unknown if end == 1 else None)
        if score is not None:
            for rest, pieces in segmentations(text[end:], scores, unknown):
                yield score + rest, (piece, *pieces)


@given(word=st.text(alphabet="abc", min_size=1, max_size=9))
@pytest.mark.parametrize("mode", ["hf", "sentencepiece"])
def test_no_segmentation_is_more_probable_than_the_one_chosen(bare, mode, word):
    scores = {p: s for p, s in zip(bare.pieces, bare.scores, strict=True) if not p.startswith("<")}
    unknown = min(bare.scores) - 10
    (ids,) = unigram.apply(bare, word, length=None, mode=mode)
    spans = unigram.offsets(bare, word, mode=mode)[0][:-1]
    unknowns = sum(end - start for token, (start, end) in zip(ids, spans, strict=False) if token == bare.unk_id)
    chosen = sum(bare.scores[token] for token in ids[:-1] if token != bare.unk_id) + unknowns * unknown
    assert chosen == pytest.approx(max(score for score, _ in segmentations(SPACE + word, scores, unknown)))


@pytest.mark.parametrize("mode", ["hf", "sentencepiece"])
@pytest.mark.parametrize("last, unknown_first", [(-10.9, False), (-11.1, True)])
def test_an_unknown_character_costs_ten_more_than_the_least_probable_piece(mode, last, unknown_first):
    # xyz is xy (-12) and z, or an unknown x (-12 - 10) and yz (-1).
    pieces = unigram.from_pieces([("▁", -1.0), ("xy", -12.0), ("z", last), ("yz", -1.0)])
    ids = unigram.apply(pieces, "xyz", length=None, mode=mode)[0][1:-1]
    assert [pieces.pieces[index] for index in ids] == (["<unk>", "yz"] if unknown_first else ["xy", "z"])


@given(text=st.text(alphabet="ab ", max_size=30))
def test_a_word_looked_up_whole_gets_the_ids_that_the_search_gives(bare, text):
    # "▁a" ties with "▁ a" and comes first; "▁ab" loses to "▁ ab".
    assert bare.whole_word_ids == {"": bare.pieces.index("▁"), "a": bare.pieces.index("▁a")}
    searched = dataclasses.replace(bare, whole_word_ids={})
    assert unigram.apply(bare, text, length=None) == unigram.apply(searched, text, length=None)


@given(text=SMALL_WORLD)
@pytest.mark.parametrize("mode", ["hf", "transformers", "sentencepiece"])
def test_every_token_has_a_span_and_spans_move_forward_inside_the_text(tables, mode, text):
    (ids,), (spans,) = unigram.apply(tables, text, length=None, mode=mode), unigram.offsets(tables, text, mode=mode)
    assert len(spans) == len(ids) and spans[-1] == (0, 0)
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    assert all(one[0] <= other[0] and one[1] <= other[1] for one, other in itertools.pairwise(spans[:-1]))


def test_spans_cut_the_caption_into_its_words(tables):
    caption = "A  Large red\tcircle"
    spans = unigram.offsets(tables, caption)[0]
    assert [caption[start:end].strip() for start, end in spans[:-1]] == ["A", "Large", "red", "circle"]


@given(text=SMALL_WORLD, length=st.integers(1, 12))
def test_cutting_keeps_the_end_token_and_everything_before_it(tables, text, length):
    (whole,) = unigram.apply(tables, text, length=None)
    row = unigram.apply(tables, text, length=length)
    assert row.shape == (1, length) and row.dtype == torch.int64
    content = whole[:-1][: length - 1]
    assert row[0].tolist() == content + [tables.eos_id] + [tables.pad_id] * (length - 1 - len(content))


@given(texts=st.lists(SMALL_WORLD, max_size=4))
def test_ids_of_a_text_do_not_depend_on_its_batch(tables, texts):
    together = unigram.apply(tables, texts, length=9)
    assert together.shape == (len(texts), 9)
    for row, text in zip(together, texts, strict=True):
        assert torch.equal(row, unigram.apply(tables, text, length=9)[0])


@given(words=st.lists(st.sampled_from("a small large red Circle star on the bakcground".split()), max_size=8))
@pytest.mark.parametrize("mode", ["hf", "transformers", "sentencepiece"])
def test_decoding_gives_back_the_normalised_text(tables, mode, words):
    text = " \t ".join(words)
    (ids,) = unigram.apply(tables, text, length=None, mode=mode)
    known = all(token != tables.unk_id for token in ids)
    assert unigram.normalize(tables, text, mode=mode) == " ".join(words).lower()
    assert not known or unigram.decode(tables, ids) == " ".join(words).lower()
    assert unigram.decode(tables, [ids, ids]) == [unigram.decode(tables, ids)] * 2


def test_decoding_keeps_special_tokens_only_on_request(tables):
    ids = unigram.apply(tables, "red star<extra_id_1>", length=8)
    assert unigram.decode(tables, ids) == ["red star"]
    assert unigram.decode(tables, ids, skip_special=False) == ["red star<extra_id_1></s>" + "<pad>" * 4]


def test_typed_special_tokens_are_tokens_or_text_by_option(tables):
    sentinel = tables.pieces.index("<extra_id_0>")
    (ids,) = unigram.apply(tables, "red <extra_id_0> star</s>", length=None)
    red, star = (unigram.apply(tables, word, length=None)[0][:-1] for word in ("red", "star"))
    assert ids == [*red, sentinel, *star, tables.eos_id, tables.eos_id]
    (ids,) = unigram.apply(tables, "red <extra_id_0> star</s>", length=None, typed_specials=False)
    assert ids.count(tables.eos_id) == 1 and sentinel not in ids and tables.unk_id in ids
    assert len(unigram.offsets(tables, "red </s>", typed_specials=False)[0]) == len(
        unigram.apply(tables, "red </s>", length=None, typed_specials=False)[0]
    )


def test_saved_and_copied_tables_equal_the_original(tables, bare, tmp_path):
    for index, one in enumerate((tables, bare)):
        unigram.save(tmp_path / str(index), one)
        assert unigram.init(tmp_path / str(index)) == one
    assert copy.deepcopy(tables) == tables == pickle.loads(pickle.dumps(tables))
    assert tables != bare
    unigram.save(tmp_path / "0", bare)
    assert unigram.init(tmp_path / "0") == bare
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == [
        *("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"),
    ]


def test_a_save_that_fails_leaves_the_old_files(tables, bare, tmp_path, monkeypatch):
    unigram.save(tmp_path, tables)

    def full(*_):
        raise OSError("no space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(f"os.{step}", full)
            with pytest.raises(WeightsError, match="spiece.model: cannot be written: no space"):
                unigram.save(tmp_path, bare)
        assert unigram.init(tmp_path) == tables and len(list(tmp_path.iterdir())) == 4


def test_the_sentencepiece_file_alone_gives_the_same_tokenizer_but_for_spacing(tables, tmp_path):
    unigram.save(tmp_path, tables)
    (tmp_path / "tokenizer.json").unlink()
    read = unigram.init(tmp_path)
    assert (read.pieces, read.scores, read.added) == (tables.pieces, tables.scores, tables.added)
    assert read.model_max_length == 77 and read.spacing == unigram.Spacing()
    assert unigram.apply(read, CAPTIONS, length=None) == unigram.apply(tables, CAPTIONS, length=None)


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda d: d["model"].update(type="BPE"), "'BPE'"),
        (lambda d: d["model"].update(byte_fallback=True), "byte_fallback True"),
        (lambda d: d["model"].update(unk_id=10**6), "unk_id 1000000 is outside"),
        (lambda d: d["model"].update(vocab={"a": 1}), "vocab is {'a': 1}, not a list"),
        (lambda d: d["model"]["vocab"].append(["▁a", -1.0]), "occur twice: ['▁a']"),
        (lambda d: d["model"]["vocab"].append(["zz", None]), "list of [piece, score] pairs"),
        (lambda d: d["model"]["vocab"].append(["zz", math.nan]), "NaN is no number"),
        (lambda d: d["model"]["vocab"].append(["zz", 10**400]), "not finite"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
        (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda d: d["normalizer"]["normalizers"][0].update(precompiled_charsmap="AAAA"), "character map"),
        (lambda d: d["normalizer"]["normalizers"][0].update(precompiled_charsmap="?"), "base64"),
        (lambda d: d["added_tokens"][0].update(single_word=True), "'<pad>'"),
        (lambda d: d["added_tokens"][0].update(id=5), "'<pad>' has id 5"),
        (lambda d: d["post_processor"].update(single=[]), "post_processor"),
    ],
)
def test_a_tokenizer_file_with_unsupported_settings_is_refused_by_path_and_reason(tables, tmp_path, change, problem):
    unigram.save(tmp_path, tables)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as raised:
        unigram.init(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(raised.value) and problem in str(raised.value)


def test_files_that_are_missing_or_broken_are_named(tables, tmp_path):
    with pytest.raises(ValueError, match="holds neither tokenizer.json nor spiece.model"):
        unigram.init(tmp_path)
    with pytest.raises(ValueError, match="absent.model"):
        unigram.init(tmp_path / "absent.model")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: "):
        unigram.init(tmp_path)
    unigram.save(tmp_path, tables)
    whole = (tmp_path / "spiece.model").read_bytes()
    for cut in random.Random(0).sample(range(len(whole)), 200):
        (tmp_path / "spiece.model").write_bytes(whole[:cut])
        try:
            read = unigram.init(tmp_path / "spiece.model")
        except ValueError as error:
            assert str(tmp_path / "spiece.model") in str(error)
        else:
            assert read.pieces[0] == "<pad>"  # the cut fell between two fields


def test_arguments_that_make_no_sense_are_named(tables):
    with pytest.raises(ValueError, match="length is 0"):
        unigram.apply(tables, "a", length=0)
    with pytest.raises(ValueError, match="mode is 'slow'"):
        unigram.apply(tables, "a", mode="slow")
    with pytest.raises(ValueError, match="text 1 is of type int, 3; a string is right"):
        unigram.apply(tables, ["a", 3])
    with pytest.raises(ValueError, match="surrogate"):
        unigram.apply(tables, "\ud83d")
    with pytest.raises(ValueError, match=r"ids \[999\]"):
        unigram.decode(tables, [999])


@given(
    mapping=st.dictionaries(
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=4),
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=3),
        max_size=30,
    ),
    text=st.text(st.characters(codec="utf-8"), max_size=12),
)
def test_a_built_character_map_finds_exactly_its_keys(mapping, text):
    read = charsmap.parse(charsmap.build(mapping))
    for probe in (text, *mapping, *(key + text for key in mapping)):
        ends = {len(key.encode()): value for key, value in mapping.items() if probe.startswith(key)}
        actual = {end: charsmap.replacement(read, place) for end, place in charsmap.matches(read, probe.encode())}
        assert actual == ends


def test_a_character_map_that_points_outside_itself_is_refused():
    blob = bytearray(charsmap.build({"a": "b", "ab": "c"}))
    for bad in (b"", blob[:8], blob[:-1], struct.pack("<I", 1020) + blob[4:]):
        with pytest.raises(ValueError, match="character map"):
            charsmap.parse(bytes(bad))
    blob[4:8] = struct.pack("<I", 5000 << 10)
    with pytest.raises(ValueError, match="points outside"):
        charsmap.parse(bytes(blob))
    with pytest.raises(ValueError, match="free of NUL"):
        charsmap.build({"": "x"})


@given(
    pieces=st.lists(
        st.tuples(st.text(st.characters(codec="utf-8"), min_size=1), st.floats(width=32, allow_nan=False)), min_size=1
    ),
    blob=st.binary(max_size=300),
)
def test_a_sentencepiece_model_reads_back_as_it_was_written(pieces, blob):
    kinds = itertools.chain([sentencepiece_file.UNKNOWN], itertools.repeat(sentencepiece_file.NORMAL))
    written = sentencepiece_file.SentencePieceModel(
        tuple(sentencepiece_file.Piece(*piece, kind) for piece, kind in zip(pieces, kinds, strict=False)), blob
    )
    assert sentencepiece_file.parse(sentencepiece_file.serialize(written)) == written


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a\u0301b", ["a\u0301", "b"]),
        ("\r\n\n", ["\r\n", "\n"]),
        ("\u200b\u0301", ["\u200b", "\u0301"]),
        ("\u1100\u1161\u11a8\u1100", ["\u1100\u1161\u11a8", "\u1100"]),
        ("\uac00\u11a8\uac01\u1161", ["\uac00\u11a8", "\uac01", "\u1161"]),
        ("\U0001f468\u200d\U0001f469x", ["\U0001f468\u200d\U0001f469", "x"]),
        ("a\u200d\u2122", ["a\u200d", "\u2122"]),
        ("\u0915\u094d\u0915\u0915", ["\u0915\u094d\u0915", "\u0915"]),
        ("\u0600a", ["\u0600a"]),
        ("\u0e01\u0e33", ["\u0e01\u0e33"]),
    ],
)
def test_grapheme_clusters_follow_the_rules_of_annex_29(text, expected):
    assert clusters(text) == expected


def test_training_is_deterministic_and_ignores_the_order_of_the_texts():
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    assert unigram.train(CAPTIONS, 60) == unigram.train(shuffled, 60)


@pytest.mark.parametrize("size", [30, 45, 70])
def test_a_trained_vocabulary_has_the_requested_size_and_encodes_every_text(size):
    pieces = unigram.train(CAPTIONS, size)
    assert len(pieces) <= size and len({piece for piece, _ in pieces}) == len(pieces)
    assert {c for caption in CAPTIONS for c in caption if c != " "} <= {piece for piece, _ in pieces}
    assert sum(math.exp(score) for _, score in pieces) <= 1.01
    trained = unigram.from_pieces(pieces)
    rows = unigram.apply(trained, CAPTIONS, length=None)
    assert all(trained.unk_id not in row for row in rows)
    assert unigram.decode(trained, rows) == CAPTIONS


def test_training_gives_words_of_a_small_closed_world_one_token_each():
    pieces = dict(unigram.train(CAPTIONS, 70))
    assert all(SPACE + word in pieces for word in (*COLOURS, *SHAPES, "small", "large", "background"))


def test_expected_counts_of_training_are_those_over_all_segmentations():
    scores = {"a": -1.0, "b": -2.0, "ab": -1.5, "ba": -2.5, "aba": -4.0}
    everything = list(segmentations("abab", scores, -math.inf))
    everything = [(score, pieces) for score, pieces in everything if score > -math.inf]
    total = sum(math.exp(score) for score, _ in everything)
    expected = training._expected({"abab": 3}, scores)
    for piece in scores:
        direct = sum(3 * math.exp(score) / total * pieces.count(piece) for score, pieces in everything)
        assert expected.get(piece, 0.0) == pytest.approx(direct)


def test_pruning_keeps_the_piece_whose_loss_would_cost_most_rather_than_the_likeliest():
    scores = {"a": -4.0, "b": -4.0, "c": -4.0, "d": -4.0, "ab": -3.0, "cd": -2.0}
    kept = training._pruned({"abab": 10, "cd": 1}, scores, set("abcd"), 5)
    assert kept == {piece: score for piece, score in scores.items() if piece != "cd"}


def test_the_maximisation_of_training_is_a_difference_of_digammas():
    """digamma(1) = -e, digamma(1/2) = -e - 2 log 2, digamma(20) = sum_{k < 20} 1/k - e, with e Euler's constant."""
    euler = 0.5772156649015329
    twenty = sum(1 / k for k in range(1, 20)) - euler
    scores = training._maximized({"a": 1.0, "b": 0.5, "c": 18.5}, set("abc"))
    assert scores["a"] == pytest.approx(-euler - twenty, abs=1e-12)
    assert scores["b"] == pytest.approx(-euler - 2 * math.log(2) - twenty, abs=1e-12)


def test_training_refuses_impossible_sizes_and_empty_texts():
    with pytest.raises(ValueError, match="size is 3; the texts hold"):
        unigram.train(CAPTIONS, 3)
    with pytest.raises(ValueError, match="no words"):
        unigram.train(["", "  "], 10)
