"""T5's tokenizer against `tokenizers`, transformers and sentencepiece."""

import itertools
import json
import random
import unicodedata

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5TokenizerFast

from functional_sd3.text import unigram
from functional_sd3.weights import shipped

ASSIGNED = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]
MARKS = [c for c in ASSIGNED if unicodedata.category(c)[0] == "M"]
# Characters that a compatibility map rewrites, with those that bind neighbours into one grapheme cluster.
REWRITTEN = [c for c in ASSIGNED if c < "\uffff" and unicodedata.normalize("NFKC", c) != c]
BINDING = [*"\u200c\u200d\u0600\u06dd\u094d\u09cd\u0301\u0327\u0344\u093c\ufe0f\u1100\u1161\u11a8\r\n", "\U0001f3fd"]
NASTY = [
    *BINDING,
    *" \t\u00a0\u2028\u3000\u200b\x00\x01\x85\u2581aKl1</>½¨ﬁ™‼©か\u3099ｶﾞ각क\u0958Ａ＜＞",
    *("  ", "</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "＜/s＞", "\U0001f600", "\U0001f1e9\U0001f1ea"),
]
WORDS = (
    "a the photograph of astronaut riding horse on mars, cinematic lighting, 8k masterpiece (bokeh) cat's don't l'été "
    "golden-hour Überraschung naïve façade înțelegere two-storey 35mm f/1.8 #art @night 50% $5 snow-capped; neon-lit! "
    "red circle white background small blue star left of large green square black AND THE 1234567890 responsibilities"
).split()


def captions(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(count)]


def strings(seed=0):
    """3,300 strings: captions, Unicode of every kind, special tokens, white space, ties, and very long ones."""
    draw = random.Random(seed)

    def mixed(count, most, *sources):
        return ["".join(draw.choice(draw.choice(sources)) for _ in range(draw.randint(1, most))) for _ in range(count)]

    return [
        *captions(800, seed),
        *mixed(800, 8, NASTY),
        *mixed(500, 12, ASSIGNED),
        *mixed(600, 6, MARKS, REWRITTEN, BINDING, "abc "),
        *mixed(400, 60, "lab "),
        *mixed(195, 30, "\t\n\v\f\r \x1c\x1f\x85\u00a0\u1680\u2000\u200b\u2029\u202f\u3000\ufeff", "ab"),
        *("", " ", "a" * 10_000, "word " * 2_000, "é" * 10_000),
    ]


class Libraries:
    """The three readers of one tokenizer folder."""

    def __init__(self, folder):
        self.file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.transformers = T5TokenizerFast.from_pretrained(folder)
        self.sentencepiece = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))

    def ids(self, texts, mode):
        if mode == "hf":
            return [encoding.ids for encoding in self.file.encode_batch(texts)]
        if mode == "transformers":
            return [encoding.ids for encoding in self.transformers.backend_tokenizer.encode_batch(texts)]
        return [[*ids, 1] for ids in self.sentencepiece.encode(texts)]

    def offsets(self, texts, mode):
        if mode == "hf":
            return [encoding.offsets for encoding in self.file.encode_batch(texts)]
        if mode == "transformers":
            return [encoding.offsets for encoding in self.transformers.backend_tokenizer.encode_batch(texts)]
        return [self._sentencepiece_offsets(text) for text in texts]

    def _sentencepiece_offsets(self, text):
        """In characters, and (0, 0) for the end token; the library counts bytes."""
        starts = itertools.accumulate((len(c.encode()) for c in text), initial=0)
        place = {byte: index for index, byte in enumerate(starts)}
        pieces = self.sentencepiece.encode(text, return_type="proto").pieces
        return [*((place[piece.begin], place[piece.end]) for piece in pieces), (0, 0)]


MODES = pytest.mark.parametrize("mode", ["hf", "transformers", "sentencepiece"])


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "tokenizers" / "tokenizer_3"


@pytest.fixture(scope="module")
def tables(folder):
    return unigram.init(folder)


@pytest.fixture(scope="module")
def libraries(folder):
    return Libraries(folder)


def mismatches(texts, ours, theirs):
    return [ascii(text) for text, one, other in zip(texts, ours, theirs, strict=True) if one != other]


@MODES
def test_ids_equal_the_library_on_thousands_of_strings(tables, libraries, mode):
    texts = strings()
    assert len(texts) >= 3000
    assert mismatches(texts, unigram.apply(tables, texts, length=None, mode=mode), libraries.ids(texts, mode)) == []


@MODES
def test_offsets_equal_the_library_on_thousands_of_strings(tables, libraries, mode):
    texts = strings(seed=1)
    assert mismatches(texts, unigram.offsets(tables, texts, mode=mode), libraries.offsets(texts, mode)) == []


@MODES
@settings(max_examples=200)
@given(text=st.text(st.sampled_from(ASSIGNED), max_size=40))
def test_ids_equal_the_library_on_any_assigned_characters(tables, libraries, mode, text):
    assert unigram.apply(tables, text, length=None, mode=mode) == libraries.ids([text], mode)


@MODES
@settings(max_examples=200)
@given(text=st.lists(st.sampled_from(NASTY), max_size=20).map("".join))
def test_ids_and_offsets_equal_the_library_on_hostile_strings(tables, libraries, mode, text):
    assert unigram.apply(tables, text, length=None, mode=mode) == libraries.ids([text], mode)
    assert unigram.offsets(tables, text, mode=mode) == libraries.offsets([text], mode)


@pytest.mark.parametrize("mode", ["hf", "sentencepiece"])
def test_ids_equal_the_library_on_every_assigned_character_alone(tables, libraries, mode):
    ours = unigram.apply(tables, ASSIGNED, length=None, mode=mode)
    assert mismatches(ASSIGNED, ours, libraries.ids(ASSIGNED, mode)) == []


@MODES
def test_ids_equal_the_library_on_every_assigned_character_between_letters(tables, libraries, mode):
    texts = [" ".join(f"a{c}b" for c in ASSIGNED[start : start + 100]) for start in range(0, len(ASSIGNED), 100)]
    assert mismatches(texts, unigram.apply(tables, texts, length=None, mode=mode), libraries.ids(texts, mode)) == []


def test_grapheme_clusters_equal_the_library_wherever_they_change_what_is_rewritten(tables):
    # A cluster of fewer than six bytes loses its accent when its first character is rewritten.
    normalizer = tokenizers.normalizers.Precompiled(tables.charsmap)
    binds_after = ("{}\u200d\u2122\u0301", "{}\u2139\u0301", "{}\u094d\u0958\u0301", "{}e\u0301")
    binds_before = ("\u00bd{}", "\u0600{}", "\u0915{}\u0958\u0301", "\u0915\u094d{}\u0958\u0301")
    probes = (*binds_after, *binds_before, "\U0001f600{}\u200d\u2122\u0301")
    plane = [c for c in ASSIGNED if not "\u3400" <= c < "\ua000" and not "\uac00" <= c < "\ud700" and c < "\U00020000"]
    texts = [probe.format(c) for c in plane for probe in probes]
    ours = [unigram.normalize(tables, text).split() for text in texts]
    assert mismatches(texts, ours, [normalizer.normalize_str(text).split() for text in texts]) == []


def test_typed_special_tokens_can_be_read_as_the_text_they_are(tables, folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in content["added_tokens"]}
    content["added_tokens"] = []
    # Behind a control character, which no normalised text holds; still there, so that every other id stays.
    content["model"]["vocab"] = [[f"\1{p}" if p in special else p, s] for p, s in content["model"]["vocab"]]
    content["post_processor"] = None
    plain = tokenizers.Tokenizer.from_str(json.dumps(content))
    texts = strings(seed=2)
    ours = unigram.apply(tables, texts, length=None, typed_specials=False)
    assert mismatches(texts, ours, [[*encoding.ids, 1] for encoding in plain.encode_batch(texts)]) == []


def test_padding_and_cutting_equal_transformers_as_the_pipeline_calls_it(tables, libraries):
    texts = captions(50) + ["", "word " * 600]
    for length in (1, 2, 77, 256, 512):
        arguments = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        theirs = libraries.transformers(texts, add_special_tokens=True, **arguments).input_ids
        assert unigram.apply(tables, texts, length=length, mode="transformers").equal(theirs)
        assert unigram.apply(tables, texts, length=length).equal(theirs)


def test_decoding_equals_tokenizers(tables, libraries):
    texts = strings(seed=3)[:2000]
    rows = libraries.ids(texts, "hf")
    for skip in (True, False):
        theirs = libraries.file.decode_batch(rows, skip_special_tokens=skip)
        assert mismatches(texts, unigram.decode(tables, rows, skip_special=skip), theirs) == []


def test_the_real_folder_survives_saving_to_the_byte(tables, folder, tmp_path):
    unigram.save(tmp_path, tables)
    assert unigram.init(tmp_path) == tables
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_sentencepiece_file_and_the_json_file_hold_one_tokenizer(tables, folder, tmp_path):
    for name in ("spiece.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert unigram.init(tmp_path) == tables
    alone = unigram.init(folder / "spiece.model")
    assert (alone.pieces, alone.scores, alone.charsmap) == (tables.pieces, tables.scores, tables.charsmap)


def test_a_folder_without_the_json_file_is_read_as_transformers_reads_it(folder, tmp_path):
    texts = captions(50) + ["red <extra_id_0> circle</s> x", "<extra_id_7>", "½\u0301 \x85"]
    for name in ("spiece.model", "tokenizer_config.json"):  # first without the config, then with it
        (tmp_path / name).write_bytes((folder / name).read_bytes())
        theirs, ours = T5TokenizerFast.from_pretrained(tmp_path), unigram.init(tmp_path)
        assert unigram.apply(ours, texts, length=None, mode="transformers") == theirs(texts).input_ids
        assert ours.model_max_length == theirs.model_max_length


def test_facts_of_the_real_tokenizer(tables):
    assert (len(tables.pieces), tables.pad_id, tables.eos_id, tables.unk_id) == (32100, 0, 1, 2)
    assert tables.model_max_length == 512 and tables.pieces[32099] == "<extra_id_0>"
    assert unigram.apply(tables, "", length=4).tolist() == [[1, 0, 0, 0]]


# ---- small tokenizers, trained here; these need no data ----

WORLD = [
    f"a {size} {colour} {shape} {place} a {other} on a white background"
    for size, colour, shape, place, other in itertools.product(
        ("small", "large"), ("red", "green", "blue"), ("circle", "star"), ("above", "left of"), ("ring", "cross")
    )
]


@pytest.fixture(scope="module", params=["plain_map", "no_map", "shipped"])
def tiny(request, tmp_path_factory):
    if request.param == "shipped":
        folder = shipped.folder() / "tokenizer_3"
        return unigram.init(folder), folder
    charsmap = unigram.plain_charsmap() if request.param == "plain_map" else b""
    trained = unigram.train(WORLD, 40, charsmap=charsmap)
    extra_ids = 0 if charsmap else 5
    tables = unigram.from_pieces(trained, charsmap=charsmap, extra_ids=extra_ids, model_max_length=32)
    folder = tmp_path_factory.mktemp("tiny")
    unigram.save(folder, tables)
    return tables, folder


@MODES
def test_a_trained_tokenizer_gives_the_same_ids_and_offsets_in_every_library(tiny, mode):
    tables, folder = tiny
    libraries = Libraries(folder)
    texts = [*WORLD, *strings(seed=4), "A Large\tRED  circle", "starring circles"]
    assert mismatches(texts, unigram.apply(tables, texts, length=None, mode=mode), libraries.ids(texts, mode)) == []
    assert mismatches(texts, unigram.offsets(tables, texts, mode=mode), libraries.offsets(texts, mode)) == []


def test_a_trained_tokenizer_has_the_ids_and_the_length_that_transformers_expects(tiny):
    tables, folder = tiny
    loaded = Libraries(folder)
    theirs = loaded.transformers
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    assert (theirs.model_max_length, len(theirs)) == (tables.model_max_length, len(tables.pieces))
    processor = loaded.sentencepiece
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (0, 1, 2, -1)


def test_a_tokenizer_saved_by_transformers_is_read_as_the_same(tiny, tmp_path):
    tables, folder = tiny
    T5TokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    again = unigram.init(tmp_path)
    texts = [*WORLD, *strings(seed=5)[800:]]
    assert unigram.apply(again, texts, length=None) == unigram.apply(tables, texts, length=None, mode="transformers")
    assert again.model_max_length == tables.model_max_length


def test_saving_the_shipped_tokenizer_gives_the_shipped_files(tmp_path):
    folder = shipped.folder() / "tokenizer_3"
    unigram.save(tmp_path, unigram.init(folder))
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_model_trained_by_sentencepiece_is_read_as_sentencepiece_reads_it(tmp_path):
    for rule in ("nmt_nfkc", "identity", "nmt_nfkc_cf"):
        prefix = tmp_path / rule
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(WORLD + captions(300)),
            model_prefix=str(prefix),
            model_type="unigram",
            vocab_size=300,
            hard_vocab_limit=False,
            normalization_rule_name=rule,
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "num_threads": 1, "minloglevel": 2},
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
        tables = unigram.init(f"{prefix}.model")
        texts = strings(seed=6)
        ours = unigram.apply(tables, texts, length=None, mode="sentencepiece")
        assert mismatches(texts, ours, [[*ids, 1] for ids in processor.encode(texts)]) == []
