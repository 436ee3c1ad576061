"""Files that are broken, hostile or something else: one WeightsError naming file and key, and nothing else ever."""

import errno
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from functional_sd3 import lora, weights
from functional_sd3.core import tree
from functional_sd3.flow import schedule
from functional_sd3.formats import atomic, finite, magic
from functional_sd3.image import taesd, vae
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config, Model, WeightsError, discover, metadata
from tests.models import random_model

KEY = "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    """An all-in-one file, which tests must not change."""
    path = tmp_path_factory.mktemp("saved") / "x.safetensors"
    weights.save(path, make_model(), layout="single")
    return path


@pytest.fixture
def path(saved, tmp_path):
    """A copy that tests may break."""
    return shutil.copy(saved, tmp_path / "x.safetensors")


def problems_of(path, **options) -> tuple[str, ...]:
    with pytest.raises(WeightsError) as caught:
        weights.load(path, **options)
    return caught.value.problems


def rewrite(path, **changes):
    """Other tensors in place of some, None in place of those to leave out."""
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def test_a_truncated_file_and_a_wrong_length_are_named(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert problems_of(path)[0].startswith(f"{path}: is truncated: the header describes {len(content)} bytes")
    path.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    assert problems_of(path) == (
        f"{path}: header length {2**62} exceeds the file ({len(content)} bytes): truncated, or something else",
    )
    path.write_bytes(b"")
    assert problems_of(path) == (f"{path}: 0 bytes are too few for a safetensors file: truncated, or something else",)


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (float("inf"), "an infinity")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float64])
def test_what_is_not_finite_is_named_unless_it_is_asked_for(path, value, said, dtype):
    weight = load_file(path)[KEY].to(dtype)
    weight[7, 3] = value
    rewrite(path, **{KEY: weight})
    for options in ({}, {"only": "transformer"}, {"dtype": torch.bfloat16}):
        assert problems_of(path, **options) == (f"{path}: {KEY} holds {said}; finite=False loads it all the same",)
    assert weights.load(path, only="vae").config.vae
    found = weights.load(path, finite=False).params["transformer"]["blocks"][1]["image"]["attention"]["qkv"]["weight"]
    assert not torch.isfinite(found.float()[7, 3])
    (part,) = [part for part in weights.describe(path).parts if part.nonfinite]
    assert (part.component, part.nonfinite) == ("transformer", [(KEY, said)])


@given(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16]), st.integers(0, 65535))
def test_finiteness_is_told_for_every_pattern_of_bits(dtype, bits):
    pattern = torch.tensor([bits], dtype=torch.uint16).view(torch.uint8)[: dtype.itemsize]
    value = torch.cat([torch.full((9,), -0.5).to(dtype).view(torch.uint8), pattern]).view(dtype)
    last = value[-1].double()
    expected = "NaN" if last.isnan() else "an infinity" if last.isinf() else None
    assert finite.nonfinite_kind(value) == expected


def test_a_sum_that_overflows_is_not_taken_for_an_infinity():
    assert finite.nonfinite_kind(torch.full((4,), 60000.0, dtype=torch.float16)) is None
    assert finite.nonfinite_kind(torch.full((4,), 3e38)) is None
    assert finite.nonfinite_kind(torch.zeros(0, dtype=torch.float8_e4m3fn)) is None


def test_missing_unexpected_and_misshapen_tensors_are_named_with_their_prefix(path):
    prefix = "model.diffusion_model.joint_blocks."
    rewrite(
        path,
        **{
            KEY: torch.zeros(47, 16),
            prefix + "0.x_block.attn.proj.bias": None,
            prefix + "0.x_block.attn.prj.bias": torch.zeros(16),
            prefix + "2.x_block.mlp.fc1.bias": torch.zeros(64, dtype=torch.int32),
            "text_encoders.clip_h.transformer.x": torch.zeros(1),
        },
    )
    assert problems_of(path) == (f"{path}: text_encoders.clip_h.transformer.x is unexpected",)
    rewrite(path, **{"text_encoders.clip_h.transformer.x": None})
    assert sorted(problems_of(path)) == sorted(
        (
            f"{path}: {KEY} has shape [47, 16], expected [48, 16]",
            f"{path}: {prefix}0.x_block.attn.proj.bias is missing (shape [16])",
            f"{path}: {prefix}0.x_block.attn.prj.bias is unexpected; is it {prefix}0.x_block.attn.proj.bias?",
            f"{path}: {prefix}2.x_block.mlp.fc1.bias has dtype torch.int32, not a float",
        )
    )


def test_a_component_given_twice_is_named_with_both_places(saved, make_model, tmp_path):
    folder = tmp_path / "models"
    weights.save(folder, make_model(), layout="stability")
    found = problems_of([saved, folder / "t5xxl.safetensors"])
    assert found == (f"t5 is in {saved} and in {folder / 't5xxl.safetensors'}: give it once",)
    with pytest.raises(ValueError, match="there is no path to load from"):
        weights.load([])
    for paths in ("", [saved, ""]):
        with pytest.raises(ValueError, match="no path to load from: one is empty"):
            weights.load(paths)


def test_the_problems_of_all_paths_are_in_one_error(path, tmp_path):
    rewrite(path, **{KEY: torch.zeros(47, 16)})
    found = problems_of([path, tmp_path / "absent"])
    assert found == (
        f"{tmp_path / 'absent'}: cannot be opened: no such file or directory",
        f"{path}: {KEY} has shape [47, 16], expected [48, 16]",
    )


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_refused_with_how_to_convert_it_whatever_its_name(saved, tmp_path, suffix, legacy):
    path = tmp_path / f"model{suffix}"
    torch.save(load_file(saved), path, _use_new_zipfile_serialization=not legacy)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: is a pickle, which may run code") and "save_file" in problem


class Bomb:
    """What runs code when an unrestricted reader meets it."""

    def __reduce__(self):
        return os.system, ("false",)


def test_a_pickle_that_runs_code_or_lies_about_its_tensors_is_never_believed(tmp_path):
    path = tmp_path / "taesd.pth"
    small = torch.zeros(1)
    for content, said in (
        ({"0.weight": Bomb()}, "is no pickle of weights alone"),
        ({"1.conv.0.weight": small.expand(10**12)}, "does not hold the values it claims"),
        ({"1.conv.0.weight": small, "2": 3}, "'2' is no plain tensor"),
        ({"1.conv.0.weight": torch.zeros(2, 2).to_sparse()}, "asks for torch._utils._rebuild_sparse_tensor"),
        ([small], "holds a list, not names with tensors"),
        ({f"{n}.conv.0.weight": small for n in range(50)}, "TAESD is missing"),
    ):
        torch.save(content, path)
        assert said in problems_of(path)[0]
    path.write_bytes(path.read_bytes()[:100])
    assert "is a broken archive" in problems_of(path)[0]


LOADERS = {
    "LoRA": lambda path: lora.load(path, weights.Config()),
    "layers of a LoRA": lora.layers,
    "ControlNet": weights.load_controlnet,
    "IP-Adapter": weights.load_ip_adapter,
    "textual inversion": weights.load_inversion,
    "CLIP": weights.load_clip,
    "model": weights.load,
}


WITHOUT_TENSORS = {
    "ControlNet": "this is not a ControlNet of SD3",
    "IP-Adapter": "this is not an IP-Adapter of SD3.5",
    "CLIP": "this is no CLIP model",
    "model": "is nothing known of SD3: 0 tensors",
}
"""What is said of a GGUF file without tensors by those that read GGUF."""


@pytest.mark.parametrize("name", LOADERS)
def test_what_people_take_for_weights_is_named_as_what_it_is_whatever_was_to_be_loaded(tmp_path, name):
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
    (tmp_path / "page.safetensors").write_text("\n<!DOCTYPE html><html>Access to this model is restricted.</html>")
    for file, said in {
        "x.pt": "is a pickle, which may run code",
        "old.pt": "is a pickle, which may run code",
        "pointer.safetensors": "is a pointer of Git LFS to the weights, not the weights",
        "page.safetensors": "is a web page, not weights",
    }.items():
        with pytest.raises(WeightsError) as caught:
            LOADERS[name](tmp_path / file)
        assert caught.value.problems[0].startswith(f"{tmp_path / file}: {said}")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    others = "is a GGUF file: only models, ControlNets, IP-Adapters and CLIP are read from these"
    with pytest.raises(WeightsError, match=WITHOUT_TENSORS.get(name, others)):
        LOADERS[name](tmp_path / "x.gguf")


def test_the_command_that_converts_pickles_converts_them(saved, tmp_path, monkeypatch):
    tensors = load_file(saved)
    nested = {"image_proj": {"a": torch.ones(2)}, "b": torch.zeros(3)}
    told = shlex.split(magic.HOW_TO_CONVERT[magic.HOW_TO_CONVERT.index("python -c") :])
    word = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 4)}, "name": "cat", "step": 9}
    lightning = {"state_dict": tensors, "epoch": 3}
    states = {"flat": tensors, "lightning": lightning, "nested": nested, "automatic1111": word}
    for name, state in states.items():
        pickled, converted = tmp_path / f"{name}.pt", tmp_path / f"{name}.safetensors"
        torch.save(state, pickled)
        if name == "flat":
            subprocess.run([sys.executable, "-W", "ignore", *told[1:3], pickled, converted], check=True)
        else:
            # The same code: an interpreter of its own takes seconds to import PyTorch.
            monkeypatch.setattr(sys, "argv", ["-c", str(pickled), str(converted)])
            with warnings.catch_warnings(action="ignore"):
                exec(told[2], {"__name__": "__main__"})
        expected = {
            "nested": {"image_proj.a": torch.ones(2), "b": torch.zeros(3)},
            "automatic1111": {"string_to_param.*": torch.ones(2, 4)},
        }.get(name, tensors)
        found = load_file(converted)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_table_that_is_absent_and_larger_than_all_that_is_there_is_not_made_up(path):
    tensors = {name: value for name, value in load_file(path).items() if not name.endswith("diffusion_model.pos_embed")}
    said = json.loads(metadata.write(weights.load(path).config, weights.SPECS)[metadata.KEY])
    said["transformer"]["pos_embed_max_size"] = 2**20
    save_file(tensors, path, metadata={metadata.KEY: json.dumps(said)})
    assert problems_of(path) == (
        f"{path}: model.diffusion_model.pos_embed is missing, and [1, {2**40}, 16] is too large to make up",
    )


def test_scales_that_make_no_sense_are_named(path):
    layer = KEY.removesuffix("weight")
    rewrite(path, **{layer + "scale_weight": torch.zeros(3), layer + "comfy_quant": torch.zeros(3, dtype=torch.uint8)})
    assert sorted(problems_of(path)) == [
        f"{path}: {layer}comfy_quant does not say how the weight is quantised",
        f"{path}: {layer}scale_weight has shape [3], expected one number or one for each row",
    ]
    note = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    rewrite(path, **{layer + "scale_weight": torch.zeros(1, dtype=torch.int32), layer + "comfy_quant": note})
    found = sorted(problems_of(path))
    assert found[1] == f"{path}: {layer}scale_weight has dtype torch.int32, not a float"
    assert "says the weight is quantised as 'nvfp4'" in found[0]
    rewrite(path, **{layer + "scale_weight": torch.tensor(float("nan")), layer + "comfy_quant": None})
    assert problems_of(path) == (f"{path}: {layer}scale_weight holds NaN; finite=False loads it all the same",)


def test_places_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert problems_of(tmp_path / "loop") == (
        f"{tmp_path / 'loop'}: cannot be opened: too many levels of symbolic links",
    )
    os.mkfifo(tmp_path / "pipe")
    assert problems_of(tmp_path / "pipe") == (f"{tmp_path / 'pipe'}: is a named pipe, not a file",)
    assert "is not a path" in problems_of("nul\0")[0] or "null" in problems_of("nul\0")[0]
    (tmp_path / "folder").mkdir()

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)
    assert problems_of(tmp_path / "folder") == (f"{tmp_path / 'folder'}: cannot be opened: permission denied",)


@contextmanager
def without_privileges(folder):
    """Inside `folder`, as a user whom permissions bind: the superuser may read everything."""
    if os.geteuid():
        yield
        return
    folder.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_read_or_written_is_named_and_stays(make_model, same, tmp_path, monkeypatch):
    model = make_model()
    for name, kind in (("model", "diffusers"), ("native", "native"), ("x.safetensors", "single")):
        weights.save(tmp_path / name, model, layout=kind)
        assert same(weights.load(tmp_path / name).params, model.params)
    (tmp_path / "folder").mkdir(mode=0)
    (tmp_path / "model" / "vae").chmod(0)
    (tmp_path / "x.safetensors").chmod(0)
    monkeypatch.chdir(tmp_path)
    with without_privileges(tmp_path):
        assert problems_of("folder") == ("folder: cannot be opened: permission denied",)
        assert problems_of("x.safetensors") == ("x.safetensors: cannot be opened: permission denied",)
        vae = problems_of("model")
        assert vae and all(problem.startswith("model/vae") and "permission denied" in problem for problem in vae)
        if not os.access(".", os.W_OK, effective_ids=True):
            for name, kind in (("native", "native"), ("y.safetensors", "single"), ("z", "diffusers")):
                with pytest.raises(WeightsError, match=f"{name}: cannot be written: permission denied"):
                    weights.save(name, make_model(seed=1), layout=kind)
    assert sorted(os.listdir(tmp_path)) == ["folder", "model", "native", "x.safetensors"]
    assert same(weights.load(tmp_path / "native").params, model.params)
    for left in (tmp_path / "folder", tmp_path / "model" / "vae"):
        left.chmod(0o755)


@pytest.mark.parametrize("layout", ["single", "stability", "native", "diffusers"])
def test_a_disk_that_takes_no_more_leaves_the_old_model_whole(make_model, same, tmp_path, layout):
    old, new = make_model(seed=1), make_model(seed=2)
    path = tmp_path / ("x.safetensors" if layout == "single" else "x")
    weights.save(path, old, layout=layout)
    before = sorted(tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(WeightsError, match=f"{path}: cannot be written: file too large"):
            weights.save(path, new, layout=layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.rglob("*")) == before
    assert same(weights.load(path).params, old.params)


def test_links_that_lead_nowhere_or_in_circles_are_named_wherever_they_are(make_model, tmp_path):
    weights.save(tmp_path / "model", make_model())
    place = tmp_path / "model" / "transformer"
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        kept = (place / name).read_bytes()
        for target, said in ((place / name, "too many levels of symbolic links"), ("nowhere", "no such file")):
            (place / name).unlink()
            (place / name).symlink_to(target)
            assert any(f"{place / name}: cannot be opened: {said}" in problem for problem in problems_of(place.parent))
        (place / name).unlink()
        (place / name).write_bytes(kept)
    shutil.rmtree(place)
    place.symlink_to(place)
    assert any("too many levels of symbolic links" in problem for problem in problems_of(place.parent))


def test_a_shape_of_more_dimensions_than_there_are_is_named_before_it_is_multiplied(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**62] * 200_000, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    assert problems_of(tmp_path / "x") == (f"{tmp_path / 'x'}: a has 200000 dimensions, more than 64",)


def test_json_that_is_nested_for_ever_is_named(make_model, tmp_path):
    weights.save(tmp_path / "model", make_model())
    deep = b'{"a":' * 100_000
    for name in ("model_index.json", "vae/config.json", "scheduler/scheduler_config.json"):
        kept = (tmp_path / "model" / name).read_bytes()
        (tmp_path / "model" / name).write_bytes(deep)
        assert any(str(tmp_path / "model" / name) in problem for problem in problems_of(tmp_path / "model"))
        (tmp_path / "model" / name).write_bytes(kept)
    (tmp_path / "x.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    assert str(tmp_path / "x.safetensors") in problems_of(tmp_path / "x.safetensors")[0]
    (tmp_path / "x.safetensors.index.json").write_bytes(deep)
    assert str(tmp_path / "x.safetensors.index.json") in problems_of(tmp_path / "x.safetensors.index.json")[0]


def test_a_tokenizer_with_ids_beyond_the_encoders_table_is_refused_when_it_is_loaded(tmp_path):
    model = random_model()
    for name in ("clip_l", "clip_g", "t5"):
        config = getattr(model.config, name)
        short = replace(config, vocab=config.vocab - 1)
        table = "embedding" if name == "t5" else "token_embedding"
        own = model.params[name]
        params = {**own, table: {"weight": own[table]["weight"][:-1].clone()}}
        changed = model._replace(config=replace(model.config, **{name: short}), params={**model.params, name: params})
        weights.save(tmp_path / name, changed)
        said = f"the tokenizer of {name} has ids up to {config.vocab - 1}, but {name} has embeddings of {short.vocab}"
        assert any(said in problem for problem in problems_of(tmp_path / name))
        assert weights.load(tmp_path / name, only="vae").config.vae


def test_a_taesd_of_thousands_of_blocks_is_refused_in_a_moment(make_model, tmp_path):
    weights.save(tmp_path, make_model(TINY)._replace(config=TINY))
    place = tmp_path / "taesd" / "config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps({**config, "num_encoder_blocks": [200] * 16, "num_decoder_blocks": [200] * 16}))
    started = time.process_time()
    assert any("num_encoder_blocks" in problem and "a list of 1 to 8" in problem for problem in problems_of(tmp_path))
    assert time.process_time() - started < 5


def test_a_missing_shard_and_an_index_with_a_key_twice_are_named(make_model, tmp_path):
    weights.save(tmp_path / "x", make_model(), layout="native", shard_bytes=20_000)
    folder = tmp_path / "x" / discover.NATIVE_FOLDER
    index = folder / "parameters.safetensors.index.json"
    shard = sorted(folder.glob("*.safetensors"))[1]
    kept = shard.read_bytes()
    shard.unlink()
    assert problems_of(tmp_path / "x") == (f"{shard}: cannot be opened: no such file or directory",)
    shard.write_bytes(kept)
    key = next(iter(json.loads(index.read_text())["weight_map"]))
    index.write_text(index.read_text().replace('"weight_map": {', f'"weight_map": {{\n"{key}": "other.safetensors",'))
    assert problems_of(tmp_path / "x") == (f"{index}: is no JSON that can be read: {key!r} is named twice",)


@pytest.mark.parametrize("kind", ["single", "stability", "native"])
def test_a_full_disk_leaves_the_old_model_whole(make_model, same, tmp_path, monkeypatch, kind):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    old, new = make_model(seed=1), make_model(seed=2)
    paths = [tmp_path / "x.safetensors"] + ([tmp_path / "x"] if kind != "single" else [])
    for path in paths:
        weights.save(path, old, layout=kind)
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(WeightsError, match="no space left on device"):
                weights.save(path, new, layout=kind)
        assert sorted(tmp_path.rglob("*")) == before
        assert same(weights.load(path).params, old.params)


def test_values_too_large_for_a_dtype_are_named_and_the_old_file_stays(make_model, same, tmp_path):
    path = tmp_path / "x.safetensors"
    old, new = make_model(seed=1), make_model(seed=2)
    weights.save(path, old, layout="single")
    new.params["t5"]["final_norm"]["weight"][3] = 7e4
    with pytest.raises(
        WeightsError, match="encoder.final_layer_norm.weight holds values that torch.float16 cannot: 70000"
    ):
        weights.save(path, new, layout="single", dtype=torch.float16)
    assert same(weights.load(path).params, old.params)


def test_a_save_in_another_layout_replaces_the_old_one(make_model, same, tmp_path):
    folder = tmp_path / "model"
    for seed, kind in enumerate(("diffusers", "stability", "native", "diffusers", "native", "stability")):
        model = make_model(seed=seed)
        weights.save(folder, model, layout=kind)
        assert same(weights.load(folder).params, model.params)
    assert not (folder / "transformer").exists() and not (folder / atomic._SAVED).exists()


def test_files_of_others_outlive_a_save(make_model, tmp_path):
    (tmp_path / "clip_l.safetensors").write_bytes(b"mine")
    weights.save(tmp_path, make_model())
    assert (tmp_path / "clip_l.safetensors").read_bytes() == b"mine"


def test_what_would_not_fit_one_file_is_refused(make_model, tmp_path):
    for path, kind in (("x.safetensors", "single"), ("x.safetensors", "native"), ("x", "stability")):
        with pytest.raises(ValueError, match="above shard_bytes 1000, and this layout is not split"):
            weights.save(tmp_path / path, make_model(), layout=kind, shard_bytes=1000)
    assert os.listdir(tmp_path) == []


TINY = Config(
    transformer=mmdit.Config(depth=1, heads=1, head_dim=4, context_width=2, pooled_width=2, position_size=1),
    vae=vae.Config(channels=(1,), blocks_per_level=1, groups=1, latent_channels=1),
    taesd=taesd.Config(width=1, latent_channels=1, encoder_blocks=(1,), decoder_blocks=(1,)),
    schedule=schedule.Config(),
)
BYTES = b'0123456789"{}[],:e-.ntf\0\xff'


@pytest.fixture(scope="module", params=["single", "single without a note", "native", "pickle"])
def victim(request, make_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("victim") / "x"
    weights.save(
        path.with_suffix(".safetensors"), make_model(TINY), layout=request.param.split()[0].replace("pickle", "single")
    )
    path.with_suffix(".safetensors").rename(path)
    if request.param == "single without a note":
        save_file(load_file(path), path)
    if request.param == "pickle":
        state = {name: value.clone() for name, value in load_file(path).items() if name.startswith("taesd")}
        torch.save(state, path)
    # The first load brings in code that later ones share.
    assert "taesd" in weights.load(path).params
    return path


@settings(max_examples=120)
@given(st.data())
def test_a_file_with_changed_bytes_is_a_weights_error_or_a_whole_model(victim, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("mutated") / "x"
    content = bytearray(victim.read_bytes())
    length = int.from_bytes(content[:8], "little") if content[8:9] == b"{" else len(content)
    # Most changes in the header, where they matter.
    place = st.one_of(st.integers(0, min(length, len(content)) - 1), st.integers(0, len(content) - 1))
    for at in data.draw(st.lists(place, min_size=1, max_size=4)):
        content[at] = data.draw(st.one_of(st.sampled_from(BYTES), st.integers(0, 255)))
    if data.draw(st.booleans()):
        start, end = sorted((data.draw(place), data.draw(place)))
        del content[start:end]
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = weights.load(path)
    except WeightsError as error:
        assert all(str(path) in problem or "TAESD" in problem for problem in error.problems)
        return
    finally:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown * 1024 <= 50 * 2**20, "allocates more than the file could hold"
    assert isinstance(found, Model)
    assert weights.check(found) == []
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(found.params))


@settings(max_examples=150)
@given(st.data())
def test_a_file_whose_names_and_shapes_are_changed_is_a_weights_error_or_a_whole_model(victim, tmp_path_factory, data):
    if victim.read_bytes()[8:9] != b"{":
        return
    path = tmp_path_factory.mktemp("renamed") / "x"
    content = victim.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), max_size=3, unique=True)):
        entry = header.pop(name)
        kind = data.draw(st.sampled_from(["number", "part", "shape", "dtype", "note"]))
        if name == "__metadata__":
            entry = {key: value.replace("1", data.draw(st.sampled_from("0249.-"))) for key, value in entry.items()}
        elif kind == "number":
            number = data.draw(st.sampled_from(["1", "7", "999999999999", "-1", "٣", "01", ""]))
            name = ".".join(number if part.isdigit() else part for part in name.split("."))
        elif kind == "part":
            parts = name.split(".")
            del parts[data.draw(st.integers(0, len(parts) - 1))]
            name = ".".join(parts)
        elif kind == "shape":
            entry["shape"] = data.draw(
                st.sampled_from([entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][:-1]])
            )
        elif kind == "dtype" and entry["dtype"] == "F32":
            entry["dtype"] = data.draw(st.sampled_from(["I32", "U32"]))
        header[name] = entry
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    try:
        found = weights.load(path)
    except WeightsError as error:
        assert all(str(path) in problem or "TAESD" in problem for problem in error.problems)
        return
    assert weights.check(found) == []
