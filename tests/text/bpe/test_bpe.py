"""The byte-pair tokenizer on a small trained vocabulary: properties of any tokenizer of this format."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.formats.errors import WeightsError
from functional_sd3.text import bpe
from functional_sd3.text.bpe import words as bpe_text
from functional_sd3.text.bpe.training import train

CORPUS = [
    f"a {size} {colour} {shape} {relation} a {other} square on a white background, it's 1 of 25!"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for shape in ("circle", "star", "ring")
    for relation in ("left of", "above")
    for other in ("purple", "yellow")
] + ["Ein schöner roter Kreis über dem blauen Stern", "你好，世界", "emoji 👩‍🚀 and café"]
VOCAB, MERGES = train(CORPUS, 700)
TABLES = bpe.init(VOCAB, MERGES)
BOS, EOS = VOCAB["<|startoftext|>"], VOCAB["<|endoftext|>"]

texts = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=40)


def plain(text, **options):
    (ids,) = bpe.apply(TABLES, text, length=None, **options)
    return ids


def test_ids_start_with_the_start_token_end_with_the_end_token_and_are_padded_with_the_pad():
    ids = bpe.apply(TABLES, ["a red circle", ""], length=10)
    assert ids.shape == (2, 10) and ids.dtype == torch.long
    assert ids[0].tolist() == [BOS, VOCAB["a</w>"], VOCAB["red</w>"], VOCAB["circle</w>"]] + [EOS] * 6
    assert ids[1].tolist() == [BOS] + [EOS] * 9


def test_the_default_length_is_77_and_one_string_is_a_batch_of_one():
    assert bpe.apply(TABLES, "a red circle").shape == (1, 77)
    assert bpe.apply(TABLES, []).shape == (0, 77)
    assert bpe.apply(TABLES, [], length=None) == []


@given(texts, st.integers(2, 30))
def test_truncation_keeps_the_first_tokens_and_the_end_token(text, length):
    content = plain(text, special_tokens=False)[1:-1]
    (row,) = bpe.apply(TABLES, text, length=length, special_tokens=False).tolist()
    kept = content[: length - 2]
    assert row == [BOS, *kept, EOS] + [EOS] * (length - 2 - len(kept))


@given(st.lists(texts, max_size=4))
def test_a_row_does_not_depend_on_its_batch(batch):
    rows = bpe.apply(TABLES, batch, length=20)
    assert torch.equal(rows, torch.cat([bpe.apply(TABLES, text, length=20) for text in batch] + [rows[:0]]))


@given(texts)
def test_encoding_decoded_text_gives_the_same_ids(text):
    ids = plain(text, special_tokens=False)
    assert plain(bpe.decode(TABLES, ids), special_tokens=False) == ids


def test_decoding_gives_the_words_in_lower_case_parted_by_spaces():
    assert bpe.decode(TABLES, plain("  A Red\tCIRCLE, café!")) == "a red circle , café !"
    assert bpe.decode(TABLES, bpe.apply(TABLES, ["one", "two"], length=8)) == ["one", "two"]
    assert bpe.decode(TABLES, plain("ring"), skip_special=False) == "<|startoftext|>ring <|endoftext|>"
    assert bpe.decode(TABLES, []) == ""
    assert bpe.decode(TABLES, bpe.apply(TABLES, [])) == []
    assert bpe.decode(TABLES, list(bpe.apply(TABLES, ["one", "two"]))) == ["one", "two"]


def test_half_a_character_decodes_to_the_replacement_character():
    first_byte_of_e_acute = VOCAB["Ã"]
    assert bpe.decode(TABLES, [first_byte_of_e_acute]) == "\ufffd"


@given(texts)
def test_offsets_are_monotone_and_cover_every_character_that_is_not_a_space(text):
    normal = bpe_text.normalize(text)
    (spans,) = bpe.offsets(TABLES, normal, special_tokens=False)
    assert len(spans) == len(plain(normal, special_tokens=False))
    assert spans[0] == spans[-1] == (0, 0)
    inner = spans[1:-1]
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(inner, inner[1:], strict=False))
    # lower-casing may leave pairs that NFC would join; a joined character points at its first part
    covered = {position for start, end in inner for position in range(start, end)}
    aligned = bpe_text.normalize_aligned(normal)
    spaces = {source for character, source in zip(*aligned, strict=True) if character.isspace()}
    assert {*aligned.sources} - spaces - covered <= {s for s in aligned.sources if normal[s] in "\x1c\x1d\x1e\x1f"}
    assert covered.isdisjoint(s for s in spaces if normal[s] not in "\x1c\x1d\x1e\x1f")


@given(texts)
def test_the_aligned_normal_form_equals_the_plain_one(text):
    aligned = bpe_text.normalize_aligned(text)
    assert aligned.text == bpe_text.normalize(text)
    assert len(aligned.sources) == len(aligned.text)


def test_lower_case_goes_character_by_character_after_composition():
    assert bpe_text.normalize("ΑΣ") == "ασ"
    assert bpe_text.normalize("İ") == "i\u0307"
    assert bpe_text.normalize("E\u0301") == "é"
    assert bpe_text.normalize("J\u030c") == "j\u030c"


def test_letters_digits_and_the_rest_are_split_by_their_unicode_category():
    text = "it's²½x一२a\u0301\u0302\u2028\x1c'll!?\u0085don’t"
    assert bpe_text.words(bpe_text.WORDS, text) == [
        *("it", "'s", "²", "½", "x一", "२", "a", "\u0301\u0302", "\x1c'", "ll", "!?", "don", "’", "t")
    ]


def test_offsets_point_into_the_text_as_it_was_written():
    text = "A  Red CIRCLE"
    (spans,) = bpe.offsets(TABLES, text)
    assert [text[start:end] for start, end in spans] == ["", "A", "Red", "CIRCLE", ""]


def test_special_tokens_typed_into_a_text_count_by_default():
    text = "red<|endoftext|>blue"
    assert plain(text) == [BOS, VOCAB["red</w>"], EOS, VOCAB["blue</w>"], EOS]
    assert EOS not in plain(text, special_tokens=False)[:-1]
    assert plain("<|startoftext|><|endoftext|>", special_tokens=["<|endoftext|>"])[-2:] == [EOS, EOS]
    assert BOS not in plain("<|startoftext|>", special_tokens=["<|endoftext|>"])[1:]


def test_a_pad_token_of_its_own_is_cut_out_of_texts_as_transformers_does_unless_it_is_not_listed():
    tables = bpe.init(VOCAB, MERGES, pad_token="!", model_max_length=12)
    bang, at_the_end = VOCAB["!"], VOCAB["!</w>"]
    assert (tables.pad_id, tables.model_max_length) == (bang, 12)
    assert bpe.apply(tables, "ring!", length=6).tolist() == [[BOS, VOCAB["ring</w>"], bang, EOS, bang, bang]]
    only_ends = ("<|startoftext|>", "<|endoftext|>")
    (ids,) = bpe.apply(tables, "ring!", length=6, special_tokens=only_ends).tolist()
    assert ids == [BOS, VOCAB["ring</w>"], at_the_end, EOS, bang, bang]


def test_pad_token_overrides_by_string_or_by_id():
    expected = [BOS, VOCAB["ring</w>"], EOS, 0, 0]
    assert bpe.apply(TABLES, "ring", length=5, pad_token="!").tolist() == [expected]
    assert bpe.apply(TABLES, "ring", length=5, pad_token=0).tolist() == [expected]


def test_one_word_of_ten_thousand_letters_is_encoded_in_full():
    ids = plain("redring" * 1500)
    assert bpe.decode(TABLES, ids) == "redring" * 1500
    assert bpe.apply(TABLES, "👩‍🚀" * 10_000)[0, -1] == EOS


def test_a_cleaner_is_applied_first():
    assert plain("&lt;Red&amp;Blue&gt;", clean=bpe.openai_clean) == plain("<red&blue>")
    assert plain("你好", clean=bpe.basic_clean) == plain("你 好")
    assert plain("re\u200bd", clean=bpe.basic_clean) == plain("red")


@settings(max_examples=20)
@given(st.lists(texts, max_size=3))
def test_nothing_changes_the_tables(batch):
    before = copy.deepcopy(TABLES)
    ids = bpe.apply(TABLES, batch)
    bpe.offsets(TABLES, batch)
    bpe.decode(TABLES, ids)
    assert before == TABLES
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLES.pad_id = 1


def test_tables_survive_pickling():
    assert pickle.loads(pickle.dumps(TABLES)) == TABLES


def test_a_whole_word_is_looked_up_only_where_merging_reaches_it():
    vocab = {token: i for i, token in enumerate(["a", "b", "c</w>", "ab", "abc</w>", "bc</w>", "<|startoftext|>"])}
    vocab["<|endoftext|>"] = len(vocab)
    tables = bpe.init(vocab, [("b", "c</w>"), ("a", "b"), ("ab", "c</w>")])
    assert bpe.apply(tables, "abc", length=None) == [[6, vocab["a"], vocab["bc</w>"], 7]]
    assert "abc" not in tables.whole_word_ids


def test_bytes_that_a_vocabulary_lacks_become_its_unknown_token():
    vocab = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    assert bpe.apply(bpe.init(vocab, []), "aba z", length=None) == [[2, 0, 3, 1, 3, 3]]
    assert bpe.offsets(bpe.init(vocab, []), "aba z") == [[(0, 0), (0, 1), (1, 2), (2, 3), (4, 5), (0, 0)]]


def test_init_reads_the_files_that_save_wrote(tmp_path):
    tables = bpe.init((VOCAB, MERGES), pad_token="!", model_max_length=24)
    bpe.save(tmp_path / "new" / "folder", tables)
    assert bpe.init(tmp_path / "new" / "folder") == tables
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_training_is_deterministic_and_does_not_depend_on_the_order_of_the_corpus():
    assert train(CORPUS[::-1], 700) == (VOCAB, MERGES)


def test_a_trained_vocabulary_is_laid_out_as_clips():
    tokens = list(VOCAB)
    assert list(VOCAB.values()) == list(range(len(VOCAB)))
    assert tokens[:3] == ["!", '"', "#"] and tokens[256:258] == ["!</w>", '"</w>']
    assert tokens[512:-2] == list(dict.fromkeys(left + right for left, right in MERGES))
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert 514 < len(VOCAB) <= 700


def test_the_first_merge_joins_the_most_frequent_pair():
    _, merges = train(["abab ab", "xy"], 516)
    assert merges == [("a", "b</w>")]
    assert train(["ab ab xy xy"], 515)[1] == [("a", "b</w>")]
    assert train(["ab xy"], 600)[1] == []
    assert len(train(["ab xy"], 600, min_frequency=1)[1]) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bpe.apply(TABLES, "a", length=1), "length 1 .* at least 2"),
        (lambda: bpe.apply(TABLES, ["a", 3]), "text 1 is of type int"),
        (lambda: bpe.apply(TABLES, "\ud800"), "lone surrogate"),
        (lambda: bpe.apply(TABLES, "a", pad_token="<pad>"), "'<pad>' is not in the vocabulary"),
        (lambda: bpe.apply(TABLES, "a", pad_token=10_000), "10000 is not an id"),
        (lambda: bpe.apply(TABLES, "a", special_tokens=["<x>"]), "<x>.* are not among"),
        (lambda: bpe.apply(TABLES, "a", special_tokens="<|endoftext|>"), "is the string"),
        (lambda: bpe.decode(TABLES, [10_000]), "10000.* not in the vocabulary"),
        (lambda: bpe.init(3), "source is a int"),
        (lambda: train(["a"], 513), "vocab_size 513 .* 514"),
        (lambda: bpe.init(VOCAB, MERGES, model_max_length=1), "model_max_length is 1"),
        (lambda: bpe.init(VOCAB, MERGES, pad_token="<pad>"), "pad_token '<pad>' is not in the vocabulary"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_problem_of_a_folder_is_in_one_error_with_its_path(tmp_path):
    bpe.save(tmp_path, TABLES)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    vocab = {token: i for token, i in VOCAB.items() if token != "<|endoftext|>"}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    config = {"model_max_length": "77", "bos_token": "<bos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text("[]")
    with pytest.raises(ValueError) as caught:
        bpe.init(tmp_path)
    arguments = str(caught.value)
    for part in (
        str(tmp_path),
        "'a b c'",
        "model_max_length is '77'",
        "bos_token '<bos>' is not in the vocabulary",
        "eos_token '<|endoftext|>' is not in the vocabulary",
        "special_tokens_map.json: is [], not a JSON object",
    ):
        assert part in arguments


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", None, "vocab.json: .*no such file"),
        ("vocab.json", "{", "vocab.json: "),
        ("vocab.json", '{"a": "0"}', "are not token: id"),
        ("vocab.json", '{"a": 0, "b": 0}', "'a' and 'b' .0."),
        ("vocab.json", "{}", "empty"),
        ("merges.txt", None, "merges.txt: .*no such file"),
        ("merges.txt", "zz zz\n", "vocabulary lacks, such as 'zz . zz'"),
        ("merges.txt", b"a\xff", "merges.txt: .*UTF-8: byte 1"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": {"content": "!"}}}', "'!' has id 3, .* is 0"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": {"content": "<x>"}}}', "'<x>' has id 0, .*by '!'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": 3}}', "added_tokens_decoder: a is 3"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    bpe.save(tmp_path, TABLES)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        bpe.init(tmp_path)


def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "Unigram", "vocab": VOCAB, "merges": MERGES}, "pre_tokenizer": None}))
    with pytest.raises(ValueError, match="'Unigram'.*pre_tokenizer"):
        bpe.init(path)


def test_a_failed_save_leaves_the_old_files_whole(tmp_path, monkeypatch):
    bpe.save(tmp_path, TABLES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(WeightsError, match="vocab.json: cannot be written: disk full"):
        bpe.save(tmp_path, bpe.init(VOCAB, MERGES, pad_token="!"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
