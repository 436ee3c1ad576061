"""The dtype of a load that names none: uniform over a component, and one the device computes well."""

import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from functional_sd3 import cli, pipeline, weights
from functional_sd3.core import prng, tree
from functional_sd3.flow import ode
from functional_sd3.flow.analysis import likelihood
from functional_sd3.formats import default_dtype
from functional_sd3.formats.notes import Note
from functional_sd3.transformer import mmdit

F32, F16, BF16, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn


def stored(model, path, change):
    """`model` in one file, each of whose tensors is what `change(name, tensor)` says, a tensor or several by name."""
    weights.save(path, model, layout="single")
    metadata, changed = weights.files.read_header(path).metadata, {}
    for name, value in load_file(path).items():
        one = change(name, value)
        changed.update(one if isinstance(one, dict) else {name: one})
    save_file(changed, path, metadata=metadata)
    return path


def is_norm(name, value):
    return value.ndim == 1


def scaled(name, value):
    if value.ndim != 2 or not name.endswith(".weight"):
        return value.to(F16)
    scale = value.abs().max() / 448
    return {name: (value / scale).to(FP8), name.removesuffix("weight") + "scale_weight": scale.reshape(1)}


KINDS = {
    "fp16": lambda name, value: value.to(F16),
    "fp16 with T5 in fp8": lambda name, value: value.to(FP8 if "t5xxl" in name else F16),
    "fp8": lambda name, value: value.to(FP8),
    "fp8 with norms of fp16": lambda name, value: value.to(F16 if is_norm(name, value) else FP8),
    "bf16 with norms of float32": lambda name, value: value.to(F32 if is_norm(name, value) else BF16),
    "scaled fp8": scaled,
}


@pytest.fixture(scope="module", params=KINDS)
def file(request, model, tmp_path_factory):
    return stored(model, tmp_path_factory.mktemp("kinds") / "x.safetensors", KINDS[request.param])


def dtypes(params):
    return {leaf.dtype for leaf in tree.leaves(params)}


def test_every_kind_of_storage_computes_without_a_dtype_on_a_cpu_and_says_so_in_one_line(file, model):
    with pytest.warns(Note, match="are loaded in float32, in which a CPU computes well") as caught:
        loaded = weights.load(file)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert dtypes(loaded.params) == {F32}
    params, config = loaded.params, loaded.config
    images = pipeline.generate(params, config, model.tokenizers, "a red circle", prng.key(0), steps=1)
    assert torch.isfinite(images).all()
    explicit = weights.load(file, dtype=F32)
    assert tree.diff(loaded.params, explicit.params) == []
    conditions = pipeline.encode(params, config, model.tokenizers, ["a"]).positive
    velocity = lambda x, t: mmdit.apply(params["transformer"], config.transformer, x, t, *conditions)  # noqa: E731
    x = prng.normal(prng.key(1), (1, 16, 8, 8))
    assert torch.isfinite(likelihood.invert(velocity, x, method=ode.EULER, times=[0.0, 0.5, 1.0])).all()


def test_float32_and_bfloat16_stay_as_stored_mapped_and_unsaid(model, tmp_path, monkeypatch):
    # Only the pages of what was copied are given back.
    monkeypatch.setattr(weights.files, "release", lambda mapped, name: pytest.fail(f"{name} was copied"))
    for dtype in (F32, BF16):
        path = tmp_path / f"{dtype}.safetensors"
        weights.save(path, model, layout="native", dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = weights.load(path)
        assert dtypes(loaded.params) == {dtype}


def test_stored_keeps_each_parameters_dtype(model, tmp_path):
    path = stored(model, tmp_path / "x.safetensors", KINDS["fp16 with T5 in fp8"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = weights.load(path, dtype="stored")
    assert dtypes(loaded.params["t5"]) == {FP8} and dtypes(loaded.params["transformer"]) == {F16}
    for wrong in ("float16", torch.int8, 3):
        with pytest.raises(ValueError, match='must be a floating one, such as torch.bfloat16, or "stored"'):
            weights.load(path, dtype=wrong)


@pytest.mark.parametrize(
    ("kinds", "on_cpu", "elsewhere"),
    [
        ({F32}, None, None),
        ({BF16}, None, None),
        ({torch.float64}, None, None),
        ({F16}, F32, None),
        ({FP8}, F32, BF16),
        ({F16, F32}, F32, BF16),
        ({BF16, torch.float64}, torch.float64, BF16),
        ({"Q8_0"}, F32, BF16),
        ({"scaled float8_e4m3fn", F16}, F32, BF16),
        (set(), None, None),
    ],
)
def test_the_table_of_defaults(kinds, on_cpu, elsewhere):
    assert default_dtype.choose(None, kinds, "cpu") == on_cpu
    assert default_dtype.choose(None, kinds, "cuda") == elsewhere
    assert default_dtype.choose("stored", kinds, "cpu") is None
    assert default_dtype.choose(F16, kinds, "cpu") == F16


def test_quantized_storage_stays_and_what_is_not_quantized_is_uniform(model, tmp_path):
    path = stored(model, tmp_path / "x.safetensors", scaled)
    loaded = weights.load(path, quantized=True)
    leaves = tree.flatten_paths(loaded.params)
    assert FP8 in dtypes(loaded.params) and dtypes(loaded.params) <= {FP8, F32}
    assert any(name.endswith(".scale") for name in leaves)
    images = pipeline.generate(loaded.params, loaded.config, model.tokenizers, "a", prng.key(0), steps=1)
    assert torch.isfinite(images).all()
    transformer = weights.quantize.quantize(model.params["transformer"])
    small = model._replace(params={**model.params, "transformer": transformer})
    weights.save(tmp_path / "native", small, layout="native")
    again = weights.load(tmp_path / "native", quantized=True)
    assert tree.diff(again.params, small.params) == []


def test_conversion_keeps_what_is_stored_unless_a_dtype_is_given(model, tmp_path, capsys):
    path = stored(model, tmp_path / "x.safetensors", KINDS["fp16 with T5 in fp8"])
    command = ["convert", str(path), str(tmp_path / "y.safetensors"), "--layout", "single"]
    assert cli.main(command) == 0 and "note: weights" not in capsys.readouterr().err
    before, after = load_file(path), load_file(tmp_path / "y.safetensors")
    assert all(after[name].dtype == value.dtype for name, value in before.items() if name in after)
    assert cli.main([*command, "--dtype", "bfloat16"]) == 0
    assert {value.dtype for value in load_file(tmp_path / "y.safetensors").values()} == {BF16}


def test_one_note_for_a_run_that_reads_component_after_component(model, tmp_path):
    weights.save(tmp_path / "model", model, dtype=F16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        pipeline.generate_from(tmp_path / "model", "a red circle", prng.key(0), steps=1)
    assert len([one for one in caught if one.category is Note]) == 1


def test_companions_follow_the_same_default(tmp_path):
    from functional_sd3.transformer import controlnet

    config = controlnet.Config(depth=1, heads=1, head_dim=8, context_width=8, pooled_width=8, position_size=4)
    net = weights.controlnets.ControlNet(controlnet.init(prng.key(0), config), config)
    weights.save_controlnet(tmp_path / "net", net, dtype=F16)
    with pytest.warns(Note, match="weights stored in float16 are loaded in float32"):
        assert dtypes(weights.load_controlnet(tmp_path / "net").params) == {F32}
    assert F16 in dtypes(weights.load_controlnet(tmp_path / "net", dtype="stored").params)


def test_commands_note_once_that_dtype_auto_does_not_keep_the_dtype_and_name_the_option(model, tmp_path, capsys):
    Image.new("RGB", (64, 64), (200, 40, 40)).save(tmp_path / "in.png")
    drawing = ("--steps", "1", "--out", str(tmp_path / "x.png"))
    commands = (
        ("generate", "a", *drawing),
        ("generate", "a", "--offload", *drawing),
        ("edit", str(tmp_path / "in.png"), "--from", "a", "--to", "b", *drawing),
        ("likelihood", str(tmp_path / "in.png"), "--prompt", "a", "--steps", "1"),
        ("evaluate", "vae", str(tmp_path)),
    )
    for dtype, name in ((BF16, "bfloat16"), (F16, "float16")):
        folder = str(tmp_path / name)
        weights.save(folder, model, dtype=dtype)
        sentence = f"note: weights stored in {name} are loaded in float32, in which a CPU computes well; "
        for words in commands:
            assert cli.main([*words, "--params", folder, "--device", "cpu"]) == 0
            assert capsys.readouterr().err.count(f"{sentence}--dtype {name} keeps them so\n") == 1
        for chosen in ("float32", name):
            assert cli.main([*commands[0], "--params", folder, "--device", "cpu", "--dtype", chosen]) == 0
            assert "weights stored" not in capsys.readouterr().err
    weights.save(tmp_path / "kept", model, dtype=F32)
    assert cli.main([*commands[0], "--params", str(tmp_path / "kept"), "--device", "cpu"]) == 0
    assert "weights stored" not in capsys.readouterr().err
    fp8 = stored(model, tmp_path / "fp8.safetensors", KINDS["fp8"])
    assert cli.main(["evaluate", "vae", str(tmp_path), "--params", str(fp8), "--device", "cpu"]) == 0
    assert "--dtype bfloat16 takes half of the memory of float32" in capsys.readouterr().err


def test_a_programs_default_is_its_own_on_a_cpu_alone():
    auto = default_dtype.Default(F32, lambda kinds: "")
    for kinds in ({BF16}, {F16}, {FP8, F32}, {torch.float64}, set()):
        assert default_dtype.choose(auto, kinds, "cpu") == F32
        assert default_dtype.choose(auto, kinds, "cuda") == default_dtype.choose(None, kinds, "cuda")
