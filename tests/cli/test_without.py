"""`--without ENCODER`: the images are those of a model that lacks the encoder."""

from dataclasses import replace

import pytest
from PIL import Image

from functional_sd3 import cli, weights
from functional_sd3.cli import generate_estimate, image_settings, options
from functional_sd3.weights.model import Tokenizers
from tests import models


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and one without its T5."""
    top, model = tmp_path_factory.mktemp("weights"), models.random_model()
    weights.save(top / "whole", model)
    kept = {name: part for name, part in model.params.items() if name != "t5"}
    lacking = model._replace(
        params=kept,
        config=replace(model.config, t5=None),
        tokenizers=model.tokenizers._replace(t5=None),
    )
    weights.save(top / "lacking", lacking)
    return top


def draw(out, *words) -> bytes:
    assert cli.main(["generate", "a red circle", "--steps", "2", "--out", str(out), *map(str, words)]) == 0
    with Image.open(out) as image:
        return image.tobytes()


def test_the_names_are_those_of_the_encoders():
    assert options.ENCODERS == Tokenizers._fields


@pytest.mark.parametrize("how", [(), ("--offload",), ("--block-swap", 1)], ids=["as it is", "offload", "swap"])
def test_images_are_those_of_a_model_without_it_and_it_is_not_read(place, tmp_path, monkeypatch, capsys, how):
    expected = draw(tmp_path / "lacking.png", "--params", place / "lacking")
    assert expected != draw(tmp_path / "whole.png", "--params", place / "whole")
    (encoder,) = (place / "whole" / "text_encoder_3").glob("*.safetensors")
    content = encoder.read_bytes()
    encoder.write_bytes(b"broken")
    try:
        capsys.readouterr()
        assert draw(tmp_path / "x.png", "--params", place / "whole", "--without", "t5", *how) == expected
    finally:
        encoder.write_bytes(content)
    assert "T5 is missing" in capsys.readouterr().err
    record = image_settings.read_record(tmp_path / "x.png")
    assert record["command"]["without"] == record["model"]["without"] == ["t5"]
    assert "--without t5" in image_settings.command(record["command"])
    assert draw(tmp_path / "again.png", "--settings", tmp_path / "x.png") == expected


def test_one_encoder_must_stay(capsys):
    for command in (("generate", "x"), ("app",)):
        assert cli.main([*command, *(word for name in options.ENCODERS for word in ("--without", name))]) == 1
        assert "keep one" in capsys.readouterr().err


def test_an_estimate_counts_it(monkeypatch, capsys):
    configs = []
    monkeypatch.setattr(generate_estimate, "_numbers", lambda config, choice: configs.append(config) or [])
    assert cli.main(["generate", "--estimate", "--without", "t5"]) == 0
    assert all(config.t5 is None and config.clip_g is not None for config in configs) and configs
    assert not capsys.readouterr().err
