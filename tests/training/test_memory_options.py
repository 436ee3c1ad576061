"""Options of training commands that save memory: what they leave unchanged, that runs resume to the bit, errors."""

import argparse

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.cli import distill, memory_options, reward, train
from functional_sd3.core import transform, tree
from functional_sd3.formats import files
from functional_sd3.training import checkpoint, optim, update_rule
from functional_sd3.transformer import mmdit
from tests.models import random_leaves

# The model here has no CLIP-G, which is noted whenever prompts are encoded.
pytestmark = pytest.mark.filterwarnings("ignore:the text encoder CLIP-G is missing")
OFTEN = ["--save-every", 2, "--log-every", 1, "--sample-every", 0, "--lr", "1e-2", "--warmup", 0, "--steps", 4]
COMMANDS = {
    "train": (train, ["--data", "shapes", "--pictures", 12, "--batch-size", 4, *OFTEN]),
    "reward": (reward, ["--reward", "shapes", "--batch-size", 8, "--group", 4, "--sampling-steps", 2, *OFTEN]),
    "distill": (distill, ["--to", 1, "--pictures", 12, "--batch-size", 4, *OFTEN]),
}


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """`model_folder` with a transformer whose velocity is not zero."""
    model, path = weights.load(model_folder, dtype="stored"), tmp_path_factory.mktemp("random")
    leaves = tree.cast(random_leaves(mmdit.spec(model.config.transformer)), torch.float16)
    weights.save(path, model._replace(params={**model.params, "transformer": leaves}))
    return path


@pytest.fixture
def run(folder, capsys):
    """A command with a few small settings; answers (exit status, standard error)."""

    def call(name, *words):
        module, base = COMMANDS[name]
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        status = module.run(parser.parse_args([str(word) for word in ("--params", folder, *base, *words)]))
        return status, capsys.readouterr().err

    return call


def newest(out):
    return checkpoint.paths(out / "checkpoints")[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_remat_changes_a_run_by_rounding_alone_and_is_a_setting_of_it(run, tmp_path, monkeypatch, name):
    used = []
    remat = transform.remat
    monkeypatch.setattr(transform, "remat", lambda fn: used.append(fn) or remat(fn))
    assert run(name, "--out", tmp_path / "plain")[0] == 0 and not used
    assert run(name, "--out", tmp_path / "remat", "--remat")[0] == 0 and used
    plain, lean = (weights.load(tmp_path / each).params["transformer"] for each in ("plain", "remat"))
    assert tree.allclose(plain, lean, rtol=1e-3, atol=1e-3)
    assert checkpoint.settings(newest(tmp_path / "remat"))["remat"] is True
    with pytest.raises(ValueError, match="remat True -> False"):
        run(name, "--out", tmp_path / "remat", "--resume")


RUNS = [
    ("train", "--remat", "--optimizer", "adamw8bit"),
    ("train", "--optimizer", "muon", "--weights", "bfloat16"),
    ("train", "--weights", "bfloat16", "--fused-update", "--optimizer", "adamw8bit"),
    ("train", "--lora", "2", "--base", "int8", "--sample-every", "4"),
    ("train", "--lora", "2", "--block-swap", "1", "--dtype", "bfloat16"),
    ("distill", "--optimizer", "adamw8bit"),
    ("distill", "--weights", "bfloat16"),
    ("reward", "--weights", "bfloat16"),
]


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_a_resumed_run_ends_in_the_same_bits(run, tmp_path, monkeypatch, words):
    small = lambda rate, decay, b2: optim.adamw8bit(rate, b2=b2, decay=decay, min_size=64)  # noqa: E731
    monkeypatch.setitem(update_rule.OPTIMIZERS, "adamw8bit", small)
    for name in ("whole", "cut"):
        assert run(*words, "--out", tmp_path / name)[0] == 0
    newest(tmp_path / "cut").unlink()  # As a kill between the two checkpoints would leave it.
    status, messages = run(*words, "--out", tmp_path / "cut", "--resume")
    assert status == 0 and "resuming at step 2 of 4" in messages
    assert newest(tmp_path / "whole").read_bytes() == newest(tmp_path / "cut").read_bytes()
    leaves = files.open_mapped(newest(tmp_path / "whole")).header.tensors
    assert any(name.endswith("weight.codes") for name in leaves) == ("adamw8bit" in words)
    parts = ("params.transformer", "ema.", "old.")
    learned = {entry.dtype for name, entry in leaves.items() if name.removeprefix("train.").startswith(parts)}
    assert torch.bfloat16 not in learned if "--weights" not in words else learned == {torch.bfloat16}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--part", "vae", "--remat"], "--remat computes blocks of the transformer again"),
        (["train", "--compile", "--remat"], "--remat has no effect with --compile"),
        (["train", "--lora", 2, "--weights", "bfloat16"], "--weights bfloat16 is of all parameters that learn"),
        (["train", "--base", "int8"], "--base int8 is of the base of --lora RANK"),
        (["train", "--block-swap", 1], "--block-swap 1 is of the base of --lora RANK"),
        (["train", "--lora", 2, "--base", "int8", "--compile"], "--base computes blocks again"),
        (["train", "--fused-update", "--accumulate", 2], "leave out --accumulate"),
        (["train", "--fused-update", "--compile"], "leave out --compile"),
        (["train", "--fused-update", "--optimizer", "muon"], "leave out --optimizer muon"),
    ],
)
def test_options_without_effect_are_errors(run, tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        run(*words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_blocks_than_there_are_cannot_stay_on_the_host(run, tmp_path):
    with pytest.raises(ValueError, match="--block-swap 2 is more than the 1 blocks of the transformer"):
        run("train", "--lora", 2, "--block-swap", 2, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="--block-swap has no effect with --base on a CPU"):
        run("train", "--lora", 2, "--block-swap", 1, "--base", "int8", "--device", "cpu", "--out", tmp_path / "other")


def test_a_lora_over_a_stored_base_learns_as_over_the_whole_one(run, tmp_path):
    """But for weights that are rounded to a byte; and blocks that stay in their file are the same."""
    words = ["--lora", 4, "--schedule", "constant", "--text-encoders", "train", "--dtype", "float32"]
    factors = {}
    bases = {"int8": ["--base", "int8"], "float8": ["--base", "float8"], "swapped": ["--block-swap", 1]}
    for name, more in {"whole": [], **bases}.items():
        assert run("train", *words, *more, "--out", tmp_path / name)[0] == 0
        mapped = files.open_mapped(newest(tmp_path / name))
        names = [path for path in mapped.header.tensors if path.startswith("params.") and path.endswith(".up")]
        factors[name] = torch.cat([files.tensor(mapped, path).flatten() for path in names])
    size = factors["whole"].norm()
    assert size > 1e-3
    for name, most in {"int8": 0.2, "float8": 0.4, "swapped": 1e-3}.items():
        assert 0 <= (factors[name] - factors["whole"]).norm() < most * size
        assert name == "swapped" or not torch.equal(factors[name], factors["whole"])


def test_every_option_is_kept_by_the_checkpoints_of_every_command():
    parser = argparse.ArgumentParser()
    memory_options.add_arguments(parser)
    assert set(vars(parser.parse_args([]))) == set(memory_options.NAMES)
