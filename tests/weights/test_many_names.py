"""Files that name hundreds of thousands of tensors: refused, or all problems said, within seconds of one core."""

import json
import struct
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from functional_sd3 import weights
from functional_sd3.weights import WeightsError
from tests.models import random_model

PATTERNS = ("encoder.block.{}", "joint_blocks.1.{}", "{}.conv.0.weight")
LIMIT = 60.0
"""Seconds of processor time, of which less than 3 are needed."""


@contextmanager
def timed():
    start = time.process_time()
    yield
    assert time.process_time() - start < LIMIT


def problems_of(path) -> tuple[str, ...]:
    with timed(), pytest.raises(WeightsError) as caught:
        weights.load(path)
    return caught.value.problems


def headed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("pattern", PATTERNS)
def test_three_hundred_thousand_names_are_refused_in_a_moment(pattern, tmp_path):
    names = [pattern.format(index) for index in range(300_000)]
    said = "names 300,000 tensors, more than 32,768"
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(f'"{name}":{entry}' for name in names) + "}"
    (tmp_path / "x.safetensors").write_bytes(headed(header.encode()))
    assert problems_of(tmp_path / "x.safetensors") == (f"{tmp_path / 'x.safetensors'}: {said}",)
    described = (struct.pack("<Q", len(name)) + name.encode() + struct.pack("<IQIQ", 1, 0, 0, 0) for name in names)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(names), 0) + b"".join(described) + bytes(64))
    (problem,) = problems_of(tmp_path / "x.gguf")
    assert problem.endswith(said)
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "x")}))
    assert problems_of(index) == (f"{index}: {said}",)


def test_as_many_names_as_are_read_take_seconds(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {f"text_model.encoder.layers.{index}.mlp.fc1.weight": entry for index in range(32_768)}
    (tmp_path / "x.safetensors").write_bytes(headed(json.dumps(header).encode()))
    assert "the sizes of the model cannot be read" in problems_of(tmp_path / "x.safetensors")[0]


def test_a_list_of_millions_of_texts_in_a_gguf_file_is_refused_in_a_moment(tmp_path):
    value = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**21)
    (tmp_path / "x").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value + bytes(2**24))
    assert "a list in it has 2,097,152 texts, more than" in problems_of(tmp_path / "x")[0]


@pytest.mark.parametrize("count", [2_000, 20_000])
def test_thousands_of_unexpected_names_are_all_named(count, tmp_path):
    path = tmp_path / "x.safetensors"
    weights.save(path, random_model(), layout="single")
    lost = "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"
    tensors = {name: value for name, value in load_file(path).items() if name != lost}
    extra = {f"{lost}_{index:05d}": torch.zeros(1) for index in range(count)}
    save_file({**tensors, **extra}, path)
    problems = problems_of(path)
    assert sum("is unexpected" in problem for problem in problems) == count
    assert sum(f"{lost} is missing" in problem for problem in problems) == 1
    assert any(f"; is it {lost}?" in problem for problem in problems)
