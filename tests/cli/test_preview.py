"""`--preview`: intermediate images of a run, decoded by TAESD or the VAE, of every command that draws."""

import dataclasses
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from functional_sd3 import cli, pipeline, weights
from functional_sd3.cli import image_settings, parser, preview
from functional_sd3.core import prng, tree
from functional_sd3.formats import files
from functional_sd3.image import pixels, taesd
from tests import models

PROMPT = "a large red circle on a white background"
SMALL = taesd.Config(width=8, encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1))


def autoencoder(config: taesd.Config = SMALL) -> weights.Model:
    """Larger than fresh ones, so that its images depend on the latents."""
    params = tree.map(lambda leaf: 2 * leaf, taesd.init(prng.key(4), config))
    return weights.Model({"taesd": params}, weights.Config(taesd=config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """`plain`, a model; `own`, the same with a TAESD; `taesd3.safetensors`, and its two halves."""
    top = tmp_path_factory.mktemp("weights")
    small = autoencoder()
    weights.save(top / "plain", model)
    config = dataclasses.replace(model.config, taesd=SMALL)
    weights.save(top / "own", model._replace(params=model.params | small.params, config=config))
    weights.save(top / "taesd3.safetensors", small, layout="single")
    tensors = load_file(top / "taesd3.safetensors")
    for half in ("encoder", "decoder"):
        start = f"taesd_{half}."
        files.write(
            top / f"{half}.safetensors", {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        )
    weights.save(top / "four.safetensors", autoencoder(dataclasses.replace(SMALL, latent_channels=4)), layout="single")
    return top


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def generate(folder, out, *words, params="plain") -> int:
    return run("generate", PROMPT, "--params", folder / params, "--steps", 3, "--out", out, *words)


def bytes_of(path) -> torch.Tensor:
    with Image.open(path) as image:
        return pixels.to_bytes(pixels.from_pil(image))


def predictions(model, steps=3) -> list[torch.Tensor]:
    """The predicted data of each step of `generate` with seed 0."""
    seen: list[torch.Tensor] = []
    sizes = {"cfg": 5.0, "steps": steps, "on_step": lambda info: seen.append(info.denoised)}
    with torch.no_grad():
        pipeline.generate(*models.parts(model), [PROMPT], prng.key(0)[None], **sizes)
    return seen


def test_the_preview_of_latents_is_taesds_image_or_that_of_the_vae(model):
    latents = prng.normal(prng.key(1), (2, 16, 8, 8))
    params, config, _ = models.parts(model)
    with torch.no_grad():
        by_vae = pipeline.preview(params, config, latents)
        assert torch.equal(by_vae, pipeline.decode(params, config, latents))
        small = autoencoder()
        both = params | small.params
        by_taesd = pipeline.preview(both, dataclasses.replace(config, taesd=SMALL), latents)
        images = taesd.decode(small.params["taesd"], SMALL, latents)
        half = {"taesd": {"decoder": tree.to(small.params["taesd"]["decoder"], torch.float16)}}
        in_half = pipeline.preview(half, dataclasses.replace(config, taesd=SMALL), latents)
    assert torch.equal(by_taesd, ((images + 1) / 2).clamp(0, 1)) and by_taesd.shape == (2, 3, 64, 64)
    assert in_half.dtype == torch.float32 and (in_half - by_taesd).abs().max() < 0.02


@pytest.mark.parametrize("words", [(), ("own",), ("--preview-decoder",)], ids=["vae", "own taesd", "given taesd"])
def test_a_preview_is_the_prediction_of_its_step(folder, model, tmp_path, capsys, words):
    out, has_taesd = tmp_path / "x.png", bool(words)
    options = ("--preview-decoder", folder / "taesd3.safetensors") if words[:1] == ("--preview-decoder",) else ()
    params = "own" if words == ("own",) else "plain"
    assert generate(folder, out, "--preview", 2, *options, params=params) == 0
    error = capsys.readouterr().err
    path = tmp_path / "x.preview.png"
    assert f"previews are written to {path}, decoded by" in error and ("by the VAE" in error) == (not has_taesd)
    assert ", preview " in error.splitlines()[-1]
    config, params = model.config, model.params
    if has_taesd:
        config, params = dataclasses.replace(config, taesd=SMALL), params | autoencoder().params
    with torch.no_grad():
        # Of three steps the second alone has a preview.
        first, expected, _ = (pixels.to_bytes(pipeline.preview(params, config, each)) for each in predictions(model))
    assert (first.int() - expected.int()).abs().max() > 20
    assert (bytes_of(path).int() - expected.int()).abs().max() <= 1
    with Image.open(path) as image:
        assert image.text == {preview.MARK: "step 2 of 3"}


def test_the_images_and_their_settings_are_those_of_a_run_without(folder, tmp_path):
    assert generate(folder, tmp_path / "a.png") == 0
    assert generate(folder, tmp_path / "b.png", "--preview") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    for name in ("preview", "preview_decoder"):
        with pytest.raises(ValueError, match="records"):
            image_settings.check({"prompts": ["x"], name: 1})


def test_every_command_with_a_run_has_them_and_likelihood_not():
    for name in ("generate", "edit", "interpolate"):
        assert {"--preview", "--preview-decoder"} <= parser.subparser(name)._option_string_actions.keys()
    assert "--preview" not in parser.subparser("likelihood")._option_string_actions


def test_batches_show_a_grid_and_are_written_as_they_come(folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(preview, "_write", lambda path, images, words: shown.append((len(images), words)))
    assert generate(folder, tmp_path / "many", "--count", 3, "--batch", 2, "--preview", 2) == 0
    assert shown == [(2, "step 2 of 3"), (1, "step 2 of 3")]
    monkeypatch.undo()
    assert generate(folder, tmp_path / "many", "--count", 2, "--preview") == 0
    with Image.open(tmp_path / "many" / "preview.png") as image:
        assert image.size == (2 * 64 + 2, 64)


def test_a_run_without_a_step_to_show_is_noted(folder, tmp_path, capsys):
    assert generate(folder, tmp_path / "x.png", "--preview=4") == 0
    assert "note: --preview 4: a run of 3 steps ends before, without a preview\n" in capsys.readouterr().err
    assert not (tmp_path / "x.preview.png").exists()
    assert generate(folder, tmp_path / "y.png", "--preview=3") == 0
    assert "ends before" not in capsys.readouterr().err


def test_an_image_that_stays_as_it_is_has_no_previews(folder, tmp_path, capsys):
    assert generate(folder, tmp_path / "x.png") == 0
    words = ("--image", tmp_path / "x.png", "--strength", 0, "--preview")
    assert generate(folder, tmp_path / "y.png", *words) == 0
    said = capsys.readouterr().err
    assert "with --strength 0 no step is drawn, so there are no previews" in said and "previews are written" not in said


def test_other_commands_preview_too(folder, tmp_path):
    assert generate(folder, tmp_path / "x.png") == 0
    words = ("--params", folder / "plain", "--steps", 2, "--preview")
    source = ("edit", tmp_path / "x.png", "--from", PROMPT, "--to", PROMPT)
    assert run(*source, *words, "--out", tmp_path / "edited.png") == 0
    assert run(*source, "--direct", "--strength", 1, *words, "--out", tmp_path / "direct.png") == 0
    assert run("interpolate", PROMPT, "a star", "--frames", 3, *words, "--out", tmp_path / "frames.gif") == 0
    sizes = {}
    for name in ("edited", "direct", "frames"):
        with Image.open(tmp_path / f"{name}.preview.png") as image:
            sizes[name] = image.size
    assert sizes == {"edited": (64, 64), "direct": (64, 64), "frames": (130, 130)}


def test_start_images_regions_tiles_and_adaptive_methods(folder, tmp_path):
    assert generate(folder, tmp_path / "x.png") == 0
    for place, words in enumerate(
        [
            ("--image", tmp_path / "x.png", "--strength", 0.7),
            ("--region", "0,0,32x64=a star"),
            ("--size", "128x64", "--tile", "64:16"),
            ("--method", "bosh3", "--rtol", 0.5, "--atol", 0.5),
        ]
    ):
        assert generate(folder, tmp_path / f"{place}.png", *words, "--preview") == 0
        with Image.open(tmp_path / f"{place}.preview.png") as image:
            assert image.size == ((128, 64) if "--tile" in words else (64, 64))


def test_offload_needs_a_small_decoder(folder, tmp_path, capsys):
    out = tmp_path / "x.png"
    assert generate(folder, out, "--preview", "--offload") == 1
    assert "give --preview-decoder PATH" in capsys.readouterr().err and not out.exists()
    assert generate(folder, out, "--preview", "--offload", params="own") == 0
    halves = [word for half in ("encoder", "decoder") for word in ("--preview-decoder", folder / f"{half}.safetensors")]
    assert generate(folder, tmp_path / "y.png", "--preview", "--offload", *halves) == 0
    assert torch.equal(bytes_of(tmp_path / "x.preview.png"), bytes_of(tmp_path / "y.preview.png"))


@pytest.mark.parametrize(
    "words, said",
    [
        (("--preview-decoder", "{0}/taesd3.safetensors"), "needs --preview"),
        (("--preview", "--preview-decoder", "{0}/nowhere"), "there is no such file or folder; TAESD3 is at https"),
        (("--preview", "--preview-decoder", "{0}/plain"), "holds no TAESD; TAESD3 is at https"),
        (("--preview", "--preview-decoder", "{0}/four.safetensors"), "latents of 4 channels, not this model's 16"),
        (("--preview", "--preview-decoder", "{0}/decoder.safetensors"), "encoder of TAESD is missing"),
        (("--preview", "0"), "--preview 0 must be at least 1"),
        (("--preview", PROMPT), "put prompts before --preview, or write --preview=1"),
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_is_drawn(folder, tmp_path, capsys, words, said):
    try:
        status = generate(folder, tmp_path / "x.png", *(word.format(folder) for word in words))
    except SystemExit as exit:
        status = exit.code
    assert status and said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_no_other_image_is_overwritten(folder, tmp_path, capsys):
    own = tmp_path / "x.preview.png"
    Image.new("RGB", (8, 8)).save(own)
    before = own.read_bytes()
    assert generate(folder, tmp_path / "x.png", "--preview") == 1
    assert f"--preview writes {own}, which is no preview" in capsys.readouterr().err
    assert own.read_bytes() == before and not (tmp_path / "x.png").exists()
    own.unlink()
    assert generate(folder, tmp_path / "x.png", "--preview") == generate(folder, tmp_path / "x.png", "--preview") == 0
    own.unlink()
    os.mkfifo(own)
    assert generate(folder, tmp_path / "x.png", "--preview") == 1


def test_a_preview_that_cannot_be_written_does_not_end_the_run(folder, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise weights.WeightsError("disk full")

    monkeypatch.setattr(preview, "_write", refuse)
    assert generate(folder, tmp_path / "x.png", "--preview") == 0
    assert capsys.readouterr().err.count("note: no more previews: disk full") == 1
    assert (tmp_path / "x.png").exists()


def test_quiet_writes_previews_and_says_nothing(folder, tmp_path, capsys):
    assert generate(folder, tmp_path / "x.png", "--preview", "--quiet") == 0
    assert not capsys.readouterr().err and (tmp_path / "x.preview.png").exists()


def test_a_model_whose_values_are_not_finite_stops_at_the_first_preview(folder, tmp_path, capsys, model, monkeypatch):
    monkeypatch.setattr(pipeline, "preview", lambda *_, **__: torch.full((1, 3, 8, 8), torch.nan))
    assert generate(folder, tmp_path / "x.png", "--preview") == 1
    assert "values that are not finite; --dtype float32" in capsys.readouterr().err
