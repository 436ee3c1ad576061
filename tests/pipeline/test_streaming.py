"""One component in memory at a time: the same images, and a peak that is that of the largest component."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageChops

from functional_sd3 import cli, pipeline, weights
from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.image import vae
from functional_sd3.text import clip, conditioning, t5, textual_inversion
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config, Model
from tests import models
from tests.models import parts

PROMPTS = ["a red circle", "a (blue:1.3) star"]


@pytest.mark.parametrize("options", [{}, {"weighted": True, "negative": "green"}, {"long_prompts": True, "cfg": 1.0}])
def test_the_image_is_that_of_the_whole_model(model, folder, options):
    whole = pipeline.generate(*parts(model), PROMPTS, prng.key(3), steps=2, **options)
    streamed = pipeline.generate_from(folder, PROMPTS, prng.key(3), steps=2, **options)
    assert torch.equal(streamed, whole)


class Turns:
    """A function from names to components, which fails when one is still there as the next is asked for."""

    def __init__(self, params):
        self.params, self.asked, self.alive = params, [], []

    def __call__(self, name):
        assert not [part for part in self.alive if part() is not None], f"something is there when {name} is asked for"
        params = tree.map(torch.clone, self.params[name])
        self.alive.append(weakref.ref(tree.leaves(params)[0]))
        self.asked.append(name)
        return params


def test_each_encoder_is_asked_for_once_and_alone(model):
    fetch = Turns(model.params)
    with torch.no_grad():
        found = conditioning.apply_from(fetch, model.config, model.tokenizers, PROMPTS, t5_length=9)
    assert fetch.asked == ["clip_l", "clip_g", "t5"]
    whole = conditioning.apply(*parts(model), PROMPTS, t5_length=9)
    assert all(torch.equal(*pair) for pair in zip(found, whole, strict=True))


def test_generate_takes_each_component_for_its_turn(model):
    fetch = Turns(model.params)
    _, config, tokenizers = parts(model)
    with torch.no_grad():
        drawn = pipeline.generate(fetch, config, tokenizers, PROMPTS, prng.key(3), steps=2, offload=True)
    assert fetch.asked == ["clip_l", "clip_g", "t5", "transformer", "vae"]
    assert torch.equal(drawn, pipeline.generate(*parts(model), PROMPTS, prng.key(3), steps=2))
    with pytest.raises(ValueError, match="give offload=True, or their tree"):
        pipeline.generate(fetch, config, tokenizers, PROMPTS, prng.key(3), steps=2)


@pytest.mark.parametrize("offload", [False, True])
def test_a_tree_is_moved_to_the_device_and_stays_where_it_was(model, offload):
    _, config, tokenizers = parts(model)
    options = {"steps": 1, "offload": offload, "noise": torch.zeros(2, 16, 8, 8, device="meta")}
    drawn = pipeline.generate(model.params, config, tokenizers, PROMPTS, prng.key(3), device="meta", **options)
    assert drawn.device.type == "meta"
    assert all(leaf.device.type == "cpu" for leaf in tree.leaves(model.params))


@pytest.mark.filterwarnings("ignore:the text encoder")
@pytest.mark.parametrize("absent", [(), ("clip_l", "t5")])
def test_a_run_goes_where_a_function_puts_the_components(model, absent):
    config = replace(model.config, **dict.fromkeys(absent))
    tokenizers = model.tokenizers._replace(**dict.fromkeys(absent))

    def fetch(name):
        return tree.to(model.params[name], "meta")

    drawn = pipeline.generate(fetch, config, tokenizers, PROMPTS, prng.key(3), steps=1, offload=True)
    assert drawn.device.type == "meta"


@pytest.mark.filterwarnings("ignore:the text encoder")
@pytest.mark.parametrize("absent", [("clip_l",), ("clip_g",), ("t5",), ("clip_l", "clip_g")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absent_encoders_stay_absent(model, absent, dtype, tmp_path):
    params = {name: tree.cast(part, dtype) for name, part in model.params.items() if name not in absent}
    config = replace(model.config, **dict.fromkeys(absent))
    tokenizers = model.tokenizers._replace(**dict.fromkeys(absent))
    for told in ((config, tokenizers), (model.config, model.tokenizers)):
        whole = pipeline.generate(params, *told, PROMPTS, prng.key(3), steps=1)
        assert torch.equal(pipeline.generate(params, *told, PROMPTS, prng.key(3), steps=1, offload=True), whole)
    weights.save(tmp_path / "model", Model(params, config, tokenizers))
    whole = pipeline.generate(params, config, tokenizers, PROMPTS, prng.key(3), steps=1)
    assert torch.equal(pipeline.generate_from(tmp_path / "model", PROMPTS, prng.key(3), steps=1), whole)


def test_more_texts_than_are_read_at_once_are_all_read(model):
    texts = [f"a star of size {index}" for index in range(2 * conditioning._BATCH + 1)]
    found = conditioning.apply_from(model.params.__getitem__, model.config, model.tokenizers, texts, t5_length=9)
    whole = conditioning.apply(*parts(model), texts, t5_length=9)
    for pair in zip(found, whole, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


def test_an_outline_has_everything_but_parameters(model, folder):
    outline = weights.outline(folder)
    assert outline.config == weights.load(folder).config and outline.params == {}
    assert outline.tokenizers.t5 == model.tokenizers.t5


def test_the_command_line_draws_the_same_images(folder, tmp_path):
    words = ["generate", *PROMPTS, "--params", folder, "--steps", 2, "--count", 3, "--batch", 4, "--weighted", "--out"]
    for name, more in (("whole.png", []), ("streamed.png", ["--offload"])):
        assert cli.main([str(word) for word in (*words, tmp_path / name, *more)]) == 0
    with Image.open(tmp_path / "whole.png") as whole, Image.open(tmp_path / "streamed.png") as streamed:
        # Texts are read in other batches, whose sums are rounded in another order.
        assert max(high for _, high in ImageChops.difference(whole, streamed).getextrema()) <= 1
        assert whole.info == streamed.info


def test_embeddings_are_added_to_encoders_read_one_at_a_time(folder, tmp_path):
    width = weights.outline(folder).config.clip_l.width
    learned = tmp_path / "thing.safetensors"
    weights.save_inversion(learned, textual_inversion.Word("<thing>", {"clip_l": 3 * torch.ones(2, width)}))
    words = ["generate", "a <thing>", "--params", folder, "--steps", 2, "--embedding", learned, "--out"]
    for name, more in (("whole.png", []), ("streamed.png", ["--offload"])):
        assert cli.main([str(word) for word in (*words, tmp_path / name, *more)]) == 0
    plain = ["generate", "a <thing>", "--params", folder, "--steps", 2, "--out", tmp_path / "no.png"]
    assert cli.main(list(map(str, plain))) == 0
    with Image.open(tmp_path / "whole.png") as whole, Image.open(tmp_path / "streamed.png") as streamed:
        assert max(high for _, high in ImageChops.difference(whole, streamed).getextrema()) <= 1
        with Image.open(tmp_path / "no.png") as without:
            assert ImageChops.difference(whole, without).getbbox() is not None


MEASURE = """
import json, sys
import torch
from functional_sd3 import pipeline, weights
from functional_sd3.core import prng
torch.set_num_threads(1)
path, way = sys.argv[1:]

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def draw(way):
    options = {"steps": 1, "cfg": 1.0, "t5_length": 16}
    if way == "streamed":
        return pipeline.generate_from(path, "a red circle", prng.key(0), **options)
    with torch.no_grad():
        model = weights.load(path)
        parts = model.params, model.config, model.tokenizers
        return pipeline.generate(*parts, "a red circle", prng.key(0), **options)

# The first run brings in all code and the allocator's arenas; what matters is what a run holds at its worst.
draw("streamed")
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmHWM:")
draw(way)
print(json.dumps(resident("VmHWM:") - before))
"""


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    """Components of 20 to 80 MB, whose activations are small."""
    tables = models.tokenizers()
    length = tables.clip_l.model_max_length
    vocab = len(tables.clip_l.names)
    config = Config(
        clip_l=clip.Config(
            vocab=vocab, length=length, width=256, layers=7, heads=4, mlp_width=1024, projection_width=256,
            eos_id=tables.clip_l.eos_id,
        ),
        clip_g=clip.Config(
            vocab=vocab, length=length, width=512, layers=6, heads=8, mlp_width=2048, projection_width=512,
            eos_id=tables.clip_g.eos_id,
        ),
        t5=t5.Config(vocab=len(tables.t5.pieces), width=1024, layers=5, heads=8, head_dim=64, mlp_width=512),
        transformer=mmdit.Config(
            depth=4, heads=8, context_width=1024, pooled_width=768, position_size=8, sample_size=8
        ),
        vae=vae.Config(channels=(32, 64, 64, 64), groups=8),
    )  # fmt: skip
    leaf = lambda path, param: torch.full(param.shape, 0.01)  # noqa: E731
    model = Model(specs.map_params(leaf, weights.spec(config)), config, tables)
    path = tmp_path_factory.mktemp("heavy") / "model"
    # Our own layout: what is read is what is mapped, so that copies do not blur the sizes.
    weights.save(path, model, layout="native")
    return path, {name: tree.nbytes(params) for name, params in model.params.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_peak_is_the_largest_component_and_not_their_sum(heavy):
    path, sizes = heavy
    peaks = {}
    for way in ("streamed", "whole"):
        script = [sys.executable, "-c", MEASURE, str(path), way]
        peaks[way] = json.loads(subprocess.run(script, capture_output=True, text=True, timeout=300, check=True).stdout)
    largest, total = max(sizes.values()), sum(sizes.values())
    assert total > 2 * largest > 2e8
    # Ten megabytes for tokenizer tables, activations and the image.
    assert peaks["streamed"] <= 1.1 * largest + 1e7
    assert peaks["whole"] >= 0.9 * total
