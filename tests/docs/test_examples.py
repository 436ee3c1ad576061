"""The example programs reach their documented results, here with fewer steps and prompts."""

import importlib.util
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def program(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_learned_grid_ends_nearer_to_the_converged_run_than_the_shifted_one():
    actual = program("learn_grid").main(["--steps", "4", "--prompts", "2", "--iterations", "6", "--cfg", "1"])
    assert 0 < actual["learned"] < min(value for name, value in actual.items() if name != "learned")


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
