"""LoRA files: every spelling means the same, what is written is read, what is wrong is named."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

from functional_sd3 import lora
from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.lora import keys as lora_keys
from functional_sd3.lora import tree as adapters
from functional_sd3.weights import WeightsError
from tests.lora.files import pair, write
from tests.weights.conftest import CONFIG

FILES = ("transformer.*", "clip_l.*", "clip_g.*", "t5.*")
LAYER = "transformer.transformer_blocks.1.attn.to_q"


def random_lora(targets=FILES, rank=2, alpha=3.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    fresh = lora.spec(CONFIG, rank, targets, alpha=alpha)
    fill = lambda path, param: torch.randn(param.shape, generator=generator)  # noqa: E731
    return specs.map_params(
        lambda path, param: torch.tensor(alpha) if path.endswith("alpha") else fill(path, param), fresh
    )


def added(one):
    """What a LoRA adds, by path: equal for LoRAs that mean the same."""
    return {path: adapters.product(node) for path, node in adapters.entries(one).items()}


def same_meaning(first, second):
    first, second = added(first), added(second)
    assert first.keys() == second.keys()
    for path in first:
        torch.testing.assert_close(first[path], second[path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [FILES, lora.ATTENTION, "clip_g.*", "*.blocks.*.qkv.weight"])
def test_peft_files_are_read_as_they_were_written(tmp_path, targets):
    one = random_lora(targets)
    lora.save(tmp_path / "lora.safetensors", one)
    assert not tree.diff(lora.load(tmp_path / "lora.safetensors", CONFIG), one)


def test_alphas_and_ranks_that_differ_survive_in_the_metadata(tmp_path):
    first, second = random_lora("*.blocks.*.attention*"), random_lora("*.blocks.*.mlp.in.weight", rank=3)
    nodes = adapters.entries(first) | adapters.entries(second)
    for index, node in enumerate(nodes.values()):
        for part in adapters.members(node)[:2]:
            part["alpha"] = torch.tensor(0.5 + index % 3)
    one = adapters.build(nodes)
    lora.save(tmp_path / "lora.safetensors", one)
    assert not tree.diff(lora.load(tmp_path / "lora.safetensors", CONFIG), one)


def test_kohya_files_mean_what_was_written(tmp_path):
    one = random_lora()
    lora.save(tmp_path / "lora.safetensors", one, layout="kohya")
    loaded = lora.load(tmp_path / "lora.safetensors", CONFIG)
    same_meaning(loaded, one)
    again = tmp_path / "again.safetensors"
    lora.save(again, loaded, layout="kohya")
    assert load_file(again).keys() == load_file(tmp_path / "lora.safetensors").keys()
    assert not tree.diff(lora.load(again, CONFIG), loaded)
    lora.save(again, loaded, layout="peft")
    same_meaning(lora.load(again, CONFIG), one)


def test_a_fused_kohya_pair_is_split_exactly_and_put_together_again(tmp_path):
    down, up = pair(16, 48)
    name = "lora_unet_joint_blocks_1_x_block_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(0.5)}
    file = write(tmp_path / "kohya.safetensors", tensors)
    loaded = lora.load(file, CONFIG)
    lora.save(tmp_path / "peft.safetensors", loaded)
    stored = load_file(tmp_path / "peft.safetensors")
    for part, letter in zip(up.chunk(3), "qkv", strict=True):
        assert torch.equal(stored[f"transformer.transformer_blocks.1.attn.to_{letter}.lora_A.weight"], down)
        assert torch.equal(stored[f"transformer.transformer_blocks.1.attn.to_{letter}.lora_B.weight"], part)
    lora.save(tmp_path / "back.safetensors", lora.load(tmp_path / "peft.safetensors", CONFIG), layout="kohya")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_modulations_whose_halves_diffusers_stores_the_other_way_round_are_swapped(tmp_path):
    stability = ("joint_blocks_2_context_block_adaLN_modulation_1", "final_layer_adaLN_modulation_1")
    diffusers = ("transformer_blocks_2_norm1_context_linear", "norm_out_linear")
    others = ("joint_blocks_1_context_block_adaLN_modulation_1", "transformer_blocks_1_norm1_context_linear")
    for layer in (*stability, *diffusers, *others):
        down, up = pair(16, 96 if layer in others else 32)
        name = f"lora_unet_{layer}"
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        file = write(tmp_path / "k.safetensors", tensors)
        (change,) = added(lora.load(file, CONFIG)).values()
        torch.testing.assert_close(change, (torch.cat([up[16:], up[:16]]) if layer in diffusers else up) @ down)
    for layout in ("peft", "kohya"):
        for layer in (*stability, *diffusers, *others):
            down, up = pair(16, 96 if layer in others else 32)
            name = f"lora_unet_{layer}"
            file = write(tmp_path / "k.safetensors", {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
            loaded = lora.load(file, CONFIG)
            lora.save(tmp_path / "again.safetensors", loaded, layout=layout)
            again = load_file(tmp_path / "again.safetensors")
            (stored,) = (value for key, value in again.items() if key.endswith((".lora_B.weight", ".lora_up.weight")))
            swapped = layer not in others and (layer in diffusers) != (layout == "peft")
            assert torch.equal(stored, torch.cat([up[16:], up[:16]]) if swapped else up), (layout, layer)
            (before,), (after,) = (
                added(loaded).values(),
                added(lora.load(tmp_path / "again.safetensors", CONFIG)).values(),
            )
            assert torch.equal(before, after)


SPELLINGS = {
    "PEFT": (LAYER + ".lora_A.weight", LAYER + ".lora_B.weight"),
    "PEFT with an adapter's name": (LAYER + ".lora_A.default.weight", LAYER + ".lora_B.default.weight"),
    "diffusers": (LAYER + ".lora.down.weight", LAYER + ".lora.up.weight"),
    "diffusers' attention processors": (
        "transformer.transformer_blocks.1.attn.processor.to_q_lora.down.weight",
        "transformer.transformer_blocks.1.attn.processor.to_q_lora.up.weight",
    ),
    "PEFT's own": tuple(f"base_model.model.transformer_blocks.1.attn.to_q.lora_{x}.weight" for x in "AB"),
    "LyCORIS": tuple(f"lycoris_transformer_blocks_1_attn_to_q.lora_{x}.weight" for x in ("down", "up")),
    "OneTrainer": tuple(f"lora_transformer_transformer_blocks_1_attn_to_q.lora_{x}.weight" for x in ("down", "up")),
}
TEXT_SPELLINGS = {
    "PEFT": tuple(f"text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj.lora_{x}.weight" for x in "AB"),
    "without wrapper": tuple(f"text_encoder_2.encoder.layers.1.self_attn.q_proj.lora_{x}.weight" for x in "AB"),
    "diffusers": tuple(
        f"text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.{x}.weight"
        for x in ("down", "up")
    ),
    "old diffusers": tuple(
        f"text_encoder_2.text_model.encoder.layers.1.self_attn.to_q_lora.{x}.weight" for x in ("down", "up")
    ),
    "ComfyUI": tuple(
        f"text_encoders.clip_g.transformer.text_model.encoder.layers.1.self_attn.q_proj.lora_{x}.weight"
        for x in ("down", "up")
    ),
    "kohya": tuple(f"lora_te2_text_model_encoder_layers_1_self_attn_q_proj.lora_{x}.weight" for x in ("down", "up")),
}
CASES = [("transformer.blocks.1.image.attention.qkv.weight", 16, keys) for keys in SPELLINGS.values()]
CASES += [("clip_g.blocks.1.attention.qkv.weight", 24, keys) for keys in TEXT_SPELLINGS.values()]


@pytest.mark.parametrize("path, width, keys", CASES, ids=[*SPELLINGS, *(f"text, {name}" for name in TEXT_SPELLINGS)])
def test_every_spelling_of_one_layer_means_the_same(tmp_path, path, width, keys):
    down, up = pair(width, width)
    loaded = lora.load(write(tmp_path / "lora.safetensors", dict(zip(keys, (down, up), strict=True))), CONFIG)
    expected = torch.cat([up @ down, torch.zeros(2 * width, width)])
    torch.testing.assert_close(added(loaded), {path: expected})


def test_spellings_of_outputs_and_of_stability():
    find = lambda name: lora_keys.table(CONFIG).find(name)[1].weight  # noqa: E731
    out = "transformer.blocks.1.image.attention.out.weight"
    for name in (
        "transformer.transformer_blocks.1.attn.to_out.0",
        "transformer.transformer_blocks.1.attn.to_out",
        "lora_unet_joint_blocks_1_x_block_attn_proj",
        "diffusion_model.joint_blocks.1.x_block.attn.proj",
        "model.diffusion_model.joint_blocks.1.x_block.attn.proj",
    ):
        assert find(name).path == out
    old = find("text_encoder.text_model.encoder.layers.0.self_attn.to_out")
    assert old.path == "clip_l.blocks.0.attention.out.weight"
    t5 = find("lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_1")
    assert (t5.path, t5.part, t5.parts) == ("t5.blocks.1.mlp.in.weight", 1, 2)


def alpha_of(loaded):
    (node,) = adapters.entries(loaded).values()
    return float(adapters.members(node)[0]["alpha"])


def test_alpha_comes_from_the_tensor_then_the_metadata_then_the_rank(tmp_path):
    keys = dict(zip(SPELLINGS["PEFT"], pair(), strict=True))
    said = {"transformer.r": 2, "transformer.lora_alpha": 6}
    said["transformer.alpha_pattern"] = {"transformer_blocks.1.attn.to_q": 5}
    file = tmp_path / "lora.safetensors"
    assert alpha_of(lora.load(write(file, keys), CONFIG)) == 2
    assert alpha_of(lora.load(write(file, keys, lora_adapter_metadata=json.dumps(said)), CONFIG)) == 5
    said["transformer.alpha_pattern"] = {"attn.to_k": 5, "^to_q": 7}
    assert alpha_of(lora.load(write(file, keys, lora_adapter_metadata=json.dumps(said)), CONFIG)) == 6
    # Two spellings of one pattern: the first counts.
    said["transformer.alpha_pattern"] = {r"attn\.to_q": 6, "attn.to_q": 3}
    assert alpha_of(lora.load(write(file, keys, lora_adapter_metadata=json.dumps(said)), CONFIG)) == 6
    said["transformer.use_rslora"] = True
    loaded = lora.load(write(file, keys, lora_adapter_metadata=json.dumps(said)), CONFIG)
    assert alpha_of(loaded) / 2 == pytest.approx(6 / 2**0.5)
    keys[LAYER + ".alpha"] = torch.tensor(9)
    assert alpha_of(lora.load(write(file, keys, lora_adapter_metadata=json.dumps(said)), CONFIG)) == 9


@pytest.mark.parametrize("pattern", [
    "attn.to_q", "^transformer_blocks.1.attn.to_q", r"^transformer_blocks\.1\.attn\.to_q", "to_q", r"1\.attn\.to_q",
    r"transformer_blocks\.\d+\.attn\.to_q", ".*attn.*", "attn.to_(q|k)", "to_[qk]", "o_q", "^attn.to_q",
    "transformer_blocks.1", "attn", "to_q$", "^.*to_q",
])  # fmt: skip
def test_patterns_of_metadata_fit_the_layers_that_peft_says_they_fit(tmp_path, pattern):
    from peft.utils.other import get_pattern_key

    said = {"transformer.lora_alpha": 6, "transformer.alpha_pattern": {pattern: 5, "to_q": 4}}
    keys = dict(zip(SPELLINGS["PEFT"], pair(), strict=True))
    file = write(tmp_path / "lora.safetensors", keys, lora_adapter_metadata=json.dumps(said))
    fits = get_pattern_key([pattern, "to_q"], "transformer_blocks.1.attn.to_q")
    assert alpha_of(lora.load(file, CONFIG)) == {pattern: 5, "to_q": 4}[fits]


@pytest.mark.parametrize("pattern, said", [
    ("to_(q", "has an unbalanced"), ("[a-z]{99999999999}", "too large"), ("a" * 1001 + "*", "more than 1,000"),
    ("(?<=a)b", "not supported"),
])  # fmt: skip
def test_patterns_that_are_none_are_named(tmp_path, pattern, said):
    metadata = json.dumps({"transformer.alpha_pattern": {pattern: 5}})
    file = write(
        tmp_path / "a.safetensors", dict(zip(SPELLINGS["PEFT"], pair(), strict=True)), lora_adapter_metadata=metadata
    )
    for read in (lora.layers, lambda path: lora.load(path, CONFIG)):
        with pytest.raises(WeightsError, match=f"transformer.alpha_pattern has .*{said}"):
            read(file)


def test_patterns_that_would_take_for_ever_are_compared_at_once(tmp_path):
    # With `re`, the first of them takes centuries for each of these names.
    patterns = {
        f"{pattern}{'x' * index}": 5 for index, pattern in enumerate(["(a+)+x", ".*.*.*x", "(a|a)*x", "(.*)*x"])
    }
    keys = {f"transformer.{'a' * 40}{i}.lora_{side}.weight": torch.ones(1, 1) for i in range(200) for side in "AB"}
    file = write(
        tmp_path / "a.safetensors", keys, lora_adapter_metadata=json.dumps({"transformer.alpha_pattern": patterns})
    )
    began = time.process_time()
    assert len(lora.layers(file)) == 200
    assert time.process_time() - began < 10  # 0.1 s here
    many = {"transformer.rank_pattern": {f"{index}[ab]": 5 for index in range(65)}}
    with pytest.raises(WeightsError, match="has more than 64 regular expressions"):
        lora.layers(write(file, keys, lora_adapter_metadata=json.dumps(many)))
    long = {f"transformer.{'a' * 250}{i}.lora_{side}.weight": torch.ones(1, 1) for i in range(700) for side in "AB"}
    many = {"transformer.rank_pattern": {f"{index}[ab]": 5 for index in range(64)}}
    with pytest.raises(WeightsError, match="64 regular expressions of .* would be compared with 18.,... characters"):
        lora.layers(write(file, long, lora_adapter_metadata=json.dumps(many)))


def test_a_folder_of_pefts_own_is_read_with_its_config(tmp_path):
    write(tmp_path / "adapter_model.safetensors", dict(zip(SPELLINGS["PEFT's own"], pair(), strict=True)))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, "rank_pattern": {}}))
    assert alpha_of(lora.load(tmp_path, CONFIG)) == 8


def test_dtypes_are_kept_or_changed_as_asked(tmp_path):
    one = tree.cast(random_lora(lora.ATTENTION, alpha=2.7), torch.float16)
    lora.save(tmp_path / "lora.safetensors", random_lora(lora.ATTENTION, alpha=2.7), dtype=torch.float16)
    kinds = lambda loaded: {(p[-5:] == "alpha", leaf.dtype) for p, leaf in tree.flatten_paths(loaded).items()}  # noqa: E731
    assert kinds(lora.load(tmp_path / "lora.safetensors", CONFIG)) == {(False, torch.float16), (True, torch.float32)}
    wide = lora.load(tmp_path / "lora.safetensors", CONFIG, dtype=torch.bfloat16)
    assert kinds(wide) == {(False, torch.bfloat16), (True, torch.float32)}
    assert all(leaf.dtype == torch.float16 for leaf in tree.leaves(one))


def problems(file, config=CONFIG, **options):
    with pytest.raises(WeightsError) as caught:
        lora.load(file, config, **options)
    assert all(str(file) in problem for problem in caught.value.problems)
    return str(caught.value)


def test_a_lora_of_which_nothing_matches_is_an_error_even_when_not_strict(tmp_path):
    file = write(tmp_path / "flux.safetensors", {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": pair()[0]})
    for strict in (True, False):
        said = problems(file, strict=strict)
        assert "nothing in it adapts a layer of this model: it is a LoRA of Flux" in said


def test_keys_that_do_not_match_are_named_unless_told_otherwise(tmp_path):
    tensors = dict(zip(SPELLINGS["PEFT"], pair(), strict=True))
    more = {"transformer.transformer_blocks.9.attn.to_q.lora_A.weight": pair()[0], "position": torch.zeros(1)}
    file = write(tmp_path / "lora.safetensors", tensors | more)
    said = problems(file)
    assert all(key in said for key in more) and SPELLINGS["PEFT"][0] not in said
    assert list(adapters.entries(lora.load(file, CONFIG, strict=False))) == [CASES[0][0]]


@pytest.mark.parametrize("suffix, what", [
    ("oft_blocks", "OFT"), ("a1.weight", "GLoRA"), ("on_input", "(IA)3"), ("lora_embedding_A", "embedding"),
])  # fmt: skip
def test_what_no_formula_is_known_of_is_refused_by_name(tmp_path, suffix, what):
    tensors = dict(zip(SPELLINGS["PEFT"], pair(), strict=True)) | {f"{LAYER}.{suffix}": torch.ones(16)}
    file = write(tmp_path / "lora.safetensors", tensors)
    for strict in (True, False):
        said = problems(file, strict=strict)
        assert f"{LAYER}.{suffix}" in said and what in said


def test_a_dora_by_its_metadata_that_has_no_magnitudes_is_refused(tmp_path):
    tensors = dict(zip(SPELLINGS["PEFT"], pair(), strict=True))
    said = json.dumps({"transformer.use_dora": True})
    assert "holds no magnitudes" in problems(write(tmp_path / "lora.safetensors", tensors, lora_adapter_metadata=said))


DOWN, UP = SPELLINGS["PEFT"]


@pytest.mark.parametrize("change, named, said", [
    (lambda down, up: {DOWN: down}, DOWN, "has no up beside it"),
    (lambda down, up: {UP: up}, UP, "has no down beside it"),
    (lambda down, up: {DOWN: down[:1], UP: up}, DOWN, "has rank 1, .* has 2"),
    (lambda down, up: {DOWN: down[:0], UP: up[:, :0]}, DOWN, r"is \[0, 16\] and holds no values: its rank is 0"),
    (lambda down, up: {DOWN: down[0, 0], UP: up}, DOWN, r"is \[\], the layer takes"),
    (lambda down, up: {DOWN: down[:, :8], UP: up}, DOWN, r"is \[2, 8\], the layer takes \[16\]; is the LoRA for anoth"),
    (lambda down, up: {DOWN: down, UP: up[:8]}, UP, r"is \[8, 2\], the layer gives 16; is the LoRA for another model"),
    (lambda down, up: {DOWN: down[0], UP: up}, DOWN, r"is \[16\], the layer takes"),
    (lambda down, up: {DOWN: down / 0, UP: up}, DOWN, "not finite"),
    (lambda down, up: {DOWN: down, UP: up.int()}, UP, "dtype torch.int32, not a float"),
    (lambda down, up: {DOWN: down, UP: up, LAYER + ".alpha": torch.ones(3)}, ".alpha", r"one number, not \[3\]"),
    (lambda down, up: {DOWN: down, UP: up, DOWN.replace("A.w", "A.x.w"): down + 1}, DOWN, "same tensor under two"),
])  # fmt: skip
def test_tensors_that_are_wrong_are_named(tmp_path, change, named, said):
    import re

    message = problems(write(tmp_path / "lora.safetensors", change(*pair())))
    assert named in message and re.search(said, message)


@pytest.mark.parametrize("metadata, said", [
    ("{", "is no JSON"),
    ("[]", "not a JSON object"),
    ('{"transformer.r": "x"}', "transformer.r is 'x', not a positive number"),
    ('{"transformer.lora_alpha": 1' + "0" * 400 + "}", "transformer.lora_alpha is 10"),
    ('{"transformer.alpha_pattern": {"a": -1}}', "must map names to positive numbers"),
    ('{"transformer.r": 7}', "has rank 2, its metadata says 7"),
])  # fmt: skip
def test_metadata_that_is_wrong_is_named(tmp_path, metadata, said):
    tensors = dict(zip(SPELLINGS["PEFT"], pair(), strict=True))
    assert said in problems(write(tmp_path / "lora.safetensors", tensors, lora_adapter_metadata=metadata))


def test_a_linear_layers_pair_may_be_stored_as_a_convolutions(tmp_path):
    down, up = pair()
    file = write(tmp_path / "lora.safetensors", {DOWN: down[:, :, None, None], UP: up[:, :, None, None]})
    (change,) = added(lora.load(file, CONFIG)).values()
    assert torch.equal(change[:16], up @ down)


def test_one_matrix_and_its_parts_cannot_both_be_adapted(tmp_path):
    down, up = pair(16, 48)
    name = "lora_unet_joint_blocks_1_x_block_attn_qkv"
    tensors = dict(zip(SPELLINGS["PEFT"], pair(), strict=True))
    tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    assert "both as one matrix and as several" in problems(write(tmp_path / "lora.safetensors", tensors))


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.safetensors").write_text("hello")
    problems(tmp_path / "text.safetensors")
    problems(tmp_path / "absent.safetensors")
    (tmp_path / "folder").mkdir()
    assert "is a folder without pytorch_lora_weights.safetensors" in problems(tmp_path / "folder")
    kinds = {
        "other.txt": "name the file of the LoRA",
        "config.json": "--controlnet",
        "step-00000003.safetensors": "--resume",
        "learned_embeds.safetensors": "--embedding",
        "model_index.json": "--params",
    }
    for name, option in kinds.items():
        (tmp_path / "folder" / name).touch()
        assert option in problems(tmp_path / "folder")


def test_what_cannot_be_saved_is_named_and_writes_nothing(tmp_path):
    file = tmp_path / "lora.safetensors"
    vae = lora.spec(CONFIG, 2, "vae.*.conv_in.weight")
    vae = specs.map_params(lambda path, param: torch.zeros(param.shape), vae)
    stack = tree.map(lambda leaf: torch.stack([leaf, leaf]), random_lora())
    for given, options, said in (
        (random_lora(), {"layout": "onnx"}, "layout 'onnx' must be one of peft, kohya"),
        (vae, {}, "no names for LoRAs of vae"),
        ({}, {}, "without adapters"),
        (stack, {}, "is a stack of LoRAs"),
    ):
        with pytest.raises(ValueError, match=said):
            lora.save(file, given, **options)
    assert not file.exists()


def test_the_layers_of_a_file_are_listed_whatever_model_it_is_for(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = pair(16, 48)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(0.5)}
    assert lora.layers(write(tmp_path / "flux.safetensors", tensors)) == [lora.Layer(name, 2, 16, 48, 0.5, numbers=128)]
    for tensors in ({"weight": down}, {DOWN: down[0, 0], UP: up}, {DOWN: down, UP: up[0]}):
        with pytest.raises(WeightsError, match="holds no LoRA"):
            lora.layers(write(tmp_path / "flux.safetensors", tensors))
    strange = {DOWN: down, UP: up, LAYER + ".alpha": torch.ones(3)}
    assert lora.layers(write(tmp_path / "flux.safetensors", strange)) == [
        lora.Layer(LAYER, 2, 16, 48, 2.0, numbers=128)
    ]
