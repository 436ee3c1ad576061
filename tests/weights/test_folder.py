"""Diffusers folders: what is saved loads again bit for bit, and everything that is wrong with one is said at once."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.flow import schedule
from functional_sd3.formats import files, shards
from functional_sd3.image import vae
from functional_sd3.layouts import config_fields, diffusers_configs
from functional_sd3.text import bpe
from functional_sd3.transformer import mmdit
from functional_sd3.transformer.embeddings import position_table
from functional_sd3.weights import Config, Model, Tokenizers, WeightsError
from tests.weights.conftest import CONFIG
from tests.weights.strategies import DTYPES, configs


@settings(max_examples=25)
@given(configs(), st.sampled_from(DTYPES), st.sampled_from([None, 1, 300]), st.integers(0, 99))
def test_load_of_save_is_the_model_bit_for_bit(make_model, same, tmp_path_factory, config, dtype, shard_bytes, seed):
    model = make_model(config, seed, dtype)
    folder = tmp_path_factory.mktemp("trip") / "model"
    weights.save(folder, model, shard_bytes=shard_bytes)
    found = weights.load(folder, dtype="stored")
    assert found.config == config
    assert same(found.params, model.params)
    assert found.tokenizers == Tokenizers(None, None, None)


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    """A whole small model on disk, which tests must not change."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    weights.save(folder, make_model(), shard_bytes=4000)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that tests may break."""
    return shutil.copytree(saved, tmp_path / "model")


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**values, **changes}.items() if value != "absent"}))


def problems_of(folder, **options) -> list[str]:
    with pytest.raises(WeightsError) as caught:
        weights.load(folder, **options)
    return [problem.replace(f"{folder}{os.sep}", "") for problem in caught.value.problems]


def test_dtypes_convert_on_saving_and_on_loading(make_model, same, tmp_path):
    model = make_model()
    weights.save(tmp_path / "half", model, dtype=torch.bfloat16)
    halves = tree.cast(model.params, torch.bfloat16)
    assert same(weights.load(tmp_path / "half", dtype="stored").params, halves)
    assert same(weights.load(tmp_path / "half", dtype=torch.float32).params, tree.cast(halves, torch.float32))
    assert json.loads((tmp_path / "half" / "text_encoder" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_parameters_of_different_dtypes_keep_them(make_model, same, tmp_path):
    model = make_model()
    model.params["t5"]["blocks"][0]["mlp"]["out"]["weight"] = torch.rand(16, 12, dtype=torch.float64)
    weights.save(tmp_path / "mixed", model)
    assert same(weights.load(tmp_path / "mixed", dtype="stored").params, model.params)


def test_only_what_is_asked_for_is_read(saved, same):
    whole = weights.load(saved, dtype="stored")
    one = weights.load(saved, only="transformer", dtype="stored")
    two = weights.load(saved, only=["vae", "clip_g"], dtype="stored")
    assert list(one.params) == ["transformer"]
    assert one.config == Config(transformer=whole.config.transformer, schedule=whole.config.schedule)
    assert set(two.params) == {"vae", "clip_g"}
    assert same(two.params["vae"], whole.params["vae"])
    with pytest.raises(ValueError, match="only='unet' is not a component; known are clip_l, clip_g, t5, transformer"):
        weights.load(saved, only="unet")


def test_an_encoder_whose_folder_is_absent_is_absent(folder):
    shutil.rmtree(folder / "text_encoder_3")
    edit(folder / "model_index.json", text_encoder_2=[None, None])
    found = weights.load(folder, dtype="stored")
    assert set(found.params) == {"clip_l", "transformer", "vae"}
    assert found.config.t5 is None and found.config.clip_g is None
    shutil.rmtree(folder / "vae")
    assert problems_of(folder) == [
        "vae/config.json: cannot be opened: no such file or directory",
        "vae/diffusion_pytorch_model.safetensors: is missing (no such file or directory)",
    ]


def test_every_problem_of_a_folder_is_in_one_error(folder):
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    edit(folder / "text_encoder" / "config.json", hidden_act="relu", layer_norm_eps=0)
    (folder / "text_encoder_2" / "config.json").write_text("{")
    shard = next(path for path in sorted((folder / "text_encoder_3").iterdir()) if "00002-of" in path.name)
    shard.write_bytes(shard.read_bytes()[:-1])
    edit(folder / "transformer" / "config.json", qk_norm="layer_norm", caption_projection_dim=7, num_layers=2.5)
    edit(folder / "vae" / "config.json", layers_per_block=2)
    found = problems_of(folder)
    scheduler = "is ['diffusers', 'DDIMScheduler'], only FlowMatchEulerDiscreteScheduler is supported"
    for sentence in (
        f"model_index.json: scheduler {scheduler}",
        "text_encoder/config.json: hidden_act is 'relu', must be 'quick_gelu' or 'gelu'",
        "text_encoder/config.json: layer_norm_eps is 0, must be a number above 0",
        "transformer/config.json: qk_norm is 'layer_norm', must be None or 'rms_norm'",
        "transformer/config.json: num_layers is 2.5, must be a whole number from 1 to 1024",
        "vae: encoder.down_blocks.0.resnets.1.conv1.weight is missing (shape [4, 4, 3, 3])",
    ):
        assert sentence in found
    assert any(p.startswith("text_encoder_2/config.json: is no JSON that can be read") for p in found)
    assert any(p.startswith(f"text_encoder_3/{shard.name}: is truncated") for p in found)


UNSUPPORTED = {
    "text_encoder": {"model_type": "bert", "eos_token_id": [2], "quantization_config": {"bits": 4}, "hidden_size": 17},
    "text_encoder_3": {"feed_forward_proj": "relu", "relative_attention_num_buckets": 3, "num_layers": 10**9},
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "caption_projection_dim": 8,
        "dual_attention_layers": [7],
        "joint_attention_dim": None,
        "sample_size": True,
        "attention_mode": "linear",
    },
    "vae": {
        "act_fn": "relu",
        "latents_mean": [0.0],
        "use_quant_conv": "absent",
        "mid_block_add_attention": False,
        "norm_num_groups": 3,
        "scaling_factor": 1e99,
        "shift_factor": "0",
        "down_block_types": ["AttnDownEncoderBlock2D"],
        "block_out_channels": [],
    },
}


@pytest.mark.parametrize(("part", "field"), [(part, field) for part, fields in UNSUPPORTED.items() for field in fields])
def test_a_config_that_we_do_not_compute_is_refused_by_field(folder, part, field):
    edit(folder / part / "config.json", **{field: UNSUPPORTED[part][field]})
    found = problems_of(folder)
    ours = {"hidden_size": "width", "relative_attention_num_buckets": "buckets"}.get(field, field)
    assert any(problem.startswith(f"{part}/config.json: ") and ours in problem for problem in found), found


def test_fields_that_say_nothing_and_fields_of_transformers_are_let_by(folder, saved, same):
    edit(folder / "transformer" / "config.json", _name_or_path="/x", future_option=None, other_option=False)
    edit(folder / "text_encoder" / "config.json", num_beams=1, transformers_version="4.40.0", pad_token_id=7)
    edit(folder / "transformer" / "config.json", out_channels=16, patch_size="absent", in_channels="absent")
    assert weights.load(folder, dtype="stored").config == weights.load(saved, dtype="stored").config


def test_what_a_config_leaves_out_is_what_its_class_assumes():
    table = diffusers_configs.SCHEDULE
    assert config_fields.read(table, {}, None) == schedule.Config(shift=1.0)
    assert config_fields.read(table, config_fields.write(table, schedule.Config()), None) == schedule.Config()


def rewrite(path, change):
    header = files.read_header(path)
    mapped = files.open_mapped(path)
    tensors = {name: files.tensor(mapped, name).clone() for name in header.tensors}
    files.write_atomic(path, change(tensors), metadata=header.metadata)


def joined(folder):
    """One file in place of the shards of a component."""
    stem = "diffusion_pytorch_model" if folder.name in ("vae", "transformer") else "model"
    places = shards.open_weights(folder, stem, None, False).tensors
    tensors = {name: files.tensor(mapped, name).clone() for name, mapped in places.items()}
    for path in folder.glob("*safetensors*"):
        path.unlink()
    files.write_atomic(folder / f"{stem}.safetensors", tensors)
    return folder / f"{stem}.safetensors"


def test_missing_unexpected_and_misshapen_tensors_are_named(folder):
    def change(tensors):
        tensors["proj_outs.bias"] = tensors.pop("proj_out.bias")
        tensors["context_embedder.bias"] = torch.zeros(3)
        tensors["transformer_blocks.0.attn.to_k.weight"] = torch.zeros(16, 16, dtype=torch.int64)
        return tensors

    rewrite(joined(folder / "transformer"), change)
    assert problems_of(folder) == [
        "transformer: proj_out.bias is missing (shape [64])",
        "transformer: proj_outs.bias is unexpected; is it proj_out.bias?",
        "transformer: context_embedder.bias has shape [3], expected [16]",
        "transformer: transformer_blocks.0.attn.to_k.weight has dtype torch.int64, not a float",
    ]


def test_a_table_of_positions_that_is_absent_is_computed(folder, saved):
    def change(tensors):
        return {name: value for name, value in tensors.items() if name != "pos_embed.pos_embed"}

    rewrite(joined(folder / "transformer"), change)

    def table(path, dtype=None):
        return weights.load(path, only="transformer", dtype=dtype).params["transformer"]["position"]

    computed = position_table(16, 6, 4).reshape(1, 36, 16)
    assert torch.equal(table(folder), computed)
    assert torch.equal(table(folder, torch.bfloat16), computed.bfloat16())
    assert not torch.equal(table(saved), computed)


def test_old_and_new_names_of_the_encoders_are_read(folder, saved, same):
    def unwrapped(tensors):
        tensors = {name.removeprefix("text_model."): value for name, value in tensors.items()}
        return {**tensors, "embeddings.position_ids": torch.arange(20)[None]}

    def tied(tensors):
        return {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}

    def renamed(tensors):
        return {name.replace("shared", "encoder.embed_tokens"): value for name, value in tensors.items()}

    expected = weights.load(saved, dtype="stored").params
    rewrite(joined(folder / "text_encoder"), unwrapped)
    for change in (tied, renamed):
        shutil.rmtree(folder / "text_encoder_3")
        shutil.copytree(saved / "text_encoder_3", folder / "text_encoder_3")
        rewrite(joined(folder / "text_encoder_3"), change)
        assert same(weights.load(folder, dtype="stored").params, expected)


def test_variants_are_read_by_both_of_their_names_and_fall_back_to_the_plain_files(folder, saved, same):
    expected = weights.load(saved, dtype="stored").params
    halves = tree.cast(expected, torch.float16)
    rewrite(joined(folder / "vae"), lambda tensors: tensors)
    rewrite(
        (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(
            folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
        ),
        lambda tensors: {name: value.half() for name, value in tensors.items()},
    )
    assert problems_of(folder) == [
        "vae/diffusion_pytorch_model.safetensors: is missing; "
        "there are variants, ask for variant='fp16' (--variant fp16)"
    ]
    for name in ("model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"):
        part = folder / "text_encoder_3"
        index = next(part.glob("*index*"))
        values = json.loads(index.read_text())["weight_map"]
        index.unlink()
        places = {key: place.replace("model-", "model.fp16-") for key, place in values.items()}
        (part / name).write_text(json.dumps({"weight_map": places}))
        for shard in list(part.glob("model-*")):
            rewrite(shard, lambda tensors: {key: value.half() for key, value in tensors.items()})
            shard.rename(part / shard.name.replace("model-", "model.fp16-"))
        found = weights.load(folder, variant="fp16", dtype="stored").params
        assert same(found["vae"], halves["vae"]) and same(found["t5"], halves["t5"])
        assert same(found["transformer"], expected["transformer"])
    assert f"{folder}: no component has weights of the variant 'fp8'" in problems_of(folder, variant="fp8")


def test_contradictions_between_an_index_and_its_shards_are_named(folder):
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    key, last = "norm_out.linear.bias", places["norm_out.linear.bias"]
    first = places["pos_embed.pos_embed"]
    assert first != last and list(places.values()).count(last) > 1
    edit(index, weight_map={**places, key: first})
    assert problems_of(folder) == [
        f"transformer/{first}: lacks {key}, which {index.name} says is in it",
        f"transformer/{last}: holds {key}, which {index.name} says is elsewhere",
    ]
    edit(index, weight_map={name: place for name, place in places.items() if name != key})
    assert problems_of(folder) == [f"transformer/{last}: holds {key}, which {index.name} does not name"]
    edit(index, weight_map={**places, key: "../secret"})
    assert problems_of(folder) == [f"transformer/{index.name}: {key} is in '../secret', which is no file name"]
    edit(index, weight_map=places)
    (folder / "transformer" / first).unlink()
    assert problems_of(folder) == [f"transformer/{first}: cannot be opened: no such file or directory"]


def test_pickles_are_never_opened(folder):
    path = joined(folder / "vae")
    path.rename(path.with_suffix(".bin"))
    assert problems_of(folder) == [
        "vae/diffusion_pytorch_model.safetensors: is missing; diffusion_pytorch_model.bin is a pickle, which is never "
        "opened: save it as safetensors where you trust it"
    ]


def test_what_is_no_model_folder_is_said(tmp_path):
    with pytest.raises(WeightsError, match="absent: cannot be opened: no such file"):
        weights.load(tmp_path / "absent")
    with pytest.raises(WeightsError, match=r"holds no weights that are known: no model_index.json"):
        weights.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert problems_of(tmp_path) == ["model_index.json: _class_name is 'FluxPipeline', not 'StableDiffusion3Pipeline'"]


def test_tokenizers_travel_with_the_model(make_model, tokenizer_files, tmp_path):
    from functional_sd3.text import unigram

    source = tokenizer_files
    tokenizers = Tokenizers(
        bpe.init(source / "tokenizer"), bpe.init(source / "tokenizer_2"), unigram.init(source / "tokenizer_3")
    )
    # As many embeddings as the tokenizers have ids, or a load refuses them.
    sizes = {"clip_l": 49408, "clip_g": 49408, "t5": 32128}
    vocabs = {name: replace(getattr(CONFIG, name), vocab=size) for name, size in sizes.items()}
    weights.save(tmp_path / "model", make_model(replace(CONFIG, **vocabs))._replace(tokenizers=tokenizers))
    found = weights.load(tmp_path / "model").tokenizers
    texts = ["A red cat, sitting!", "naïve ﬁancé 🎈", ""]
    for name, module in (("clip_l", bpe), ("clip_g", bpe), ("t5", unigram)):
        before, after = getattr(tokenizers, name), getattr(found, name)
        assert torch.equal(module.apply(before, texts), module.apply(after, texts))
    (tmp_path / "model" / "tokenizer_2" / "merges.txt").unlink()
    (tmp_path / "model" / "tokenizer" / "vocab.json").write_text("[]")
    found = problems_of(tmp_path / "model")
    assert [problem.split(":")[0] for problem in found] == ["tokenizer", "tokenizer_2"]
    assert weights.load(tmp_path / "model", only="t5").tokenizers.clip_l is None


def test_a_model_that_does_not_fit_its_config_is_not_saved(make_model, tmp_path):
    model = make_model()
    del model.params["vae"]["encoder"]["conv_in"]["bias"]
    model.params["t5"]["embedding"]["weight"] = torch.zeros(3, 16)
    model.params["clip_l"]["projection"]["weight"] = torch.zeros(16, 16, dtype=torch.int32)
    model.params["unet"] = {}
    model.params["clip_g"]["projection"]["weight"] = 7
    with pytest.raises(WeightsError) as caught:
        weights.save(tmp_path / "model", model._replace(config=replace(model.config, transformer=None)))
    assert caught.value.problems == (
        "unet is not a component; known are clip_l, clip_g, t5, transformer, vae, taesd",
        "transformer has parameters but no config",
        "clip_l.projection.weight has dtype torch.int32, not a float",
        "clip_g.projection.weight is a int, not a tensor",
        "t5.embedding.weight has shape [3, 16], expected [50, 16]",
        "vae.encoder.conv_in.bias is missing (shape [4])",
    )
    assert not (tmp_path / "model").exists()


def test_arguments_that_make_no_sense_are_refused(make_model, saved, tmp_path):
    with pytest.raises(ValueError, match=r"layout 'zip' must be one of \['diffusers', 'native', 's"):
        weights.save(tmp_path / "x", make_model(), layout="zip")
    with pytest.raises(ValueError, match="shard_bytes 0 must be at least 1"):
        weights.save(tmp_path / "x", make_model(), shard_bytes=0)
    with pytest.raises(ValueError, match="dtype torch.int8 must be a floating one"):
        weights.load(saved, dtype=torch.int8)


def test_saving_changes_nothing_of_the_model(make_model, same, tmp_path):
    model, again = make_model(), make_model()
    weights.save(tmp_path / "x", model, dtype=torch.float16, shard_bytes=100)
    assert same(model.params, again.params)


@pytest.fixture(scope="module")
def tiny(make_model, tmp_path_factory):
    config = Config(
        transformer=mmdit.Config(depth=1, heads=1, head_dim=4, context_width=2, pooled_width=2, position_size=1),
        vae=vae.Config(channels=(1,), blocks_per_level=1, groups=1, latent_channels=1),
        schedule=schedule.Config(),
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    weights.save(folder, make_model(config), shard_bytes=20_000)
    return folder


@settings(max_examples=150)
@given(st.data())
def test_a_folder_with_changed_bytes_is_a_weights_error_or_a_whole_model(tiny, tmp_path_factory, data):
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("mutated") / "model")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    path = folder / data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, min(len(content), 2000) - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.sampled_from(b'0123456789"{}[],:e-.ntf\0\xff'))
    path.write_bytes(content)
    try:
        found = weights.load(folder, dtype="stored")
    except WeightsError:
        return
    assert isinstance(found, Model)
    assert weights.check(found) == []


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".PTH", ".ckpt", ".gguf"])
def test_a_file_is_not_written_under_the_name_of_another_format(make_model, tmp_path, suffix):
    for layout in ("single", "stability", "native", "diffusers"):
        with pytest.raises(ValueError, match="is the name of another format; files are written as .safetensors"):
            weights.save(tmp_path / f"x{suffix}", make_model(), layout=layout)
    with pytest.raises(ValueError, match="layout 'diffusers' is a folder; one file has layout"):
        weights.save(tmp_path / "x.safetensors", make_model())
    assert list(tmp_path.iterdir()) == []
