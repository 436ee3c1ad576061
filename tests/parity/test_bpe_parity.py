"""CLIP's tokenizer against `tokenizers` and transformers' `CLIPTokenizer`: every id and offset, no mismatch allowed."""

import html
import json
import random
import shutil
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.text import bpe
from functional_sd3.text.bpe.training import train
from functional_sd3.weights import shipped

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

ASSIGNED = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
MARKS = [character for character in ASSIGNED if unicodedata.combining(character)]
DECOMPOSING = [character for character in ASSIGNED if unicodedata.decomposition(character)[:1] not in ("", "<")]

FRAGMENTS = [
    *("<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|StartOfText|>", "<|EndOfText|>!", "<|endoftext|", "</w>"),
    *("'s", "'S", "'t", "'re", "'ve", "'m", "'ll", "'d", "'ſ", "'", "’s", "it's", "THEY'LL", "rock'n'roll"),
    *("!", "!!", "!!!", '!",', "?!", "...", "(red:1.3)", "[cat]", "f/1.8", "#tag", "@user", "\\(", "--ar", "&amp;"),
    *("Σ", "ΑΣ", "ΌΣΟΣ Σ", "İ", "ı", "ﬁ", "ﬀ", "ß", "ẞ", "Ǆ", "ǅ", "K", "Å", "Ω", "ſ", "ŉ", "ΐ", "և", "Ა", "Ꭰ", "ꭰ"),
    *("½", "Ⅷ", "²", "①", "𝟘", "٣", "०", "一", "〇", "㊿", "1234", "3.14", "1e5", "௰", "𐄇"),
    *("你好，世界", "日本語テキスト", "한국어", "\u1100\u1161\u11a8", "각", "العربية", "עִבְרִית", "हिन्दी", "ไทย"),
    *("မြန်မာ", "Ελληνικά", "Русский"),
    *("👨‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇩🇪", "☺️", "✈", "🫠", "e\u0301", "\u0344", "o\u0308\u0323", "a\u0316\u0301", "\u0301"),
    *("\u00a0", "\u3000", "\u2028", "\u2003", "\u1680", "\u200b", "\u200d", "\u00ad", "\ufeff", "\u202e", "\ufffd"),
    *("\0", "\x01", "\x1b[31m", "\x1c", "\x1f", "\x7f", "\x85", "\t", "\r\n", "\n\n", "\v\f", " ", "   "),
    *("cat", "Dog", "photo of", "a painting by Zdzisław Beksiński", "schöner", "naïve café", "don’t", "U.S.A."),
    *("\U00011935\U00011930", "\u0f73", "\u0f71\u0f74", "\ue000", "\U0010fffd", "\ufdd0", "ǰ", "J\u030c", "ẗ"),
]
WORDS = "a the Photo of red golden cat dragon in under forest, street. neon-lit 4k (bokeh) artist's 35mm".split()


def sentences(count: int, seed: int) -> list[str]:
    """Captions, fragments of every kind glued together, marks in every order, single characters of the whole table."""
    draw = random.Random(seed)
    pools = [FRAGMENTS, [chr(c) for c in range(32, 127)], MARKS, DECOMPOSING, ASSIGNED]
    captions = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 40))) for _ in range(count // 4)]
    mixed = ["".join(draw.choice(draw.choice(pools)) for _ in range(draw.randrange(1, 14))) for _ in range(count // 2)]
    joined = [draw.choice(["", " "]).join(draw.choices(FRAGMENTS, k=draw.randrange(1, 8))) for _ in range(count // 4)]
    return captions + mixed + joined


CORPUS = [
    *("", " ", " \t\n ", "\u3000\u00a0", "\0", "a", "A", *FRAGMENTS),
    *("word " * 2000, "x" * 10_000, "é" * 10_000, "你" * 3_000, "!" * 10_000, "ab" * 5_000, "a\u0301\u0323" * 1_000),
    *sentences(3200, seed=0),
]


@pytest.fixture(
    scope="module", params=["shipped", "tokenizer", "tokenizer_2", "clip-tokenizer.json", "vocab and merges"]
)
def pair(request):
    """(our tables, the reference), from the same files."""
    if request.param == "shipped":
        files = shipped.folder() / "tokenizer_2"
        reference = transformers.CLIPTokenizer.from_pretrained(files, local_files_only=True)
        return bpe.init(files), reference._tokenizer
    folder = request.getfixturevalue("shared_data") / "tokenizers"
    if request.param == "clip-tokenizer.json":
        return bpe.init(folder / request.param), tokenizers.Tokenizer.from_file(str(folder / request.param))
    if request.param == "vocab and merges":
        files = [str(folder / "tokenizer" / name) for name in ("vocab.json", "merges.txt")]
        return bpe.init(*files), transformers.CLIPTokenizer(vocab=files[0], merges=files[1])._tokenizer
    reference = transformers.CLIPTokenizer.from_pretrained(folder / request.param, local_files_only=True)
    return bpe.init(folder / request.param), reference._tokenizer


def mismatches(pair, texts, **options):
    tables, reference = pair
    encoded = reference.encode_batch(list(texts))
    ids = bpe.apply(tables, texts, length=None, **options)
    spans = bpe.offsets(tables, texts, **options)
    rows = zip(texts, ids, spans, encoded, strict=True)
    return [text for text, row, span, expected in rows if row != expected.ids or span != expected.offsets]


def test_ids_and_offsets_equal_the_references_on_captions_and_unicode_of_every_kind(pair):
    assert len(CORPUS) > 3000
    assert mismatches(pair, CORPUS) == []


@settings(max_examples=80)
@given(st.lists(st.text(st.sampled_from(ASSIGNED) | st.sampled_from(MARKS) | st.sampled_from("aA'!<|> ")), max_size=8))
def test_ids_and_offsets_equal_the_references_on_assigned_code_points(pair, texts):
    assert mismatches(pair, texts) == []


def test_every_assigned_code_point_alone_and_between_letters_equals_the_reference(shared_data):
    folder = shared_data / "tokenizers"
    tables = bpe.init(folder / "tokenizer")
    reference = tokenizers.Tokenizer.from_file(str(folder / "clip-tokenizer.json"))
    # two hundred of them in a text, parted by spaces, across which nothing composes or merges
    chunks = [ASSIGNED[start : start + 100] for start in range(0, len(ASSIGNED), 100)]
    texts = [" ".join(f"{character} a{character}b" for character in chunk) for chunk in chunks]
    ids = bpe.apply(tables, texts, length=None)
    expected = reference.encode_batch_fast(texts)
    assert [text for text, ours, theirs in zip(texts, ids, expected, strict=True) if ours != theirs.ids] == []


def test_special_tokens_are_plain_text_on_request(pair):
    _, reference = pair
    reference.encode_special_tokens = True
    try:
        assert mismatches(pair, CORPUS[: len(FRAGMENTS) + 100] + CORPUS[-500:], special_tokens=False) == []
    finally:
        reference.encode_special_tokens = False


def test_decoding_equals_transformers(pair):
    tables, reference = pair
    rows = bpe.apply(tables, CORPUS, length=None)
    for skip in (True, False):
        # transformers wraps the decoder of `tokenizers` in these two steps
        expected = [reference.decode(row, skip_special_tokens=skip).replace("</w>", " ").strip() for row in rows]
        # whose strip() also takes the separators U+001C to U+001F, which are tokens
        assert [text.strip() for text in bpe.decode(tables, rows, skip_special=skip)] == expected


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_padded_and_truncated_rows_equal_transformers(tokenizer_files, name):
    folder = tokenizer_files / name
    reference = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    tables = bpe.init(folder)
    assert (tables.pad_id, tables.bos_id, tables.eos_id) == (
        reference.pad_token_id,
        reference.bos_token_id,
        reference.eos_token_id,
    )
    assert tables.model_max_length == reference.model_max_length
    for length in (2, 8, 77):
        expected = reference(CORPUS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        assert torch.equal(bpe.apply(tables, CORPUS, length=length), expected.input_ids)


def test_stabilitys_reading_of_the_second_tokenizer_keeps_exclamation_marks_as_text(tokenizer_files):
    folder = tokenizer_files
    first, second = bpe.init(folder / "tokenizer"), bpe.init(folder / "tokenizer_2")
    ends = ("<|startoftext|>", "<|endoftext|>")
    assert torch.equal(bpe.apply(second, CORPUS, special_tokens=ends), bpe.apply(first, CORPUS, pad_token="!"))
    assert not torch.equal(bpe.apply(second, CORPUS), bpe.apply(first, CORPUS, pad_token="!"))


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_saving_a_released_tokenizer_gives_the_released_files(tokenizer_files, tmp_path, name):
    released = tokenizer_files / name
    bpe.save(tmp_path, bpe.init(released))
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / file).read_bytes() == (released / file).read_bytes(), file


@pytest.mark.parametrize("pad_token", [None, "!"])
def test_transformers_loads_a_small_tokenizer_trained_and_saved_here(tmp_path, pad_token):
    trained = bpe.init(train(CORPUS[-1000:], 900), pad_token=pad_token, model_max_length=24)
    bpe.save(tmp_path, trained)
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (reference.model_max_length, reference.pad_token_id) == (24, trained.pad_id)
    assert mismatches((trained, reference._tokenizer), CORPUS) == []
    # and what transformers saves in turn, a tokenizer.json and its config, is read as the same tokenizer
    reference.save_pretrained(tmp_path / "again")
    again = bpe.init(tmp_path / "again")
    assert torch.equal(bpe.apply(again, CORPUS), bpe.apply(trained, CORPUS))
    assert (again.pad_id, again.model_max_length) == (trained.pad_id, 24)


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": {"model_max_length": 77, "pad_token": "!"}},
        {"special_tokens_map.json": {"bos_token": {"content": "<|startoftext|>", **FLAGS}}},
        {"special_tokens_map.json": {"pad_token": "!"}, "tokenizer_config.json": {"pad_token": "<|endoftext|>"}},
        {"added_tokens.json": {"<Cat-Toy>": 49408, "<dog>": 49409}},
        *(
            {"added_tokens.json": {"<Cat-Toy>": 49408}, file: {key: ["<Cat-Toy>"]}}
            for file in ("special_tokens_map.json", "tokenizer_config.json")
            for key in ("additional_special_tokens", "extra_special_tokens")
        ),
        {"tokenizer_config.json": {"added_tokens_decoder": {"49408": {"content": "<Cat-Toy>", **FLAGS}}}},
    ],
    ids=str,
)
def test_older_and_extended_folders_are_read_as_transformers_reads_them(tokenizer_files, tmp_path, files):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_files / "tokenizer" / name, tmp_path)
    # The first id that no token has: 49408 of the released vocabulary.
    first = len(json.loads((tmp_path / "vocab.json").read_text()))
    for name, content in files.items():
        text = json.dumps(content).replace("49408", str(first)).replace("49409", str(first + 1))
        (tmp_path / name).write_text(text)
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    tables = bpe.init(tmp_path)
    assert tables.pad_id == reference.pad_token_id
    texts = [*CORPUS[: len(FRAGMENTS)], "a <cat-toy>", "a<Cat-Toy>!", "<CAT-TOY><dog><DOG>", *sentences(100, seed=1)]
    assert mismatches((tables, reference._tokenizer), texts) == []


def test_basic_clean_equals_the_cleaning_transformers_4_fell_back_on():
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    cleaner = legacy.BasicTokenizer(strip_accents=False, do_split_on_punc=False)
    assert [bpe.basic_clean(text) for text in CORPUS] == [" ".join(cleaner.tokenize(text)) for text in CORPUS]


def test_openai_clean_equals_openais_steps():
    regex = pytest.importorskip("regex")
    texts = [*CORPUS, "&amp;lt;b&amp;gt; &nbsp;x&#x27;s &eacute;", "\x1ca\x1db\x1c"]
    for text in texts:
        expected = regex.sub(r"\s+", " ", html.unescape(html.unescape(text)).strip()).strip().lower()
        assert bpe.openai_clean(text) == expected
