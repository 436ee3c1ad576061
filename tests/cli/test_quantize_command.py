"""Quantising from the command line: what it reports, what it writes, that images are drawn from it."""

import re
from pathlib import Path

import pytest
import torch

from functional_sd3 import cli, weights
from functional_sd3.core import tree
from functional_sd3.kernels import int8, int8_functions
from functional_sd3.weights import quantize
from tests import choices


def run(*words) -> int:
    return cli.main([str(word) for word in words])


@pytest.mark.parametrize("name, dtype", [("int8", torch.int8), ("float8", torch.float8_e4m3fn)])
def test_a_model_is_stored_in_one_byte_a_weight_with_a_report(folder, tmp_path, capsys, name, dtype):
    words = ("--format", name, "--part", "transformer", "t5", "--prompt", "a circle", "--steps", 2)
    assert run("quantize", folder, *words, "--out", tmp_path / "small") == 0
    said = capsys.readouterr().out
    assert "transformer: 0.5 MiB -> 0.2 MiB" in said and "  t5.blocks.0 " in said
    assert "  transformer.blocks.0 " in said and said.count("velocity at t = ") == 2 and "against float32" in said
    small, model = weights.load(tmp_path / "small", quantized=True), weights.load(folder)
    for part in ("transformer", "t5"):
        assert not tree.diff(small.params[part], quantize.quantize(model.params[part], dtype))
    assert not tree.diff(small.params["vae"], model.params["vae"])
    image = tmp_path / "one.png"
    assert run("generate", "a circle", "--params", tmp_path / "small", "--steps", 1, "--out", image) == 0
    assert image.exists()


@pytest.mark.parametrize("name", ["int8", "float8"])
def test_the_errors_of_the_shipped_model_are_those_that_the_docs_say(name, capsys):
    words = (Path(__file__).parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")
    said = re.search(r"For `params/tiny` the latter is .*?([0-9.]+) to ([0-9.]+) % in " + name, words)
    assert run("quantize", "tiny", "--format", name) == 0
    found = [float(word) for word in re.findall(r"velocity at .* error (\S+) against", capsys.readouterr().out)]
    assert [100 * min(found), 100 * max(found)] == pytest.approx([float(one) for one in said.groups()], rel=0.05)


def test_without_a_place_to_write_it_only_reports(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("quantize", folder, "--steps", 0, "--all") == 0
    said = capsys.readouterr().out
    assert "transformer.blocks.1.context.mlp.in.weight" in said and "velocity" not in said
    assert not list(tmp_path.iterdir())


def test_products_of_int8_are_measured_refused_where_bad_and_drawn_with(folder, tmp_path, capsys, monkeypatch):
    if int8_functions.product() is None:
        pytest.skip("needs products of int8 that are right")
    choices.use(monkeypatch)
    monkeypatch.setattr(quantize, "SMALLEST_PRODUCT", 32 * 64)
    model, small = weights.load(folder), tmp_path / "small"
    words = ("--part", "transformer", "t5", "--compute", "int8", "--prompt", "a circle", "--steps", 1, "--all")
    assert run("quantize", folder, *words, "--out", small) == 0
    said = capsys.readouterr().out
    errors = dict(re.findall(r"  (\S+) +products of int8: relative error (\S+)", said))
    assert "transformer.blocks.0.image.mlp.in.weight" in errors and any(path.startswith("t5.") for path in errors)
    stored = weights.load(small, quantized=True).params
    for part in ("transformer", "t5"):
        expected = quantize.quantize(model.params[part], compute="int8", smallest=32 * 64)
        assert not tree.diff(stored[part], expected)
        count = sum(path.startswith(part) for path in errors)
        assert f"{part}: products of int8 in {count} layers" in said
    # Half of the layers are off by more than the median.
    limit = sorted(map(float, errors.values()))[len(errors) // 2]
    assert run("quantize", folder, *words, "--out", tmp_path / "less", "--limit", limit) == 0
    refused = re.findall(r"note: (\S+): products of int8 are off by \S+, above --limit", capsys.readouterr().err)
    less = tree.flatten_paths(weights.load(tmp_path / "less", quantized=True).params)
    assert 0 < len(refused) < len(errors)
    for path in errors:
        assert (path.removesuffix("weight") + "int8_scale" in less) == (path not in refused)
    for instructions, note in ((0, False), (None, True)):
        monkeypatch.setattr(int8, "LEAST_SIZE", instructions)
        drawing = (
            "generate",
            "a circle",
            "--params",
            small,
            "--steps",
            1,
            "--device",
            "cpu",
            "--out",
            tmp_path / "x.png",
        )
        for offload in ((), ("--offload",)):
            assert run(*drawing, *offload) == 0
            assert ("products of int8, for which this processor has no instructions" in capsys.readouterr().err) == note


@pytest.mark.parametrize("format", ["int8", "float8"])
def test_weights_stay_floats_until_the_velocity_is_within_a_limit_and_the_file_says_which(
    folder, tmp_path, capsys, monkeypatch, format
):
    monkeypatch.setattr(quantize, "SMALLEST_PRODUCT", 0)
    words = ("--format", format, "--compute", format, "--prompt", "a circle", "--steps", 2, "--limit", 1)
    assert run("quantize", folder, *words) == 0
    whole = float(re.findall(r"velocity of the run: relative error (\S+)", capsys.readouterr().out)[0])
    small = tmp_path / "small.safetensors"
    assert run("quantize", folder, *words, "--max-error", whole / 2, "--out", small) == 0
    said = capsys.readouterr().out
    kept = re.findall(r"  transformer\.(\S+) +stays torch.float32: the velocity is off by \S+ by it alone", said)
    found = float(re.findall(r"velocity of the run: relative error (\S+)", said)[0])
    assert found <= whole / 2 and f"({'--max-error'} {whole / 2:g}; {whole:.2e} before {len(kept)} weights" in said
    leaves = tree.flatten_paths(weights.load(small, quantized=True).params["transformer"])
    scaled = {f"{path.rpartition('.')[0]}.weight" for path in leaves if path.endswith("scale")}
    assert kept and scaled and not scaled & set(kept)
    assert all(leaves[path].dtype == torch.float32 for path in kept)
    assert run("inspect", small) == 0
    shown = capsys.readouterr().out
    products = sum(path.endswith(f"{format}_scale") for path in leaves)
    assert f"products of {format} in {products} layers" in shown
    assert f"quantization: {format} with products: the velocity is off by {found:.2e}" in shown
    listed = re.findall(r"quantization_kept: (.*)", shown)[0].split(", ")
    assert [one.split()[0] for one in listed] == kept


def test_a_model_that_is_quantised_already_is_said_to_be(folder, tmp_path, capsys):
    for format, source, out in (("int8", folder, "once"), ("float8", tmp_path / "once", "twice.safetensors")):
        assert run("quantize", source, "--format", format, "--steps", 0, "--out", tmp_path / out) == 0
        captured = capsys.readouterr()
        assert ("note: transformer is stored in few bits already" in captured.err) == (out != "once")
        assert ("tokenizers are not in the file" in captured.out) == (out != "once")
    twice = weights.load(tmp_path / "twice.safetensors", quantized=True, only="transformer").params["transformer"]
    once = weights.load(tmp_path / "once", quantized=True, only="transformer").params["transformer"]
    assert not tree.diff(twice, quantize.quantize(quantize.dequantize(once), torch.float8_e4m3fn))


def test_patterns_choose_what_stays_floats(folder, tmp_path):
    words = ("--steps", 0, "--keep", "transformer.blocks.0.*", "*.modulation.weight", "--out", tmp_path / "small")
    assert run("quantize", folder, *words) == 0
    leaves = tree.flatten_paths(weights.load(tmp_path / "small", quantized=True).params["transformer"])
    scales = [path for path in leaves if path.endswith(".scale")]
    assert scales and not any(path.startswith("blocks.0.") or ".modulation." in path for path in scales)


@pytest.mark.parametrize("words, said", [
    (("--max-error", 0), "--max-error 0 must be above 0"), (("--max-error", "nan"), "--max-error"),
    (("--max-error", 0.1, "--steps", 0), "--steps 0 leaves out"),
    (("--max-error", 0.1, "--part", "t5"), "add --part transformer"), (("--keep", "*"), "choose no weight"),
    (("--part", "unet"), "has no unet"), (("--steps", -1), "--steps -1 must be at least 0"),
    (("--limit", 0), "--limit 0 must be above 0"),
    (("--compute", "int8", "--format", "float8"), "needs weights of --format int8"),
    (("--compute", "float8"), "needs weights of --format float8, not int8"),
])  # fmt: skip
def test_mistakes_end_in_one_line(folder, capsys, words, said):
    assert run("quantize", folder, *words) == 1
    assert said in capsys.readouterr().err
