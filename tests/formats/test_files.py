"""safetensors files as ours: what the library reads and writes, we read and write; what is broken is named."""

import errno
import json
import os
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from functional_sd3.formats import files
from functional_sd3.weights import WeightsError

DTYPES = [d for d in files.DTYPES.values() if d.is_floating_point] + [torch.int64, torch.int8, torch.uint8, torch.bool]


def random_tensors(seed: int, count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (), generator=generator))  # noqa: E731
    tensors = {}
    for index in range(count):
        shape = [draw(5) for _ in range(draw(4))]
        values = torch.randint(-100, 100, shape, generator=generator)
        tensors[f"block.{index}.ß{draw(9)}"] = values.to(DTYPES[draw(len(DTYPES))])
    return tensors


def read_all(path) -> dict[str, torch.Tensor]:
    mapped = files.open_mapped(path)
    return {name: files.tensor(mapped, name) for name in mapped.header.tensors}


def equal(one: dict, other: dict) -> bool:
    bits = lambda value: value.contiguous().reshape(-1).view(torch.uint8)  # noqa: E731
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(bits(one[name]), bits(other[name]))
        for name in one
    )


@given(st.integers(0, 2**31), st.integers(1, 8))
def test_what_we_write_the_library_reads_and_the_reverse(tmp_path_factory, seed, count):
    tensors = random_tensors(seed, count)
    folder = tmp_path_factory.mktemp("files")
    files.write_atomic(folder / "ours.safetensors", tensors, metadata={"format": "pt"})
    save_file(tensors, folder / "theirs.safetensors", metadata={"format": "pt"})
    assert equal(load_file(folder / "ours.safetensors"), tensors)
    assert equal(read_all(folder / "theirs.safetensors"), tensors)
    assert equal(read_all(folder / "ours.safetensors"), tensors)
    assert files.read_header(folder / "ours.safetensors").metadata == {"format": "pt"}
    assert files.shapes(folder / "theirs.safetensors") == {name: tuple(t.shape) for name, t in tensors.items()}


def test_only_floating_tensors_are_converted_on_writing(tmp_path):
    tensors = {"w": torch.tensor([1.0, 3.14159]), "ids": torch.tensor([1, 2]), "transposed": torch.rand(3, 5).T}
    files.write_atomic(tmp_path / "x", tensors, dtype=torch.bfloat16)
    found = load_file(tmp_path / "x")
    assert torch.equal(found["w"], tensors["w"].bfloat16())
    assert torch.equal(found["transposed"], tensors["transposed"].bfloat16())
    assert torch.equal(found["ids"], tensors["ids"])


def test_one_element_of_a_larger_tensor_is_written(tmp_path):
    files.write_atomic(tmp_path / "x", {"one": torch.arange(12.0).reshape(3, 4)[1:2, 3]})
    assert torch.equal(load_file(tmp_path / "x")["one"], torch.tensor([7.0]))


def test_tensors_start_at_multiples_of_64_bytes_where_their_sizes_allow(tmp_path):
    files.write_atomic(tmp_path / "x", {"half": torch.zeros(32, dtype=torch.float16), "wide": torch.zeros(16)})
    assert [entry.start % 64 for entry in files.read_header(tmp_path / "x").tensors.values()] == [0, 0]


def test_unaligned_tensors_are_read_right(tmp_path):
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"\1" + struct.pack("<ff", 1.5, -2.0))
    assert torch.equal(read_all(tmp_path / "x")["b"], torch.tensor([1.5, -2.0]))


def test_writing_into_a_mapped_tensor_never_changes_the_file(tmp_path):
    files.write_atomic(tmp_path / "x", {"w": torch.ones(4096)})
    before = (tmp_path / "x").read_bytes()
    first, second = read_all(tmp_path / "x")["w"], read_all(tmp_path / "x")["w"]
    first.mul_(7)
    assert first[0] == 7
    assert torch.equal(second, torch.ones(4096))
    assert (tmp_path / "x").read_bytes() == before


def test_tensors_that_lie_together_are_stacked_without_a_copy(tmp_path):
    q, k, v = torch.rand(2, 5), torch.rand(3, 5), torch.rand(1, 5)
    others = {"wide": v.double(), "half": v.half(), "other": torch.rand(1, 4)}
    files.write(tmp_path / "x", {"q": q, "k": k, "v": v, **others})
    mapped = files.open_mapped(tmp_path / "x")
    together = files.stacked(mapped, ["q", "k", "v"])
    assert torch.equal(together, torch.cat([q, k, v]))
    assert together.data_ptr() == files.tensor(mapped, "q").data_ptr()
    for apart in (["k", "q"], ["q", "v"], ["wide", "q"], ["v", "half"], ["v", "other"]):
        assert files.stacked(mapped, apart) is None


def test_a_released_tensor_reads_the_same_again(tmp_path):
    files.write_atomic(tmp_path / "x", {"w": torch.arange(100_000.0)})
    mapped = files.open_mapped(tmp_path / "x")
    value = files.tensor(mapped, "w")
    value.sum()
    files.release(mapped, "w")
    assert torch.equal(value, torch.arange(100_000.0))


def test_a_mapped_file_may_be_replaced_while_it_is_in_use(tmp_path):
    files.write_atomic(tmp_path / "x", {"w": torch.ones(5000)})
    old = read_all(tmp_path / "x")["w"]
    files.write_atomic(tmp_path / "x", {"w": torch.zeros(7)})
    assert torch.equal(old, torch.ones(5000))
    assert torch.equal(read_all(tmp_path / "x")["w"], torch.zeros(7))


def crafted(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def described(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "nothing": (b"", "0 bytes are too few"),
    "a few bytes": (b"1234567", "7 bytes are too few"),
    "length beyond the file": (crafted({}, length=999), "header length 999 exceeds the file"),
    "length of a pickle": (b"\x80\x02}q\x00." + b"x" * 40, "is a pickle"),
    "not json": (crafted(b"not json"), "Expecting value"),
    "not text": (crafted(b"\xff\xfe"), "utf-8"),
    "nested without end": (crafted(b"[" * 100_000), ""),
    "a list": (crafted([]), "is [], not a JSON object"),
    "a name twice": (crafted(b'{"w":{}, "w":{}}'), "'w' is named twice"),
    "metadata of numbers": (crafted({"__metadata__": {"step": 3}}), "__metadata__ must map names to strings"),
    "a tensor without shape": (crafted({"w": {"dtype": "F32", "data_offsets": [0, 0]}}), "w must be described by"),
    "an unknown dtype": (crafted({"w": described("F3")}, b"1234"), "w has dtype 'F3'"),
    "a negative size": (crafted({"w": described(shape=[-1])}, b"1234"), "w has shape [-1]"),
    "a fractional size": (crafted({"w": described(shape=[1.0])}, b"1234"), "w has shape [1.0]"),
    "a size that is true": (crafted({"w": described(shape=[True])}, b"1234"), "w has shape [True]"),
    "bytes that do not fit": (crafted({"w": described(shape=[2])}, b"1234"), "w (F32 [2]) needs 8 bytes, has 4"),
    "ends before it starts": (crafted({"w": described(offsets=[4, 0])}, b"1234"), "has -4"),
    "overlap": (crafted({"a": described(), "b": described(offsets=[2, 6])}, b"123456"), "b (bytes 2 to 6) overlaps a"),
    "gap": (crafted({"a": described(), "b": described(offsets=[8, 12])}, b"1" * 12), "b (bytes 8 to 12) leaves a gap"),
    "truncated": (crafted({"w": described()}, b"123"), "is truncated"),
    "too long": (crafted({"w": described()}, b"12345"), "bytes that belong to no tensor"),
    "more than memory": (crafted({"w": described(shape=[2**62, 2**62], offsets=[0, 2**62])}), "beyond what can be"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, name):
    content, sentence = BROKEN[name]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    for read in (files.read_header, files.shapes, files.open_mapped):
        with pytest.raises(WeightsError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert sentence in str(caught.value)


def test_what_is_no_file_is_an_error_and_never_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name, sentence in {
        "pipe": "is a named pipe, not a file",
        "loop": "too many levels of symbolic links",
        "folder": "is a folder, not a file",
        "absent": "no such file",
        "file/below": "not a directory",
        "nul\0": "embedded null byte",
        "x" * 300: "too long",
    }.items():
        with pytest.raises(WeightsError, match=sentence):
            files.read_header(tmp_path / name)


@st.composite
def mutations(draw):
    return draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6)), draw(
        st.one_of(st.none(), st.integers(0, 10**6))
    )


@given(mutations())
def test_a_file_with_changed_bytes_is_a_weights_error_or_loads_as_the_library_loads_it(tmp_path_factory, mutation):
    folder = tmp_path_factory.mktemp("mutated")
    path = folder / "x.safetensors"
    files.write(path, {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})
    content = bytearray(path.read_bytes())
    changes, cut = mutation
    for place, value in changes:
        # Half of all changes in the header, where they matter.
        content[place % (140 if place % 2 else len(content))] = value
    path.write_bytes(bytes(content if cut is None else content[: cut % len(content)]))
    try:
        found = read_all(path)
    except WeightsError:
        return
    try:
        with safe_open(path, "pt") as library:
            expected = {name: library.get_tensor(name) for name in library.keys()}
    except SafetensorError:
        pytest.fail("accepts what the library refuses")
    assert equal(found, expected)


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    files.write_atomic(path, {"w": torch.ones(3)})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for content in ({"w": torch.zeros(3)}, b"bytes"):
        with pytest.raises(WeightsError, match="no space left on device; what was there is untouched"):
            files.write_atomic(path, content)
    monkeypatch.undo()
    assert torch.equal(read_all(path)["w"], torch.ones(3))
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_bytes_are_written_as_they_are(tmp_path):
    files.write_atomic(tmp_path / "new" / "state.json", b"{}")
    assert (tmp_path / "new" / "state.json").read_bytes() == b"{}"


def test_a_dtype_that_the_format_lacks_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="w has dtype torch.complex128"):
        files.write_atomic(tmp_path / "x", {"w": torch.zeros(1, dtype=torch.complex128)})
    assert os.listdir(tmp_path) == []
