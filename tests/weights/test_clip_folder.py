"""CLIP folders and files: what is read, and one error that names everything wrong."""

import json

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import prng, tree
from functional_sd3.formats import files
from functional_sd3.image import clip_pixels
from functional_sd3.layouts import rules
from functional_sd3.layouts.clip_dual import LAYOUT
from functional_sd3.text import bpe, clip
from functional_sd3.text.clip import dual as clip_dual
from functional_sd3.weights import WeightsError
from tests import models

CONFIG = clip_dual.Config(
    clip.Config(60, 20, 128, 2, 2, 24, projection_width=16, eos_id=49407),
    clip.ImageConfig(16, 8, 64, 3, 1, 40, projection_width=16),
)
PARAMS = clip_dual.init(prng.key(0), CONFIG)
CONFIG_FILE = {
    "model_type": "clip",
    "projection_dim": 16,
    "text_config": {
        "vocab_size": 60, "max_position_embeddings": 20, "hidden_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 24,
    },
    "vision_config": {
        "image_size": 16, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1,
        "intermediate_size": 40,
    },
}  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    return rules.to_theirs(LAYOUT, clip_dual.spec(CONFIG), tree.flatten_paths(PARAMS))


def write(folder, config=CONFIG_FILE, state=None):
    files.write(folder / "model.safetensors", tensors() if state is None else state)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_loads_as_it_was_written(tmp_path):
    loaded = weights.load_clip(write(tmp_path))
    assert loaded.config == CONFIG
    assert tree.allclose(loaded.params, PARAMS, rtol=0, atol=0)
    half = weights.load_clip(tmp_path, dtype=torch.float16)
    assert {leaf.dtype for leaf in tree.leaves(half.params)} == {torch.float16}


def test_a_file_alone_tells_its_sizes_by_its_shapes(tmp_path):
    files.write(tmp_path / "clip.safetensors", tensors())
    loaded = weights.load_clip(tmp_path / "clip.safetensors")
    assert loaded.config.image == CONFIG.image
    assert loaded.config.text.width == 128 and loaded.config.text.heads == 2 and loaded.config.text.layers == 2
    assert loaded.pixels == clip_pixels.Config(16, 16)


def test_counted_positions_of_old_files_are_passed_over(tmp_path):
    state = tensors() | {f"{part}_model.embeddings.position_ids": torch.arange(5)[None] for part in ("text", "vision")}
    assert weights.load_clip(write(tmp_path, state=state)).config == CONFIG


def test_what_old_config_files_say_twice_counts_as_transformers_counts_it(tmp_path):
    twice = {**CONFIG_FILE, "vision_config": {"hidden_size": 1}, "vision_config_dict": CONFIG_FILE["vision_config"],
             "text_config_dict": None}  # fmt: skip
    assert weights.load_clip(write(tmp_path, twice)).config == CONFIG


def test_the_tokenizer_comes_along(tmp_path):
    tables = models.tokenizers().clip_l
    bpe.save(write(tmp_path), tables)
    assert bpe.apply(weights.load_clip(tmp_path).tokenizer, ["a red circle"]).equal(bpe.apply(tables, ["a red circle"]))


def broken(folder, problem):
    state, config = tensors(), json.loads(json.dumps(CONFIG_FILE))
    if problem == "missing":
        del state["vision_model.pre_layrnorm.weight"], state["logit_scale"]
    elif problem == "unexpected":
        state["vision_model.extra"] = torch.zeros(3)
    elif problem == "misshapen":
        state["visual_projection.weight"] = torch.zeros(16, 5)
    elif problem == "whole numbers":
        state["logit_scale"] = torch.tensor(3)
    elif problem == "another model":
        config["model_type"] = "siglip"
    elif problem == "sizes":
        config["vision_config"]["num_attention_heads"] = 7
    elif problem == "activation":
        config["text_config"]["hidden_act"] = "relu"
    write(folder, config, state)
    if problem == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
    elif problem == "preprocessing":
        (folder / "preprocessor_config.json").write_text('{"resample": 2}')
    elif problem == "crop":
        (folder / "preprocessor_config.json").write_text('{"size": 32, "crop_size": 24}')
    elif problem == "tokenizer":
        (folder / "vocab.json").write_text("{}")


@pytest.mark.parametrize(
    "problem, words",
    [
        ("missing", ["vision_model.pre_layrnorm.weight is missing", "logit_scale is missing"]),
        ("unexpected", ["vision_model.extra is unexpected"]),
        ("misshapen", ["visual_projection.weight has shape [16, 5], expected [16, 64]"]),
        ("whole numbers", ["logit_scale has dtype torch.int64"]),
        ("another model", ["model_type is 'siglip'"]),
        ("sizes", ["vision_config: width 64 is not a multiple of the 7 heads"]),
        ("activation", ["text_config: hidden_act is 'relu'"]),
        ("truncated", ["model.safetensors", "truncated"]),
        ("preprocessing", ["resample is 2"]),
        ("crop", ["crop_size is 24: it must be 16, which the image encoder reads"]),
        ("tokenizer", ["merges.txt"]),
    ],
)
def test_problems_are_named(tmp_path, problem, words):
    broken(tmp_path, problem)
    with pytest.raises(WeightsError) as raised:
        weights.load_clip(tmp_path)
    for word in words:
        assert word in str(raised.value)


def test_what_is_no_clip_model_is_refused(tmp_path):
    files.write(tmp_path / "other.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(WeightsError, match="is no CLIP model"):
        weights.load_clip(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="does not exist"):
        weights.load_clip(tmp_path / "absent")
    with pytest.raises(WeightsError, match="config.json"):
        weights.load_clip(tmp_path)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("size", ["224", -1, 0, 0.5, True, [16], {"shortest_edge": "16"}, {"shortest_edge": 16, "x": 17}, {}, 10**400]),
        ("crop_size", ["16", {"height": 16, "width": None}, {"height": [16]}, {"width": 16}, 17, 8]),
        ("image_mean", [[0.5, 0.5], 5, "abc", [0.5, 0.5, "x"], [0.5, 0.5, None], [10**400, 0, 0], [1e300, 0, 0], {}]),
        ("image_std", [[0.5, 0.5, 0], [0.5, 0.5, -1], [0.5, 0.5, True], [[0.5], 1, 1]]),
        ("resample", [99, "3", [3], 3.5, -1]),
        ("do_resize", [False, 1, "yes"]),
        ("do_center_crop", [False, []]),
        ("do_normalize", [False, {}]),
        ("do_rescale", [False, 0]),
        ("rescale_factor", [1, "x", 0, 10**400]),
    ],
)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_wrong_value_of_the_preprocessing_is_named_with_file_and_field(tmp_path, name, field, values):
    write(tmp_path)
    for value in values:
        content = {field: value} if name.startswith("pre") else {"image_processor": {field: value}}
        digits = str(10**400)
        text = json.dumps(content).replace(digits, "9" * 400)
        (tmp_path / name).write_text(text)
        with pytest.raises(WeightsError) as caught:
            weights.load_clip(tmp_path)
        (problem,) = caught.value.problems
        assert str(tmp_path / name) in problem and field in problem and len(problem) < 500, value


@pytest.mark.parametrize("text", ['{"image_mean": [NaN, 0, 0]}', '{"size": Infinity}', "[]", "{", "[" * 10_000, ""])
def test_preprocessing_that_is_no_json_is_named(tmp_path, text):
    write(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(WeightsError, match="preprocessor_config.json: is "):
        weights.load_clip(tmp_path)


def test_preprocessing_as_their_files_have_it_is_read(tmp_path):
    write(tmp_path)
    fields = {
        "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "resample": 3, "do_rescale": True,
        "rescale_factor": 0.00392156862745098, "image_mean": [0.5, 0, 1], "image_std": [1, 0.5, 2],
        "feature_extractor_type": "CLIPFeatureExtractor", "do_convert_rgb": True,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    assert weights.load_clip(tmp_path).pixels == clip_pixels.Config(16, 16, (0.5, 0.0, 1.0), (1.0, 0.5, 2.0))
