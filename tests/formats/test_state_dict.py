"""The unpickler of tensors: what torch writes is read, whatever else a pickle may say is refused at once."""

import io
import pickle
import resource
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.formats import state_dict

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "view": torch.arange(12, dtype=torch.float16).reshape(3, 4).T[1:],
    "whole": torch.arange(5),
    "bf16": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "one": torch.tensor(2.0),
    "flags": torch.tensor([True, False]),
}


def saved(value, legacy=False):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def zipped(program, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("x/data.pkl", program)
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_writes_is_read_to_the_bit(legacy):
    shared = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for state in (
        TENSORS,
        OrderedDict(TENSORS),
        {"x": shared, "y": shared[1:], "p": torch.nn.Parameter(shared)},
        torch.nn.BatchNorm2d(3).state_dict(),
    ):
        found = state_dict.read(saved(state, legacy))
        assert list(found) == list(state)
        assert all(torch.equal(found[name], state[name].detach()) for name in state)
        assert all(found[name].dtype == state[name].dtype for name in state)


class Called:
    def __init__(self, function, *arguments):
        self.pair = function, arguments

    def __reduce__(self):
        return self.pair


def nested_key():
    """661 bytes: a key of tuples of the same tuples, 2^100 to be hashed."""
    program = b"\x80\x02}q\x00)q\x01"
    for number in range(100):
        program += b"h" + bytes([number + 1]) + b"h" + bytes([number + 1]) + b"\x86q" + bytes([number + 2])
    return program + b"h\x65K\x01s."


HOSTILE = {
    "code": pickle.dumps({"a": Called(print, "run")}, 2),
    "4 GB": pickle.dumps({"a": Called(bytearray, 4 * 10**9)}, 2),
    "nested key": nested_key(),
    "no end": b"\x80\x02}",
    "stack": b"\x80\x02" + b"(" * 10**6 + b".",
    "memo": b"\x80\x02h\x07.",
    "instructions": b"\x80\x02" + b"}" * 10**6 + b".",
    "deep": b"\x80\x02" + b")\x85" * 10**5 + b".",
    "empty": b"\x80\x02.",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "build": b"\x80\x02)}b.",
    "long": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b".",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_program_in_place_of_tensors_is_refused_in_a_moment_and_in_little_memory(name, capsys):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for content in (zipped(HOSTILE[name]), HOSTILE[name]):
        with pytest.raises(ValueError, match="is |holds "):
            state_dict.read(content)
    assert time.process_time() - started < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 300 * 2**20
    assert capsys.readouterr().out == ""


def test_archives_that_claim_more_than_they_hold_are_refused():
    with pytest.raises(ValueError, match="is a compressed archive"):
        state_dict.read(zipped(pickle.dumps(bytes(10**7)), zipfile.ZIP_DEFLATED))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.safetensors", b"x")
    with pytest.raises(ValueError, match="is a zip archive, not weights: unpack it"):
        state_dict.read(buffer.getvalue())
    with pytest.raises(ValueError, match="does not hold the values it claims"):
        state_dict.read(saved({"a": torch.zeros(1).expand(10**12)}))


@settings(max_examples=150)
@given(st.booleans(), st.data())
def test_changed_bytes_are_a_value_error_or_tensors(legacy, data):
    content = bytearray(saved(TENSORS, legacy))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    try:
        found = state_dict.read(bytes(content))
    except ValueError:
        return
    assert all(isinstance(value, torch.Tensor) for value in found.values())
