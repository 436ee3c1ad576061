"""Tokenizer files that are broken or hostile: one WeightsError naming the file, in bounded time and memory."""

import base64
import json
import os
import random
import shutil
import struct
import sys
import time
from pathlib import Path

import pytest

from functional_sd3.formats.errors import WeightsError
from functional_sd3.text import bpe, unigram
from functional_sd3.text.token_fields import MAX_ADDED
from functional_sd3.text.unigram import charsmap, sentencepiece_file
from functional_sd3.text.unigram.tables import MAX_PIECE_LENGTH
from functional_sd3.weights import shipped
from tests.limits import address_space

FOLDERS = {"bpe": "tokenizer_2", "unigram": "tokenizer_3"}
INIT = {"bpe": bpe.init, "unigram": unigram.init}
SECONDS = 20
"""Twenty times what the slowest case takes on a slow machine."""
WRONG = (None, True, -1, 3, 0.5, 10**30, 10**400, "x", "", "\ud800", "\x1b[31m", [], [[]], [5], ["x", "y"], {}, {"": 5})


@pytest.fixture(params=["bpe", "unigram"])
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    return Path(shutil.copytree(shipped.folder() / FOLDERS[kind], tmp_path / "tokenizer"))


def outcome(kind, path):
    """What reading gives: "loaded", or the sentence of the one promised error."""
    started = time.process_time()
    try:
        INIT[kind](path)
    except WeightsError as error:
        assert str(path.parent if path.is_file() else path) in str(error)
        assert str(error).isprintable() and len(str(error)) < 20_000
        return str(error)
    finally:
        assert time.process_time() - started < SECONDS
    return "loaded"


def refused(kind, path, said=""):
    sentence = outcome(kind, path)
    assert sentence != "loaded" and said in sentence, sentence
    return sentence


def nodes(value, path=()):
    """The place of every value within JSON; of long lists and objects the first three entries."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for _, (key, child) in zip(range(3) if len(value) > 30 else range(30), entries, strict=False) if entries else ():
        yield from nodes(child, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("bpe", "vocab.json"),
        ("bpe", "tokenizer_config.json"),
        ("bpe", "special_tokens_map.json"),
        ("unigram", "tokenizer.json"),
        ("unigram", "tokenizer_config.json"),
        ("unigram", "without tokenizer.json"),
    ],
)
def test_a_value_of_a_wrong_type_anywhere_is_one_error_or_means_nothing(kind, name, folder):
    if name.startswith("without"):
        (folder / "tokenizer.json").unlink()
        name = "tokenizer_config.json"
    if name == "special_tokens_map.json":  # Read where the config does not list the tokens.
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": config["model_max_length"]}))
    whole = json.loads((folder / name).read_text())
    draw = random.Random(name)
    refusals = 0
    places = list(nodes(whole))
    for place in draw.sample(places, min(15, len(places))):
        for new in draw.sample(WRONG, 4):
            try:
                (folder / name).write_text(json.dumps(replaced(whole, place, new)))
            except ValueError:  # 10**400 is written by hand only.
                continue
            refusals += outcome(kind, folder) != "loaded"
    assert refusals > 3


UNIGRAM_CHANGES = {
    "scores of 400 digits": lambda d: d["model"]["vocab"][5].__setitem__(1, 10**400),
    "a score beyond float32": lambda d: d["model"]["vocab"][5].__setitem__(1, -1e300),
    "a score that is true": lambda d: d["model"]["vocab"][5].__setitem__(1, True),
    "a piece that is a list": lambda d: d["model"]["vocab"][5].__setitem__(0, ["a"]),
    "a pair of three": lambda d: d["model"]["vocab"][5].append(1),
    "no pieces": lambda d: d["model"]["vocab"].clear(),
    "added_tokens: 5": lambda d: d.update(added_tokens=5),
    "an added token of two ids": lambda d: d["added_tokens"].append({**d["added_tokens"][0], "id": 900}),
    "an id as a string": lambda d: d["added_tokens"][0].update(id="0"),
    "a negative id": lambda d: d["added_tokens"].append({"id": -5, "content": "<z>"}),
    "a huge id": lambda d: d["added_tokens"].append({"id": 2**63, "content": "<z>"}),
    "an id that is taken twice": lambda d: d["added_tokens"].extend(
        [{"id": 9999, "content": "<y>"}, {"id": 9999, "content": "<z>"}]
    ),
    "an empty added token": lambda d: d["added_tokens"].append({"id": 9999, "content": ""}),
    "normalizers: 5": lambda d: d.update(normalizer={"type": "Sequence", "normalizers": 5}),
    "normalizer: list": lambda d: d.update(normalizer=[]),
    "a charsmap that is a number": lambda d: d["normalizer"]["normalizers"][0].update(precompiled_charsmap=7),
    "names that are lists": lambda d: d["post_processor"]["single"][1]["SpecialToken"].update(id=["</s>"]),
    "unk_id as text": lambda d: d["model"].update(unk_id="2"),
    "unk_id huge": lambda d: d["model"].update(unk_id=10**300),
    "half a surrogate pair": lambda d: d["model"]["vocab"][5].__setitem__(0, "\ud800"),
    "a piece of 100,000 letters": lambda d: d["model"]["vocab"].append(["a" * 100_000, -1.0]),
    "pieces of 128 letters": lambda d: d["model"]["vocab"].extend([[f"{index:0128}", -1.0] for index in range(3000)]),
    "many added tokens": lambda d: d["added_tokens"].extend(
        [{"id": 10_000 + index, "content": f"<{index}>"} for index in range(MAX_ADDED)]
    ),
}


@pytest.mark.parametrize("change", UNIGRAM_CHANGES.values(), ids=UNIGRAM_CHANGES)
@pytest.mark.parametrize("kind", ["unigram"])
def test_a_hostile_tokenizer_json_is_refused_by_name(kind, folder, change):
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "tokenizer.json: " in refused(kind, folder)


@pytest.mark.parametrize(
    "config",
    [
        '{"model_max_length": Infinity}', '{"model_max_length": NaN}', '{"model_max_length": -5}',
        '{"model_max_length": "77"}', '{"model_max_length": 1e400}', '{"model_max_length": 76.5}',
        '{"pad_token": ["<pad>"]}', '{"pad_token": {"content": 5}}', '{"pad_token": {"content": ["a"]}}',
        '{"pad_token": 0}', '{"added_tokens_decoder": 5}', '{"several_vectors": 5}', '{"several_vectors": [[{}]]}',
        '{"several_vectors": [[]]}', "[1]", "nul", '{"a":' + "[" * 100_000, "{" + '"a":{' * 50_000, '{"a": 1, "a": 1}',
        '{"model_max_length": ' + "9" * 5000 + "}", "\ufeff[]",
    ],
)  # fmt: skip
def test_a_hostile_config_is_refused_by_name(kind, folder, config):
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    (folder / "special_tokens_map.json").unlink()  # Of older folders, where it counts more than the config.
    if "added_tokens_decoder" in config and kind == "unigram":
        (folder / "tokenizer.json").unlink()  # Its own list of added tokens counts where it is there.
    assert "tokenizer_config.json: " in refused(kind, folder)


@pytest.mark.parametrize("count", ["100", 10**8, -1, 0.5, [], True, MAX_ADDED + 1])
def test_sentinels_without_bound_are_refused(tmp_path, count):
    folder = Path(shutil.copytree(shipped.folder() / "tokenizer_3", tmp_path / "tokenizer"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": count}))
    assert "extra_ids" in refused("unigram", folder)


def test_lengths_without_a_limit_load_as_transformers_writes_them(kind, folder):
    for length in ("1e30", "1000000000000000019884624838656", "null"):
        (folder / "tokenizer_config.json").write_text(f'{{"model_max_length": {length}, "pad_token": null}}')
        assert INIT[kind](folder).model_max_length == (77 if kind == "bpe" else int(1e30))


BPE_CHANGES = {
    "ids as strings": ("vocab.json", '{"a": "0"}', "token: id"),
    "negative ids": ("vocab.json", '{"a": -1}', "token: id"),
    "huge ids": ("vocab.json", '{"a": 4294967296}', "token: id"),
    "ids of 400 digits": ("vocab.json", '{"a": ' + "9" * 400 + "}", "token: id"),
    "an id twice": ("vocab.json", '{"a": 0, "b": 0}', "share an id"),
    "a token twice": ("vocab.json", '{"a": 0, "a": 1}', "named twice"),
    "half a surrogate pair": ("vocab.json", '{"\\ud800": 0}', "surrogate"),
    "a token of 100,000 letters": ("vocab.json", json.dumps({"a" * 100_000: 0}), "100,000 characters"),
    "deep JSON": ("vocab.json", '{"a":' * 100_000, "nested"),
    "merges in UTF-16 without a mark": ("merges.txt", "é b".encode("utf-16-le"), "no text in UTF-8"),
    "merges that are no text": ("merges.txt", b"\xff\xfe\x00\xd8\x00\x00", "UTF-16"),
}


@pytest.mark.parametrize(("name", "content", "said"), BPE_CHANGES.values(), ids=BPE_CHANGES)
@pytest.mark.parametrize("kind", ["bpe"])
def test_hostile_files_of_byte_pairs_are_refused_by_name(kind, folder, name, content, said):
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    refused(kind, folder, said)


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens": 5}, {"added_tokens": [5]}, {"added_tokens": [{"id": "1", "content": "a"}]}, {"model": 5},
        {"model": {"vocab": 5}}, {"model": {"merges": 5}}, {"model": {"merges": [5]}}, {"model": {"merges": [[1, 2]]}},
        {"model": {"merges": [{"a": "b"}]}}, {"model": {"type": ["BPE"]}}, {"post_processor": {"cls": 5}},
        {"post_processor": {"cls": {"a": 1}}}, {"post_processor": {"sep": [["x"]]}},
        {"truncation": {"max_length": "x"}}, {"padding": {"pad_token": []}}, {"pre_tokenizer": 5},
    ],
)  # fmt: skip
def test_a_hostile_tokenizer_json_of_byte_pairs_is_refused_by_name(tmp_path, change):
    source = shipped.folder() / "tokenizer"
    merges = (source / "merges.txt").read_text().splitlines()[1:]
    vocab = json.loads((source / "vocab.json").read_text())
    pattern = {"pattern": {"Regex": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"}}
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": model, "pre_tokenizer": pattern}))
    bpe.init(path)
    model |= change.pop("model") if isinstance(change.get("model"), dict) else {}
    path.write_text(json.dumps({"model": model, "pre_tokenizer": pattern, **change}))
    assert "tokenizer.json" in refused("bpe", path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x0a\x00",  # a piece without text
        b"\x0a\x02\x08\x05",  # a piece whose text is a number
        b"\x0a\x03\x0a\x01\xff",  # a piece that is no UTF-8
        b"\x08\x05",  # pieces that are a number
        b"\x12\x80\x80\x80\x80\x80\x80\x80\x80\x7f",  # a length of 2**62
        b"\xff" * 800_000 + b"\x01",
        b"\x0a\x03\x0a\x01a" + b"\x1a\x06\x10\xff\xff\xff\xff\x0f",  # a character map that is a number
        b"\x0a\x07\x0a\x01a\x18\xff\xff\x7f",  # a piece of an unknown type
        b"\x0b",
        b"",
    ],
    ids=range(10),
)
def test_a_hostile_sentencepiece_model_is_refused_by_name(tmp_path, content):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    assert str(path) in refused("unigram", path)


@pytest.mark.parametrize("special", ["named pipe", "folder", "link to nothing", "link to a device"])
@pytest.mark.parametrize(("kind", "name"), [
    ("bpe", "vocab.json"), ("bpe", "merges.txt"), ("bpe", "tokenizer_config.json"), ("unigram", "tokenizer.json"),
    ("unigram", "spiece.model"), ("unigram", "tokenizer_config.json"),
])  # fmt: skip
def test_special_files_are_named_and_never_waited_for(kind, name, folder, special):
    if name == "spiece.model":
        (folder / "tokenizer.json").unlink()
    (folder / name).unlink()
    if special == "named pipe":
        os.mkfifo(folder / name)
    elif special == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("nowhere" if special == "link to nothing" else "/dev/zero")
    assert str(folder / name) in refused(kind, folder)


def test_a_mutated_file_loads_or_is_one_error(kind, folder):
    draw = random.Random(kind)
    names = sorted(path.name for path in folder.iterdir())
    wholes = {name: (folder / name).read_bytes() for name in names}
    for _ in range(60):
        name = draw.choice(names)
        content = bytearray(wholes[name])
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(content))
            match draw.randrange(4):
                case 0:
                    content[at] = draw.randrange(256)
                case 1:
                    del content[at : at + draw.randrange(1, 40)]
                case 2:
                    content[at:at] = draw.choice((b'"', b"[", b"{", b"NaN", b"-1", b"9" * 400, b"\\ud800", b"null"))
                case 3:
                    content = content[: at + 1]
        (folder / name).write_bytes(content)
        outcome(kind, folder)
        if name == "spiece.model":
            outcome(kind, folder / name)
        (folder / name).write_bytes(wholes[name])


def circular() -> bytes:
    """A character map whose node for "a" is its own child."""
    units = [1 << 31] * 256
    units[0] = 1 << 10  # the root's base is 1
    units[1 ^ ord("a")] = ord("a") | ((1 ^ ord("a") ^ 1) << 10)
    return struct.pack("<I", 1024) + struct.pack("<256I", *units) + b"x\0"


def test_a_character_map_that_goes_in_circles_or_blows_up_is_refused():
    with pytest.raises(ValueError, match="goes in circles"):
        charsmap.parse(circular())
    with pytest.raises(ValueError, match="a spelling of more than 256 bytes"):
        charsmap.parse(charsmap.build({"a" * 257: "b"}))
    assert charsmap.longest(charsmap.parse(charsmap.build({"a" * 256: "b"})), b"a" * 300, 0) == (256, "b")
    with pytest.raises(ValueError, match="a replacement of more than 256 bytes"):
        charsmap.parse(charsmap.build({"a": "b" * 257}))
    within = bytearray(charsmap.build({"a": "é"}))
    units = struct.unpack_from("<256I", within, 4)
    node = next(index for index, unit in enumerate(units) if unit & 0x1FF == ord("a") | 0x100)
    struct.pack_into("<I", within, 4 + 4 * (node ^ units[node] >> 10), 1 << 31 | 1)
    with pytest.raises(ValueError, match="begins within a character"):
        charsmap.parse(bytes(within))
    headless = bytearray(charsmap.build({"a": "b"}))
    headless[4:8] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="points outside"):
        charsmap.parse(bytes(headless))


def test_a_mutated_character_map_is_refused_or_rewrites_any_text(tmp_path):
    whole = unigram.init(shipped.folder() / "tokenizer_3").charsmap or charsmap.build({"A": "a", "é": "e", "ab": "c"})
    draw = random.Random(0)
    loaded = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            content[draw.randrange(4, len(content))] = draw.randrange(256)
        try:
            tables = unigram.from_pieces([("▁", -1.0), ("a", -1.0)], charsmap=bytes(content))
        except ValueError:
            continue
        loaded += 1
        for mode in ("hf", "sentencepiece"):
            unigram.apply(tables, "Aé ab ☃" + "".join(map(chr, range(32, 400))), mode=mode)
    assert loaded > 10


def test_the_longest_piece_is_found_and_a_longer_one_refused():
    pieces = [("▁", -1.0), ("x" * MAX_PIECE_LENGTH, -1.0)]
    tables = unigram.from_pieces(pieces)
    assert unigram.apply(tables, "x" * MAX_PIECE_LENGTH, length=None)[0] == [3, 4, tables.eos_id]
    with pytest.raises(ValueError, match="129 characters; at most 128"):
        unigram.from_pieces([*pieces, ("x" * 129, -1.0)])


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
def test_hostile_files_take_little_memory(tmp_path):
    """A piece of 100,000 letters took 5 GB, a character map that is a number as many bytes as it says."""
    pieces = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["a" * 100_000, -1]]
    steps = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    model = {"type": "Unigram", "unk_id": 2, "vocab": pieces}
    (tmp_path / "a.json").write_text(json.dumps({"model": model, "pre_tokenizer": steps}))
    (tmp_path / "b.model").write_bytes(b"\x0a\x03\x0a\x01a\x1a\x06\x10" + b"\xff\xff\xff\xff\x0f")
    big = base64.b64encode(circular() + b"y" * 2_000_000).decode()
    charsmap_step = {"type": "Precompiled", "precompiled_charsmap": big}
    small = {**model, "vocab": pieces[:3]}
    content = {"model": small, "pre_tokenizer": steps, "normalizer": charsmap_step}
    (tmp_path / "d.json").write_text(json.dumps(content))
    with address_space(500 * 2**20):
        for path in sorted(tmp_path.iterdir()):
            assert str(path) in refused("unigram", path)


def test_more_pieces_than_any_vocabulary_has_are_refused_while_they_are_read(monkeypatch):
    monkeypatch.setattr(sentencepiece_file, "MAX_PIECES", 100)
    with pytest.raises(ValueError, match="more than 100 pieces"):
        sentencepiece_file.parse(b"\x0a\x03\x0a\x01a" * 101)


def test_a_written_model_still_reads_back():
    written = sentencepiece_file.SentencePieceModel(
        (sentencepiece_file.Piece("<unk>", 0.0, 2), sentencepiece_file.Piece("a", -1.0)), b""
    )
    assert sentencepiece_file.parse(sentencepiece_file.serialize(written)) == written
