"""--dtype auto: bfloat16 where the processor multiplies it and the model is worth it, said, and recorded in images."""

import argparse
import warnings

import pytest
import torch
from PIL import Image

from functional_sd3 import cli, weights
from functional_sd3.cli import evaluate_models, image_settings, precision, session
from functional_sd3.core import tree
from functional_sd3.formats.default_dtype import Default
from functional_sd3.formats.notes import Note
from functional_sd3.kernels import int8, int8_functions, narrow
from functional_sd3.kernels.narrow import Narrow
from functional_sd3.transformer import mmdit
from functional_sd3.weights import describing, quantize, shipped
from tests import models

CPU = torch.device("cpu")
SENTENCE = "computed in bfloat16, which this processor multiplies faster: the transformer is stored in 16 bits or fewer"


@pytest.fixture
def processor(monkeypatch):
    """Sets what pays on this machine; at first bfloat16 from a width of 256 on."""

    def use(line):
        monkeypatch.setattr(narrow, "here", lambda: line)

    use(Narrow(256, None))
    return use


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Transformers of width 256 and 32, by dtype."""
    place = tmp_path_factory.mktemp("models")
    slim, config = models.random_model(), models.config(depth=1, heads=8, head_dim=32, dual_attention_layers=())
    leaves = models.random_leaves(mmdit.spec(config.transformer), scale=0.05)
    wide = slim._replace(params=slim.params | {"transformer": leaves}, config=config)
    for name, model in (("wide", wide), ("slim", slim)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            weights.save(place / f"{name}-{str(dtype).removeprefix('torch.')}", model, dtype=dtype)
    return place


def chosen(source, device=CPU, dtype="auto", **flags):
    return precision.choose(argparse.Namespace(dtype=dtype, variant=None, **flags), source, device)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_wide_model_stored_in_16_bits_is_computed_in_bfloat16_where_the_processor_has_it(folders, processor, stored):
    wide, slim = folders / f"wide-{stored}", folders / f"slim-{stored}"
    assert chosen(wide) == (torch.bfloat16, "bfloat16")
    assert chosen(slim).word == "auto" and isinstance(chosen(slim).dtype, Default)
    processor(Narrow(None, None))
    assert chosen(wide).word == "float32" and isinstance(chosen(wide).dtype, Default)
    processor(Narrow(512, None))
    assert chosen(wide).word == "float32"


def test_everything_else_is_as_before(folders, processor, tmp_path):
    assert chosen(folders / "wide-float32").word == "auto"
    assert chosen(shipped.folder()).word == "auto"  # 160 wide: the same images on all machines.
    assert chosen(folders / "wide-bfloat16", torch.device("cuda")).word == "auto"
    assert chosen(folders / "wide-bfloat16", dtype="float32") == (torch.float32, "float32")
    assert chosen(folders / "wide-bfloat16", inverts=True).word == "auto"
    assert chosen(folders / "wide-bfloat16", measures_flow=True).word == "auto"
    assert chosen(tmp_path / "nothing").word == "auto"


def test_storage_is_read_off_the_headers(folders):
    assert describing.storage(folders / "wide-float16", "transformer") == (1.0, 256)
    assert describing.storage(folders / "slim-float32", "transformer") == (0.0, 32)
    model = weights.load(folders / "wide-bfloat16")
    assert describing.storage(folders / "wide-bfloat16", "taesd") is None
    norms = tree.map(lambda leaf: leaf.float() if leaf.ndim == 1 else leaf, model.params["transformer"])
    weights.save(folders / "norms", model._replace(params={"transformer": norms}), layout="native")
    stored = describing.storage(folders / "norms", "transformer")
    assert 0.9 < stored.narrow < 1.0 and precision.pays(stored, Narrow(256, None))


def test_products_of_int8_too_small_for_a_dtype_on_this_processor_are_dequantised(processor, monkeypatch):
    monkeypatch.setattr(int8, "LEAST_SIZE", 0)
    processor(Narrow(256, 60, 120))
    layers = [{"weight": torch.ones(rows, 10), "bias": torch.ones(rows)} for rows in (5, 6, 11, 12)]
    stored = quantize.quantize({"blocks": [{"layers": layers}]}, compute="int8", smallest=0)
    sizes = {torch.float32: [6, 11, 12], torch.bfloat16: [12]}
    for held in (torch.float32, torch.bfloat16, torch.float16):
        params = tree.cast(stored, held)
        # As they are held by default, but for float16, which a CPU computes in float32; else in the dtype given.
        for computed, expected in ((None, sizes.get(held, sizes[torch.float32])), *sizes.items(), (torch.float16, [])):
            found = tree.flatten_paths(precision.with_products_of(params, CPU, computed))
            assert [len(leaf) for path, leaf in found.items() if path.endswith("int8_scale")] == expected
            assert sum(path.endswith(".scale") for path in found) == 4 - len(expected)
    assert not quantize.has_products(precision.with_products_of(stored, CPU, exact=True))


def test_an_image_says_in_which_dtype_it_is_made_again(folders, processor, tmp_path, capsys):
    def generate(*words):
        assert cli.main(["generate", "a", "--device", "cpu", *map(str, words)]) == 0
        return capsys.readouterr().err

    first, again, wide = tmp_path / "one.png", tmp_path / "two.png", ("--params", folders / "wide-bfloat16")
    assert f"note: {SENTENCE} and 256 wide; --dtype float32 is slower" in generate(*wide, "--steps", 2, "--out", first)
    assert cli.main(["inspect", str(first)]) == 0
    assert "--dtype bfloat16" in capsys.readouterr().out
    record = image_settings.read_record(first)
    assert record["model"]["dtype"] == "bfloat16" and record["command"]["dtype"] == "bfloat16"
    # On a machine that would choose otherwise: the command of the image makes it again.
    processor(Narrow(None, None))
    assert SENTENCE not in generate(*wide, "--steps", 2, "--dtype", "bfloat16", "--offload", "--out", again)
    with Image.open(first) as one, Image.open(again) as two:
        assert one.tobytes() == two.tobytes()
    generate(*wide, "--steps", 2, "--out", again)
    assert image_settings.read_record(again)["command"]["dtype"] == "float32"
    processor(Narrow(256, None))
    assert SENTENCE in generate(*wide, "--steps", 1, "--offload", "--out", again)
    assert SENTENCE not in generate("--steps", 1, "--out", again)
    assert image_settings.read_record(again)["command"]["dtype"] == "auto"


def test_what_is_measured_of_drawn_images_is_of_those_that_generate_draws(folders, processor):
    options = {"params": [str(folders / "wide-bfloat16")], "device": "cpu", "dtype": "auto", "variant": None}
    for only, dtype, word in ((None, torch.bfloat16, "bfloat16"), ("vae", torch.float32, "auto")):
        arguments = argparse.Namespace(**options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            model, _ = evaluate_models._model(arguments, **({"only": only} if only else {}))
        assert {leaf.dtype for leaf in tree.leaves(model.params)} == {dtype} and arguments.dtype == word


@pytest.mark.skipif(int8_functions.product() is None, reason="needs products of int8 that are right")
def test_a_quantised_model_is_measured_and_drawn_with_its_products_and_solved_without(folders, processor, tmp_path):
    processor(Narrow(None, 0, 0))
    model = weights.load(folders / "slim-float32")
    stored = quantize.quantize(model.params["transformer"], compute="int8", smallest=0)
    weights.save(tmp_path / "small", model._replace(params={**model.params, "transformer": stored}), layout="native")
    options = {"params": [str(tmp_path / "small")], "device": "cpu", "dtype": "auto", "variant": None}
    measured, _ = evaluate_models._model(argparse.Namespace(**options))
    assert not tree.diff(measured.params["transformer"], stored)
    for flags, has_products in (({}, True), ({"inverts": True}, False), ({"measures_flow": True}, False)):
        for offload in (False, True):
            arguments = argparse.Namespace(**options, **flags, offload=offload, block_swap=None, without=[])
            read = session.read_model(arguments, CPU).components
            found = read("transformer") if offload else read["transformer"]
            assert quantize.has_products(found) == has_products and quantize.is_quantized(found)
