"""The example programs reach their documented results, here with fewer steps and prompts."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

import functional_sd3 as sd3
from tests import models

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def program(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_learned_grid_ends_nearer_to_the_converged_run_than_the_shifted_one():
    actual = program("learn_grid").main(["--steps", "4", "--prompts", "2", "--iterations", "6", "--cfg", "1"])
    assert 0 < actual["learned"] < min(value for name, value in actual.items() if name != "learned")


def test_a_mean_velocity_draws_in_one_step_what_the_velocity_does_not():
    distances = program("meanflow").main(steps=250)
    assert distances["MeanFlow, steps 1"] < 0.6 * distances["Euler, steps 1"] and distances["Euler, steps 1"] > 1.5


def test_an_embedding_rises_to_redder_images(tmp_path):
    out = tmp_path / "images.png"
    options = ["--steps", "4", "--iterations", "10", "--cfg", "1", "--others", "1", "--rate", "25", "--out", str(out)]
    actual = program("optimise_prompt").main(options)
    assert actual["after"] > actual["before"] + 0.1
    with Image.open(out) as sheet:
        assert sheet.size[0] > 2 * 64 and sheet.size[1] > 2 * 64


def test_register_tokens_are_a_third_stream_of_the_attention():
    shares = program("registers").main(count=3)
    assert list(shares) == ["image", "context", "registers"]
    assert all(share > 0 for share in shares.values()) and abs(sum(shares.values()) - 1) < 1e-5


def test_flow_grpo_comes_to_draw_what_is_rewarded():
    rewards = program("flow_grpo").main(updates=25)
    assert sum(rewards[:3]) / 3 < 0.4 and sum(rewards[-3:]) / 3 > 0.7


def test_a_classifiers_gradient_sets_the_colour(tmp_path):
    out = tmp_path / "images.png"
    probabilities = program("classifier_gradient").main(out=str(out))
    assert probabilities["none"] < 0.1
    assert probabilities["through the network"] > 0.4 and probabilities["of x_0 alone"] > 0.4
    with Image.open(out) as sheet:
        assert sheet.size[0] > 4 * 64 and sheet.size[1] > 3 * 64


def test_an_ensemble_of_loras_agrees_on_what_it_learned():
    ratios = program("lora_ensemble").main(updates=12, noises=2)
    assert list(ratios) == ["large red circle", "large red square", "large blue circle", "small green star"]
    assert ratios["large red circle"] > 1 and ratios["large blue circle"] > 1.5


def test_influence_predicts_what_leaving_an_image_out_does():
    for predicted, true in program("influence").main(count=16, left_out=2, iterations=6):
        assert predicted * true > 0 and 0.6 < predicted / true < 1.6


@pytest.mark.parametrize("qk_norm, dual, patch_size", [(False, (), 2), (True, (0, 1), 2), (True, (), 1)])
def test_the_plain_transformer_is_the_library_s(qk_norm, dual, patch_size):
    sizes = {"head_dim": 8, "context_width": 12, "pooled_width": 10, "position_size": 10, "sample_size": 8 * patch_size}
    config = sd3.mmdit.Config(3, 2, patch_size=patch_size, qk_norm=qk_norm, dual_attention_layers=dual, **sizes)
    params = sd3.tree.cast(models.random_leaves(sd3.mmdit.spec(config)), torch.float64)
    keys = sd3.prng.split(sd3.prng.key(3), 3)
    shapes = (2, 16, 4 * patch_size, 6 * patch_size), (2, 5, 12), (2, 10)
    x, context, pooled = (sd3.prng.normal(*each).double() for each in zip(keys, shapes, strict=True))
    t = torch.tensor([0.3, 0.9])
    actual = program("plain_sd3").mmdit(params, config.heads, x, t.double(), context, pooled)
    expected = sd3.mmdit.apply(params, config, x, t, context, pooled)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_the_plain_program_draws_the_image_of_the_pipeline():
    plain, prompt = program("plain_sd3"), "a large red circle above a small blue square"
    for steps in (1, 4, 28):
        assert torch.equal(plain.times(steps), sd3.schedule.sigmas(steps))
    model = sd3.weights.load(sd3.shipped.folder(), dtype=torch.float32)
    with torch.no_grad():
        actual = plain.main(prompt, steps=6, seed=5)
        expected = sd3.pipeline.generate(*model[:3], [prompt], sd3.prng.key(5), steps=6)
    assert actual.shape == (1, 3, 64, 64) and (actual - expected).abs().max() < 1e-3


def test_newer_examples_are_of_at_most_sixty_lines():
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    longer = {name for name, length in lengths.items() if length > 60}
    assert longer <= {"learn_grid.py", "optimise_prompt.py", "plain_sd3.py"}
