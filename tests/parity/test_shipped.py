"""The shipped models: path and size; diffusers loads them and draws the same image from the same noise."""

import tomllib
import warnings
from pathlib import Path

import pytest
import torch

from functional_sd3 import pipeline, weights
from functional_sd3.core import prng, tree
from functional_sd3.recipes.shapes import prompts, report
from functional_sd3.weights import shipped

PROMPTS = [
    "a large red circle on a white background",
    "a small blue star left of a large green square on a black background",
]


@pytest.fixture(scope="module")
def model():
    return weights.load(shipped.folder(), dtype=torch.float32)


def test_both_folders_are_at_most_25_megabytes_and_go_into_the_wheel():
    folders = [shipped.folder(name) for name in shipped.NAMES]
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()) <= 25e6
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {f"params/{name}": f"functional_sd3/params/{name}" for name in shipped.NAMES}


def test_the_student_is_a_transformer_and_a_schedule_beside_the_teacher(model):
    student = weights.load("tiny-4", dtype=torch.float32)
    assert sorted(entry.name for entry in shipped.folder("tiny-4").iterdir() if entry.is_dir()) == [
        "scheduler",
        "transformer",
    ]
    changed = {name for name in model.params if tree.diff(student.params[name], model.params[name])}
    assert changed == {"transformer"} and student.tokenizers == model.tokenizers and not weights.missing(student)
    levels = student.config.schedule
    assert (levels.distilled_steps, levels.trained_steps, levels.guidance_distilled) == (2, (4, 2), True)


@pytest.mark.parametrize(("name", "options"), [("tiny", {}), ("tiny-4", {"steps": 4, "cfg": 1.0})])
def test_captions_are_followed(name, options):
    """Of the readme's shares, as far as so few images tell."""
    model = weights.load(shipped.folder(name), dtype=torch.float32)
    shares = report.prompt_following(model, 2, 16, prng.key(11), batch=16, **options)
    assert shares["right"] >= 0.8, shares


def test_diffusers_loads_the_student_with_the_components_of_the_teacher():
    from diffusers import StableDiffusion3Pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = StableDiffusion3Pipeline.from_pretrained(shipped.folder(), torch_dtype=torch.float32)
        others = {name: part for name, part in whole.components.items() if name not in ("transformer", "scheduler")}
        student = StableDiffusion3Pipeline.from_pretrained(
            shipped.folder("tiny-4"), torch_dtype=torch.float32, **others
        )
    expected = weights.load(shipped.folder("tiny-4"), only="transformer", dtype=torch.float32)
    actual = student.transformer.state_dict()["pos_embed.proj.weight"]
    assert torch.equal(actual, expected.params["transformer"]["patch"]["weight"].reshape(actual.shape))
    assert student.vae is whole.vae


def test_diffusers_draws_the_same_image(model):
    from diffusers import StableDiffusion3Pipeline

    noise = prng.normal(prng.key(3), (2, 16, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusion3Pipeline.from_pretrained(shipped.folder(), torch_dtype=torch.float32)
        theirs.set_progress_bar_config(disable=True)
        length = model.tokenizers.t5.model_max_length
        expected = theirs(
            PROMPTS, latents=noise, guidance_scale=5.0, max_sequence_length=length, output_type="pt"
        ).images
    with torch.no_grad():
        images = pipeline.generate(
            model.params, model.config, model.tokenizers, PROMPTS, prng.key(0), noise=noise, cfg=5.0
        )
    assert images.shape == (2, 3, 64, 64)
    assert float((images - expected).abs().max()) <= 2 / 255


def test_backgrounds_are_drawn_as_prompted(model):
    with torch.no_grad():
        images = pipeline.generate(model.params, model.config, model.tokenizers, PROMPTS, prng.key(0))
    assert [prompts.read(image).background for image in images] == ["white", "black"]


@pytest.mark.parametrize("reader", ["prompts", "outlines"])
def test_decoded_originals_are_read_as_drawn(decoded, reader):
    images, scenes = decoded
    shares = prompts.table(images, scenes, reader=report.READERS[reader])
    assert shares["right"] >= 0.98, shares


@pytest.fixture(scope="module")
def decoded(model):
    """A hundred scenes, encoded and decoded by the shipped autoencoder."""
    return report.decoded_originals(model, 100, prng.key(7))
