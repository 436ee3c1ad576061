"""`functional-sd3 likelihood`: prompts ranked for an image, on the terminal and as JSON, and what it refuses."""

import json
import math

import pytest
import torch

from bench import likelihood as bench
from functional_sd3 import cli, pipeline, weights
from functional_sd3.cli import ranking
from functional_sd3.core import prng
from functional_sd3.flow import ode
from functional_sd3.flow.analysis import likelihood
from functional_sd3.image import pixels
from functional_sd3.recipes import shapes
from functional_sd3.weights import shipped
from tests import models

# torch itself scripts its forward-mode derivatives when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

SCENE = shapes.Scene(
    (shapes.Thing("large", "red", "circle", 20.0, 32.0), shapes.Thing("small", "blue", "star", 48.0, 30.0)),
    "white",
    "left of",
)
TRUE = shapes.caption(SCENE)
WRONG = "a large blue circle left of a small red star on a white background"
ALL_WRONG = "a small green cross on a black background"


def run(*words) -> int:
    return cli.main(["likelihood", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    shapes.draw(SCENE).save(path)
    return path


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random"
    weights.save(path, models.random_model())
    return path


@pytest.mark.parametrize("by", ["likelihood", "loss"])
def test_the_true_caption_is_ranked_first_with_its_lead(image, capsys, by):
    words = [word for prompt in (WRONG, ALL_WRONG, TRUE) for word in ("--prompt", prompt)]
    words += ["--by", by, "--steps", 4, "--method", "euler", "--probes", 2, "--draws", 4]
    assert run(image, *words) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in said[1:]] == [TRUE, WRONG, ALL_WRONG]
    assert "1,024 numbers" in said[0] and all(" ± " in line for line in said[1:])
    assert ("no likelihood" in said[0]) == (by == "loss")


def test_json_holds_what_the_library_finds(image, capsys, tmp_path):
    told = ("--prompt", TRUE, "--prompt", WRONG, "--steps", 3, "--probes", 2, "--seed", 7, "--batch-size", 1)
    assert run(image, *told, "--json", tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert TRUE in capsys.readouterr().out
    assert (found["by"], found["dimensions"], found["probes"], found["seed"], found["cfg"]) == (
        "likelihood",
        1024,
        2,
        7,
        1.0,
    )
    model = weights.load(shipped.folder(), dtype=torch.float32)
    with torch.no_grad():
        x0 = pipeline.encode_images(model.params, model.config, pixels.from_pil(shapes.draw(SCENE)))
        conditions = pipeline.encode(model.params, model.config, model.tokenizers, [TRUE, WRONG])
        expected = likelihood.estimate(
            pipeline.velocity(model.params, model.config, conditions, 1.0),
            x0.expand(2, -1, -1, -1),
            method=ode.HEUN,
            times=torch.linspace(0, 1, 4) ** 2,
            divergence="hutchinson",
            key=prng.key(7).expand(2, 2),
            probes=2,
        )
    for index, row in enumerate(found["prompts"]):
        assert row["prompt"] == (TRUE, WRONG)[index]
        assert row["log_likelihood"] == pytest.approx(expected.log_likelihood[index].item(), abs=0.5)
        assert row["standard_error"] == pytest.approx(expected.standard_error[index].item(), abs=0.3)
        assert row["bits_per_dimension"] == pytest.approx(-row["log_likelihood"] / 1024 / math.log(2))
    first, second = found["prompts"]
    assert first["behind"] == 0 and second["behind"] == pytest.approx(
        first["log_likelihood"] - second["log_likelihood"], abs=0.01
    )


def test_json_alone_goes_to_standard_output(image, random_folder, capsys):
    told = ("--prompt", TRUE, "--steps", 1, "--method", "euler", "--probes", 1, "--params", random_folder)
    assert run(image, *told, "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["prompts"]
    # Of one probe nothing is known about the error.
    assert row["standard_error"] is None and row["behind"] == 0


def test_the_exact_divergence_has_no_error_and_is_what_many_probes_find(image, random_folder, capsys):
    told = ("--prompt", "a circle", "--steps", 1, "--method", "euler", "--params", random_folder, "--size", "32x32")
    assert run(image, *told, "--exact", "--json", "-") == 0
    (exact,) = json.loads(capsys.readouterr().out)["prompts"]
    assert run(image, *told, "--probes", 100, "--json", "-") == 0
    (estimated,) = json.loads(capsys.readouterr().out)["prompts"]
    assert exact["standard_error"] == 0
    off = abs(exact["log_likelihood"] - estimated["log_likelihood"])
    assert off < 3 * estimated["standard_error"]


def test_common_draws_make_differences_surer_than_the_likelihoods():
    scores = torch.tensor([[10.0, 9.0], [20.0, 19.1], [0.0, -0.9]])
    behind, error = likelihood.advantage(scores)
    assert behind.tolist() == pytest.approx([0, (1 + 0.9 + 0.9) / 3], abs=1e-5) and error[1] < 0.1
    assert scores.std(0)[1] / math.sqrt(3) > 5


def test_the_grid_runs_from_the_data_to_noise_in_ever_longer_steps():
    grid = ranking.times(5)
    assert grid[0] == 0 and grid[-1] == 1 and (grid.diff().diff() > 0).all() and len(grid) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", 0), "--steps 0 must be at least 1"),
        (("--probes", 0), "--probes 0 must be at least 1"),
        (("--method", "euler_ancestral"), "draws noise; a likelihood needs one of euler"),
        (("--method", "rk5"), "--method 'rk5' must be one of"),
        (("--size", "30x30"), "30 is not a multiple of"),
    ],
)
def test_mistakes_end_in_one_line(image, random_folder, capsys, words, said):
    assert run(image, "--prompt", "a", "--params", random_folder, *words) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_an_image_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    assert run(tmp_path / "text.png", "--prompt", "a") == 1
    assert "text.png" in capsys.readouterr().err
    assert run(tmp_path / "absent.png", "--prompt", "a") == 1
    assert "absent.png is no file" in capsys.readouterr().err


def test_shuffled_captions_have_the_words_of_the_true_ones_and_none_was_trained_on():
    pairs = bench.pairs(prng.key(1), 60)
    for pair in pairs:
        true = shapes.caption(pair.scene)
        assert shapes.is_held_out(pair.scene) and pair.shuffled != true
        assert sorted(pair.shuffled.replace(" an ", " a ").split()) == sorted(true.replace(" an ", " a ").split())
    assert {pair.attribute for pair in pairs} == {"background", "colour", "shape", "size"}


def test_true_captions_beat_shuffled_ones_for_held_out_images():
    """A part of `python -m bench.likelihood`, whose 200 images take minutes."""
    model = weights.load(shipped.folder(), dtype=torch.float32)
    pairs = bench.pairs(prng.key(2), 20)
    told = {"method": ode.EULER, "times": ranking.times(6), "divergence": "hutchinson", "probes": 1}
    told["mode"] = "reverse"
    with torch.no_grad():
        gained, _ = bench.advantages(model, pairs, prng.key(3), **told)
        losses, _ = bench.loss_advantages(model, pairs, prng.key(3), draws=2)
    assert (gained > 0).sum() >= 18 and (losses > 0).sum() >= 18
