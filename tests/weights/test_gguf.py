"""GGUF files, written by ggml's own Python package: the values that blocks mean, under the names of people's files."""

import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from functional_sd3 import weights
from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.formats import blocks
from functional_sd3.formats import gguf as ours
from functional_sd3.image import taesd
from functional_sd3.layouts import controlnet as controlnet_layout
from functional_sd3.layouts import ip_adapter as ip_adapter_layout
from functional_sd3.layouts import registry, rules
from functional_sd3.text import t5
from functional_sd3.transformer import controlnet, ip_adapter, mmdit
from functional_sd3.weights import Config, WeightsError
from tests.weights.conftest import CONFIG
from tests.weights.gguf_files import write

MODEL = Config(
    transformer=replace(CONFIG.transformer, heads=4, head_dim=16, context_width=64, pooled_width=32),
    t5=t5.Config(vocab=64, width=64, layers=2, heads=4, head_dim=16, mlp_width=96),
)


def theirs(model, name, format) -> dict[str, torch.Tensor]:
    config = getattr(model.config, name)
    return rules.to_theirs(format.layout(config), weights.SPECS[name](config), tree.flatten_paths(model.params[name]))


def joined(meant, name, format, config=MODEL):
    """The tree that tensors under a form's names mean."""
    own = getattr(config, name)
    fetch = lambda source, _: source.transform.join([meant[each] for each in source.names])  # noqa: E731
    return rules.to_ours(format.layout(own), weights.SPECS[name](own), fetch)


def renamed_as_llama_cpp(tensors):
    """By the map that llama.cpp converts T5 with."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, MODEL.t5.layers)
    return {known.get_name(name, try_suffixes=(".weight",)): value for name, value in tensors.items()}


@pytest.mark.parametrize("kind", blocks.BLOCKS)
def test_blocks_mean_to_the_bit_what_ggml_says_they_mean(kind):
    generator = np.random.default_rng(0)
    size = blocks.BLOCKS[kind].size
    rows = generator.integers(0, 256, (blocks._AT_ONCE + 3 if kind == "Q4_0" else 50, size), dtype=np.uint8)
    # Factors that are numbers, wherever the kind has them.
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(kind, 0)
    count = 2 if kind in ("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS") else 4
    factors = generator.standard_normal((len(rows), 2)).astype(np.float16).view(np.uint8)
    rows[:, at : at + count] = factors[:, :count]
    expected = torch.from_numpy(gguf.quants.dequantize(rows, Kind[kind]).copy()).flatten()
    assert torch.equal(blocks.decode(kind, torch.from_numpy(rows).flatten()), expected)
    assert expected.unique().numel() > 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", blocks.BLOCKS)
def test_no_default_of_the_callers_changes_what_blocks_mean(kind, dtype):
    rows = torch.arange(7 * blocks.BLOCKS[kind].size, dtype=torch.int32).remainder(53).to(torch.uint8)
    expected = blocks.decode(kind, rows)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = blocks.decode(kind, rows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_1, Kind.Q5_0, Kind.Q4_1, Kind.Q4_0, Kind.F16, Kind.BF16])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_loads_as_the_values_its_blocks_mean(make_model, tmp_path, kind, prefix):
    path = tmp_path / "sd3.5_medium.gguf"
    format = registry.BARE["transformer"] if not prefix else registry.STABILITY["transformer"]
    meant = write(path, theirs(make_model(MODEL), "transformer", format), kind)
    found = weights.load(path, dtype=torch.float32)
    # What shapes do not tell is as in the released models.
    assert found.config.transformer == replace(MODEL.transformer, sample_size=128)
    expected = joined(meant, "transformer", format)
    assert tree.diff(found.params["transformer"], expected) == []
    half = weights.load(path, dtype=torch.bfloat16)
    assert tree.diff(half.params["transformer"], tree.cast(expected, torch.bfloat16)) == []
    kept = weights.load(path, dtype="stored").params["transformer"]["blocks"][0]["image"]["mlp"]["in"]["weight"].dtype
    assert kept == {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    (part,) = weights.describe(path).parts
    count = sum(value.ndim == 2 and value.shape[1] % 32 == 0 for value in meant.values())
    assert part.blocks == ({kind.name: count} if kind.name in blocks.BLOCKS else {})


@pytest.mark.parametrize("as_llama_cpp", [False, True])
def test_a_t5_encoder_loads_under_transformers_and_under_llama_cpps_names(make_model, tmp_path, as_llama_cpp):
    format = registry.DIFFUSERS["t5"]
    tensors = theirs(make_model(MODEL), "t5", format)
    given = renamed_as_llama_cpp(tensors) if as_llama_cpp else tensors
    assert ("enc.blk.0.attn_rel_b.weight" in given) == as_llama_cpp
    meant = write(tmp_path / "t5.gguf", given, Kind.Q8_0, arch="t5encoder")
    found = weights.load(tmp_path / "t5.gguf")
    assert found.config.t5 == MODEL.t5
    expected = joined(dict(zip(tensors, meant.values(), strict=True)), "t5", format)
    assert tree.diff(found.params["t5"], expected) == []


def test_shapes_that_the_converter_flattened_are_those_its_note_says(make_model, tmp_path):
    format = registry.BARE["transformer"]
    tensors = theirs(make_model(MODEL), "transformer", format)
    name, shape = "x_embedder.proj.weight", [64, 16, 2, 2]
    note = [("comfy.gguf.orig_shape." + name, shape), ("general.author", "somebody")]
    flat = {**tensors, name: tensors[name].reshape(64, 64)}
    meant = write(tmp_path / "x.gguf", flat, Kind.Q8_0, values=note, order=-1)
    found = weights.load(tmp_path / "x.gguf")
    expected = joined({**meant, name: meant[name].reshape(shape)}, "transformer", format)
    assert tree.diff(found.params["transformer"], expected) == []
    assert weights.describe(tmp_path / "x.gguf").metadata[str(tmp_path / "x.gguf")]["general.author"] == "somebody"


def as_ggml_writes(tensors):
    """Shapes without leading dimensions of 1, as ggml's own code leaves them: it has four, and counts to the last."""
    return {name: value.reshape(shape_of_ggml(value.shape)) for name, value in tensors.items()}


def shape_of_ggml(shape):
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def test_leading_dimensions_of_one_that_ggml_drops_are_restored(make_model, tmp_path):
    model = make_model(MODEL)
    tensors = theirs(model, "transformer", registry.BARE["transformer"])
    dropped = as_ggml_writes(tensors)
    assert dropped["pos_embed"].shape == (36, 64) and tensors["pos_embed"].shape == (1, 36, 64)
    write(tmp_path / "x.gguf", dropped, Kind.F32)
    found = weights.load(tmp_path / "x.gguf")
    assert tree.diff(found.params["transformer"], model.params["transformer"]) == []


def test_leading_dimensions_of_one_are_missed_in_other_files(make_model, tmp_path):
    tensors = as_ggml_writes(theirs(make_model(MODEL), "transformer", registry.BARE["transformer"]))
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"pos_embed has shape \[36, 64\], expected \[1, 36, 64\]"):
        weights.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_tensors_of_whole_numbers_that_mean_nothing_are_passed_over(make_model, tmp_path, dtype):
    model = make_model(Config(clip_l=CONFIG.clip_l))
    tensors = theirs(model, "clip_l", registry.DIFFUSERS["clip_l"])
    positions = {"text_model.embeddings.position_ids": torch.arange(20, dtype=dtype)[None]}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "clip")
    for name, value in {**tensors, **positions}.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = weights.load(tmp_path / "x.gguf")
    assert tree.diff(found.params["clip_l"], model.params["clip_l"]) == []


def test_the_noted_shape_may_be_a_number_and_anything_else_is_named(victim, tmp_path):
    name = "final_layer.linear.bias"
    content = victim.read_bytes()
    key = f"comfy.gguf.orig_shape.{name}".encode()
    count = ours.open_gguf(victim).header.tensors[name].shape[0]
    (values,) = struct.unpack_from("<Q", content, 16)
    said = {
        struct.pack("<II", 4, count): None,
        struct.pack("<II", 4, count + 1): "said to have had the shape",
        struct.pack("<If", 6, 1.5): "said to have had the shape",
        struct.pack("<IB", 7, 1): "said to have had the shape",
        struct.pack("<IQ", 8, 1) + b"a": "said to have had the shape",
    }
    for value, problem in said.items():
        note = struct.pack("<Q", len(key)) + key + value
        changed = content[:16] + struct.pack("<Q", values + 1) + note + content[24:]
        path = tmp_path / "x.gguf"
        path.write_bytes(changed + bytes(64))
        try:
            ours.open_gguf(path)
            assert problem is None
        except WeightsError as error:
            assert problem and problem in str(error)


def test_a_gguf_file_goes_with_others_and_only_what_is_asked_for_is_read(make_model, same, tmp_path):
    model = make_model(MODEL)
    write(tmp_path / "x.gguf", theirs(model, "transformer", registry.BARE["transformer"]), Kind.Q4_0)
    weights.save(tmp_path / "t5.safetensors", model._replace(params={"t5": model.params["t5"]}), layout="single")
    both = weights.load([tmp_path / "x.gguf", tmp_path / "t5.safetensors"], dtype=torch.float32)
    assert set(both.params) == {"transformer", "t5"}
    weights.save(tmp_path / "back.safetensors", both, layout="stability")
    assert same(weights.load(tmp_path / "back.safetensors").params, both.params)
    assert list(weights.load(tmp_path / "t5.safetensors", only="t5").params) == ["t5"]


@pytest.fixture(scope="module")
def victim(make_model, tmp_path_factory):
    config = Config(
        transformer=mmdit.Config(depth=1, heads=1, head_dim=32, context_width=32, pooled_width=32, position_size=2)
    )
    path = tmp_path_factory.mktemp("victim") / "x.gguf"
    model = make_model(config)
    note = [("comfy.gguf.orig_shape.x", [1, 2]), ("tokens", ["a", "b"])]
    write(path, theirs(model, "transformer", registry.BARE["transformer"]), Kind.Q8_0, values=note)
    return path


def problem_of(path, content) -> str:
    path.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        weights.load(path)
    return str(caught.value)


def test_what_is_wrong_with_a_file_is_said(victim, tmp_path):
    content, path = victim.read_bytes(), tmp_path / "x.gguf"
    assert "is truncated" in problem_of(path, content[:20])
    assert "goes beyond its end" in problem_of(path, content[:-40])
    assert "its version 1 must be 2 or 3" in problem_of(path, content[:4] + struct.pack("<I", 1) + content[8:])
    assert "its version 50331648" in problem_of(path, content[:4] + struct.pack(">I", 3) + content[8:])
    assert "names 1,152,921,504,606,846,976 tensors, more than" in problem_of(
        path, content[:8] + struct.pack("<QQ", 2**60, 0) + content[24:]
    )
    assert "are more than it has" in problem_of(path, content[:24] + struct.pack("<Q", 2**60) + content[32:])
    name = struct.pack("<Q", len("final_layer.linear.weight")) + b"final_layer.linear.weight"
    at = content.index(name) + len(name) + 4 + 16
    assert "of ggml's kind 19 (IQ1_S); known are F32, F16, BF16, Q4_0" in problem_of(
        path, content[:at] + struct.pack("<I", 19) + content[at + 4 :]
    )
    place = content[: at + 4] + struct.pack("<Q", 0) + content[at + 12 :]
    assert "overlaps" in problem_of(path, place)
    wide = content[: at - 16] + struct.pack("<QQ", 2**40, 2**40) + content[at:]
    assert "goes beyond its end" in problem_of(path, wide)


def test_factors_that_are_not_numbers_are_named(victim, tmp_path):
    content = bytearray(victim.read_bytes())
    entry = ours.open_gguf(victim).header.tensors["joint_blocks.0.x_block.mlp.fc1.weight"]
    content[entry.start : entry.start + 2] = b"\x00\x7e"
    said = problem_of(tmp_path / "x.gguf", bytes(content))
    assert "joint_blocks.0.x_block.mlp.fc1.weight holds NaN; finite=False loads it all the same" in said
    assert weights.load(tmp_path / "x.gguf", finite=False).config.transformer


@settings(max_examples=150)
@given(st.data())
def test_a_gguf_file_with_changed_bytes_is_a_weights_error_or_a_whole_model(victim, tmp_path_factory, data):
    content, path = bytearray(victim.read_bytes()), tmp_path_factory.mktemp("mutated") / "x"
    start = min(entry.start for entry in ours.open_gguf(victim).header.tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, start - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path.write_bytes(content)
    try:
        found = weights.load(path)
    except WeightsError as error:
        assert all(str(path) in problem for problem in error.problems)
        return
    assert weights.check(found) == []
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(found.params))


@pytest.mark.parametrize(
    "name, changes",
    [
        ("transformer", {"in_channels": 1, "out_channels": 1, "patch_size": 1}),
        ("clip_l", {"length": 1}),
        ("clip_l", {"projection_width": 1}),
        ("t5", {"vocab": 1}),
        ("taesd", {"width": 1, "latent_channels": 1}),
    ],
    ids=str,
)
def test_sizes_are_read_off_shapes_without_leading_ones(make_model, tmp_path, name, changes):
    sizes = taesd.Config(encoder_blocks=(1, 1), decoder_blocks=(1, 1)) if name == "taesd" else getattr(CONFIG, name)
    model = make_model(Config(**{name: replace(sizes, **changes)}))
    tensors = theirs(model, name, (registry.NATIVE if name == "taesd" else registry.STABILITY)[name])
    dropped = as_ggml_writes(tensors)
    assert any(dropped[each].shape != tensors[each].shape for each in tensors)
    write(tmp_path / "x.gguf", dropped, Kind.F32)
    loaded = weights.load(tmp_path / "x.gguf")
    assert tree.diff(loaded.params[name], model.params[name]) == []
    assert {field: getattr(getattr(loaded.config, name), field) for field in changes} == changes


def test_trees_beside_a_model_load_from_gguf_without_leading_ones(tmp_path):
    net = controlnet.Config(depth=1, heads=1, head_dim=8, context_width=8, pooled_width=8, position_size=4)
    adapter = ip_adapter.Config(
        attentions=2,
        width=8,
        head_dim=4,
        image_width=6,
        hidden_width=8,
        depth=1,
        heads=1,
        resampler_head_dim=8,
        tokens=3,
        mlp_width=12,
        time_frequencies=4,
    )
    loaders = {"ControlNet": weights.load_controlnet, "IP-Adapter": weights.load_ip_adapter}
    rows = [(controlnet_layout.FORMATS["diffusers"], net), (ip_adapter_layout.FORMAT, adapter)]
    for format, config in rows:
        params = specs.init(prng.key(0), format.spec(config))
        tensors = format.tensors(config, tree.flatten_paths(params))
        dropped = as_ggml_writes(tensors)
        assert any(dropped[each].shape != tensors[each].shape for each in tensors)
        write(tmp_path / "x.gguf", dropped, Kind.F32)
        assert tree.diff(loaders[format.component](tmp_path / "x.gguf").params, params) == []
