"""LoRA files of unknown origin: whatever their keys, shapes, dtypes, values and metadata, they load or a WeightsError
says why, at once and within the memory of the file."""

import json
import resource
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from functional_sd3 import lora
from functional_sd3.lora import read as lora_read
from functional_sd3.lora import tree as adapters
from functional_sd3.weights import WeightsError
from tests.lora.params import PARAMS
from tests.weights.conftest import CONFIG

LAYERS = (
    "transformer.transformer_blocks.1.attn.to_q", "lora_unet_joint_blocks_1_x_block_attn_qkv",
    "lora_unet_x_embedder_proj",
    "transformer.joint_blocks.2.context_block.adaLN_modulation.1", "transformer.transformer_blocks.1.attn.norm_q",
    "lora_te1_text_model_encoder_layers_1_self_attn_k_proj", "transformer.pos_embed", "lora_te3_shared", "x", "",
    "transformer.transformer_blocks.99.attn.to_q", "lora_unet_double_blocks_0_img_attn_qkv", "\x1b[2J", "a" * 400,
)  # fmt: skip
ROLES = (
    "lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_down.1.weight",
    "lora_B.bias", "alpha", "dora_scale", "lora_magnitude_vector", "diff", "diff_b", "w_norm", "b_norm", "hada_w1_a",
    "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2",
    "lokr_w2_a", "lokr_w2_b", "lokr_t2", "weight", "oft_blocks", "absmax", "",
)  # fmt: skip
PAIRS = (
    ("lora_A.weight", "lora_B.weight"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("lokr_w1", "lokr_w2"),
    ("lokr_w1", "lokr_w2_a", "lokr_w2_b"), ("lora_down.weight", "lora_up.weight", "dora_scale"), ("diff", "diff_b"),
)  # fmt: skip
SIZES = st.sampled_from([0, 1, 2, 2, 3, 4, 8, 16, 16, 16, 32, 48])
SHAPES = st.lists(SIZES, max_size=5).filter(lambda shape: torch.Size(shape).numel() < 5000)
DTYPES = st.sampled_from([torch.float32] * 6 + [
    torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool,
    torch.complex64,
])  # fmt: skip
VALUES = st.sampled_from([1.0] * 8 + [0.0, -2.0, float("nan"), float("inf"), 1e30, -1e-30])
TENSORS = st.tuples(SHAPES, DTYPES, VALUES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([f"{prefix}{name}" for prefix in ("transformer.", "lora_unet_", "") for name in (
    "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
)])  # fmt: skip
PATTERNS = st.dictionaries(
    st.sampled_from(["to_q", "(a+)+x", "", "^", "(", r".*\.to_[qk]", "[z-a]", "a{9999}", "\x1b"]) | st.text(max_size=5),
    st.sampled_from([1, 2, 3.5]) | JSON, max_size=3,
)  # fmt: skip
METADATA = st.none() | st.text(max_size=20) | st.dictionaries(NAMES, JSON | PATTERNS, max_size=4).map(json.dumps)


@st.composite
def contents(draw):
    keys = draw(st.lists(st.tuples(st.sampled_from(LAYERS), st.sampled_from(ROLES)), max_size=4))
    layer = draw(st.sampled_from(LAYERS[:6]))
    keys += [(layer, role) for role in draw(st.sampled_from([*PAIRS, ()]))]
    names = {".".join(filter(None, key)) or "empty" for key in keys}
    return {name: draw(TENSORS) for name in sorted(names)}


def tensor(shape, dtype, value):
    try:
        return torch.full(shape, value).to(dtype)
    except RuntimeError:
        return torch.ones(shape).to(dtype)


def load_or_error(file):
    """A LoRA, or None where a WeightsError says what is wrong with its file."""
    for read in (lambda: lora_read.summary(lora.layers(file)), lambda: lora.load(file, CONFIG, strict=False)):
        try:
            found = read()
        except WeightsError as error:
            assert str(file) in str(error) and "\x1b" not in str(error)
            found = None
    try:
        return lora.load(file, CONFIG)
    except WeightsError as error:
        assert str(file) in str(error) and "\x1b" not in str(error)
        return found


@settings(max_examples=80, deadline=None)
@given(contents(), METADATA)
def test_a_file_of_any_content_loads_or_is_named(tmp_path_factory, content, metadata):
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    tensors = {name: tensor(*described) for name, described in content.items()}
    save_file(tensors, file, metadata={} if metadata is None else {"lora_adapter_metadata": metadata})
    one = load_or_error(file)
    if one is not None and adapters.entries(one):
        lora.apply(PARAMS, one, 0.5)
        lora.apply(PARAMS, one, 0.5, lazy=True)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_fitting_factors_of_every_kind_load_whatever_their_dtypes(tmp_path_factory, data):
    """The other side: a check that refused everything would pass the test above."""
    file = tmp_path_factory.getbasetemp() / "fits.safetensors"
    layer, rank = LAYERS[0], data.draw(st.integers(1, 3))
    sizes = data.draw(st.sampled_from([
        {"lora_A.weight": (rank, 16), "lora_B.weight": (16, rank)}, {"diff": (16, 16)},
        {"lokr_w1": (4, 4), "lokr_w2": (4, 4)},
        {"hada_w1_a": (16, rank), "hada_w1_b": (rank, 16), "hada_w2_a": (16, rank), "hada_w2_b": (rank, 16)},
    ]))  # fmt: skip
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
    tensors = {f"{layer}.{name}": torch.ones(shape).to(data.draw(dtypes)) for name, shape in sizes.items()}
    save_file(tensors, file)
    one = lora.load(file, CONFIG)
    lora.apply(PARAMS, one, lazy=True)
    changed = lora.apply(PARAMS, one)["transformer"]["blocks"][1]["image"]["attention"]["qkv"]["weight"]
    assert (changed - PARAMS["transformer"]["blocks"][1]["image"]["attention"]["qkv"]["weight"])[:16].min() > 0.9


def spent(read) -> tuple[float, int]:
    """Seconds of this process and bytes by which its peak of memory rose."""
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(WeightsError):
        read()
    return time.process_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024


HEAVY = {
    "2,000 unknown names": {f"transformer.transformer_blocks.{i}.attn.to_qq.lora_A.weight": (1, 1) for i in range(2000)}
    | {f"{LAYERS[0]}.lora_A.weight": (1, 16), f"{LAYERS[0]}.lora_B.weight": (16, 1)},
    "five long names that are nearly known": {
        f"transformer_blocks_{i}_attn_to_q{'_attn_to_q' * 2000}.lora_A.weight": (1, 1) for i in range(5)
    } | {f"{LAYERS[0]}.lora_A.weight": (1, 16), f"{LAYERS[0]}.lora_B.weight": (16, 1)},
    "names of a million letters": {"lora_down." * 50_000 + str(i): (1, 1) for i in range(4)}
    | {"_" * 500_000: (1, 1), "transformer." * 40_000 + "lora_A.weight": (1, 1), ".down" * 100_000: (1, 1)},
    "a product larger than any weight": {f"{LAYERS[0]}.lokr_w1": (1000, 1000), f"{LAYERS[0]}.lokr_w2": (1000, 1000)},
    "factors larger than any weight": {f"{LAYERS[0]}.lokr_w1_a": (200_000, 1), f"{LAYERS[0]}.lokr_w1_b": (1, 200_000),
                                       f"{LAYERS[0]}.lokr_w2": (2, 2)},
    "a core larger than any weight": {"lora_unet_x_embedder_proj.lora_mid.weight": (1, 1, 1000, 1000),
                                      "lora_unet_x_embedder_proj.lora_down.weight": (1, 100_000),
                                      "lora_unet_x_embedder_proj.lora_up.weight": (16, 1)},
    "zeros times infinity": {f"{LAYERS[0]}.lora_A.weight": (0, 2**40, 2**40), f"{LAYERS[0]}.lora_B.weight": (16, 0)},
}  # fmt: skip


@pytest.mark.parametrize("name", HEAVY)
def test_small_files_take_neither_minutes_nor_gigabytes(tmp_path, name):
    file, place = tmp_path / "heavy.safetensors", 0
    header = {}
    for key, shape in HEAVY[name].items():
        size = 2 * torch.Size(shape[:1]).numel() * (1 if 0 in shape else torch.Size(shape[1:]).numel())
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(place))
    for read in (lambda: lora.load(file, CONFIG), lambda: lora.load(file, CONFIG, strict=False) and _wrong()):
        seconds, memory = spent(read)
        assert seconds < 10 and memory < 500 * 2**20, (seconds, memory)


def _wrong():
    """Without `strict` some of these files have a LoRA beside what is left out."""
    raise WeightsError("loaded")
