"""Guidance on the command line: what is asked for is what is drawn, and nonsense is named."""

import json
import shlex

import pytest
import torch
from PIL import Image

from functional_sd3 import cli, pipeline, weights
from functional_sd3.cli import guidance as words
from functional_sd3.cli import image_settings
from functional_sd3.core import prng
from functional_sd3.flow import guidance
from functional_sd3.image import pixels
from tests import models
from tests.models import parts

PROMPT = "a large red circle on a white background"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("guided")
    model = models.random_model()
    weights.save(root / "model", model)
    weak = {**model.params, "transformer": {**model.params["transformer"]}}
    weak["transformer"]["context"] = {name: 0.3 * leaf for name, leaf in model.params["transformer"]["context"].items()}
    weights.save(root / "weak", model._replace(params=weak))
    return root


def draw(files, *options) -> torch.Tensor:
    out = files / "out.png"
    common = ["generate", PROMPT, "--params", files / "model", "--steps", 3, "--seed", 5, "--out", out]
    assert cli.main([str(word) for word in (*common, *options)]) == 0
    with Image.open(out) as image:
        return torch.tensor(list(image.tobytes()))


def expected(files, guiding, **options) -> torch.Tensor:
    model = weights.load(files / "model")
    with torch.no_grad():
        image = pipeline.generate(*parts(model), PROMPT, prng.key(5)[None], steps=3, guidance=guiding, **options)
    return torch.tensor(list(pixels.to_pil(image)[0].tobytes()))


def composed(files):
    model = weights.load(files / "model")
    told = pipeline.encode(*parts(model), ["a blue square, small"]).positive
    return guidance.composed(guidance.cfg(5.0), (told, -0.5))


def weak(files):
    model = weights.load(files / "weak", only="transformer")
    return guidance.auto(2.0, model.params["transformer"])


SAID = {
    ("zero-star",): lambda files: guidance.zero_star(5.0),
    ("zero-star:scale=3", "zero-init"): lambda files: guidance.zero_init(guidance.zero_star(3.0)),
    ("tangential", "rescaled:factor=0.3"): lambda files: guidance.rescaled(guidance.tangential(5.0), 0.3),
    ("magnitude-aware:rate=2",): lambda files: guidance.magnitude_aware(5.0, 2.0),
    ("apg:momentum=0.5,eta=0.1,longest=none",): lambda files: guidance.apg(5.0, momentum=0.5, eta=0.1, longest=None),
    ("apg-of-data:longest=8",): lambda files: guidance.apg(5.0, longest=8.0, from_positive=True, of_data=True),
    ("mixed-apg:projected-scale=8,first=1",): lambda files: guidance.mixed_apg(5.0, 8.0, first=1),
    ("skip-layer:layers=0,2,scale=1.5,start=0,stop=0.9",): lambda files: guidance.skip_layer(
        guidance.cfg(5.0), (0, 2), 1.5, 0.0, 0.9
    ),
    ("perturbed:layers=1", "interval:stop=0.7"): lambda files: guidance.interval(
        guidance.perturbed(guidance.cfg(5.0), (1,)), 0.0, 0.7
    ),
    ("smoothed:layers=1,sigma=1.5,scale=2",): lambda files: guidance.smoothed(guidance.cfg(5.0), (1,), 2.0, 1.5),
    ("prompt:text=a blue square, small,weight=-0.5",): composed,
}


@pytest.mark.parametrize("said", SAID, ids=" ".join)
def test_what_is_asked_for_is_what_is_drawn(files, said):
    found = draw(files, *(word for text in said for word in ("--guidance", text)))
    assert torch.equal(found, expected(files, SAID[said](files)))
    assert not torch.equal(found, expected(files, guidance.cfg(5.0)))


def test_a_weaker_model_is_read_from_its_folder(files):
    found = draw(files, "--guidance", f"auto:params={files}/weak,scale=2")
    assert torch.equal(found, expected(files, weak(files)))


def test_what_names_no_option_goes_on_with_the_value_before_it():
    asked = words.parse("prompt:text=a sign, x=1, on a wall,weight=2")
    assert asked.options == {"text": "a sign, x=1, on a wall", "weight": 2.0}
    assert words.parse("skip-layer:scale=2,layers=7,8,9").options == {"scale": 2.0, "layers": (7, 8, 9)}


def test_every_name_is_tested():
    names = {text.partition(":")[0] for said in SAID for text in said}
    assert names | {"auto", "cfg"} == set(words.KINDS)


def test_the_image_says_how_it_was_guided_and_is_made_again_by_what_it_says(files):
    options = ["--guidance", "apg:eta=0.2", "--guidance", "skip-layer:layers=1,stop=1", "--cfg", "3", "--offload"]
    first = draw(files, *options)
    with Image.open(files / "out.png") as image:
        settings = json.loads(image.info[image_settings.METADATA])["command"]
    assert settings["guidance"] == ["apg:eta=0.2", "skip-layer:layers=1,stop=1"] and settings["cfg"] == 3.0
    said = shlex.split(image_settings.command(settings))
    assert cli.main([*said[1:], "--out", str(files / "again.png")]) == 0
    with Image.open(files / "again.png") as image:
        assert torch.equal(torch.tensor(list(image.tobytes())), first)
    draw(files)
    with Image.open(files / "out.png") as image:
        assert "guidance" not in json.loads(image.info[image_settings.METADATA])["command"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["best"], "'best' must be one of cfg, zero-star,"),
        (["zero-star:layers=1"], "'layers' is no option of zero-star, which has scale"),
        (["apg:momentum"], "momentum cannot be ''"),
        (["skip-layer"], "needs layers=, as in --guidance skip-layer:layers=..."),
        (["skip-layer:layers=1,x"], "layers cannot be '1,x'"),
        (["skip-layer:layers=1,9"], r"layers \[9\]: the model has the layers 0 to 2"),
        (["rescaled", "zero-star"], "zero-star begins a guidance: it must come first"),
        (["interval:start=0.5,stop=0.2"], "must be 0 <= start <= stop <= 1"),
    ],
)
def test_words_that_make_no_sense_are_named(files, texts, message, capsys):
    options = [word for text in texts for word in ("--guidance", text)]
    assert cli.main(["generate", PROMPT, "--params", str(files / "model"), *options, "--out", str(files / "no.png")])
    import re

    assert re.search(message, capsys.readouterr().err) and not (files / "no.png").exists()
