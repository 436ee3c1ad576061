"""`functional-sd3 reward`: what it leaves, that it goes on to the same bits, and what it says of what is wrong."""

import argparse
import json
from dataclasses import replace

import pytest

from functional_sd3 import weights
from functional_sd3.cli import reward, reward_options, training_run
from functional_sd3.core import prng, tree
from functional_sd3.flow import schedule
from functional_sd3.formats import files
from functional_sd3.training import checkpoint, log, reward_methods, reward_settings
from functional_sd3.training.rewards import RewardError
from tests import models

# The model here has no CLIP-G, which is noted whenever prompts are encoded.
pytestmark = pytest.mark.filterwarnings("ignore:the text encoder CLIP-G is missing")
FUNCTIONS = """
import os, signal, torch
import os, signal, torch

calls = 0

def red(images, prompts, facts):
    return {"red": images[:, 0].mean((1, 2)), "facts": torch.tensor([float(fact is not None) for fact in facts])}

def later(images, prompts, facts):
    global calls
    calls += 1
    if calls > 3:
        raise RuntimeError("the scorer is gone")
    return red(images, prompts, facts)

def nan(images, prompts, facts):
    global calls
    calls += 1
    return {"red": images[:, 0].mean((1, 2)) + (float("nan") if calls > 2 else 0.0)}

def shape(images, prompts, facts):
    return torch.zeros(2)

def same(images, prompts, facts):
    return torch.ones(len(prompts))

def blind(images, prompts, facts):
    return {"red": images.detach()[:, 0].mean((1, 2))}

def named_as_the_log(images, prompts, facts):
    global calls
    calls += 1
    return {"red" if calls < 3 else "old_distance": images[:, 0].mean((1, 2)), "one": torch.ones(len(prompts))}

def giving_up(images, prompts, facts):
    global calls
    calls += 1
    if calls > 2:
        raise KeyboardInterrupt
    return red(images, prompts, facts)

def dying_of_the_signal(images, prompts, facts):
    try:
        return interrupting(images, prompts, facts)
    except KeyboardInterrupt:
        raise RuntimeError("a worker of the scorer was interrupted")

def numbers(images, prompts, facts):
    return {"red": images[:, 0].mean((1, 2)).numpy()}

def interrupting(images, prompts, facts):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return red(images, prompts, facts)
"""
BASE = ["--steps", "4", "--batch-size", "8", "--group", "4", "--sampling-steps", "2", "--draws", "1", "--lr", "1e-2"]
BASE += ["--save-every", "2", "--log-every", "1", "--sample-every", "0"]


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """The module `reward_functions`, its counter at zero, in the working directory."""
    import sys

    (tmp_path / "reward_functions.py").write_text(FUNCTIONS)
    (tmp_path / "broken_module.py").write_text("print(")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "reward_functions", raising=False)
    yield "reward_functions"
    sys.modules.pop("reward_functions", None)


@pytest.fixture
def command(model_folder, functions, capsys):
    """`functional-sd3 reward` with a few small settings; answers (exit status, standard error)."""

    def run(*words, reward_name="red", params=model_folder):
        parser = argparse.ArgumentParser()
        reward.add_arguments(parser)
        rewarded = [] if "--reward" in words else ["--reward", f"{functions}:{reward_name}", "--weight", "red=1"]
        status = reward.run(parser.parse_args([str(w) for w in ("--params", params, *rewarded, *BASE, *words)]))
        return status, capsys.readouterr().err

    return run


def test_a_run_leaves_a_model_its_log_and_samples(command, model_folder, tmp_path):
    status, messages = command("--out", tmp_path / "out", "--sample-every", 2)
    assert status == 0 and "step 4 of 4: loss" in messages and "reward 0." in messages
    rows = log.read(tmp_path / "out" / "log.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    names = {
        "reward",
        "reward_std",
        "red",
        "facts",
        "spread",
        "all_right",
        "all_wrong",
        "diversity",
        "kl",
        "draws",
        "rate",
    }
    assert (
        names <= rows[0].keys() and float(rows[0]["facts"]) == 1.0 and float(rows[0]["reward"]) == float(rows[0]["red"])
    )
    assert float(rows[-1]["kl"]) > float(rows[0]["kl"]) >= 0
    assert sorted(path.name for path in (tmp_path / "out" / "samples").iterdir()) == ["00000002.png", "00000004.png"]
    before, after = (weights.load(path, dtype="stored").params for path in (model_folder, tmp_path / "out"))
    changed = {name for name in before if tree.diff(before[name], after[name])}
    assert changed == {"transformer"}


@pytest.mark.parametrize(("steps", "trained"), [(2, (4, 2)), (4, ())])
def test_a_student_is_then_for_the_steps_that_were_rewarded_too(command, model_folder, tmp_path, steps, trained):
    model = weights.load(model_folder, dtype="stored")
    levels = schedule.Config(distilled_steps=4, distillation="segments")
    weights.save(tmp_path / "student", model._replace(config=replace(model.config, schedule=levels)))
    words = ("--sampling-steps", steps, "--steps", 1, "--times", 1, "--out", tmp_path / "out")
    assert command(*words, params=tmp_path / "student")[0] == 0
    rewarded = weights.load(tmp_path / "out", dtype="stored").config.schedule
    assert rewarded == replace(levels, trained_steps=trained)


def test_a_run_that_was_cut_goes_on_to_the_same_bits(command, tmp_path):
    command("--out", tmp_path / "whole")
    command("--out", tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "step-00000004.safetensors").unlink()
    assert "resuming at step 2 of 4" in command("--out", tmp_path / "cut", "--resume")[1]
    one, other = (checkpoint.paths(tmp_path / name / "checkpoints")[-1].read_bytes() for name in ("whole", "cut"))
    assert one == other
    ours, theirs = (log.read(tmp_path / name / "log.csv") for name in ("whole", "cut"))
    strip = lambda rows: [{name: value for name, value in row.items() if name != "seconds"} for row in rows]  # noqa: E731
    assert strip(ours) == strip(theirs)


def test_a_lora_is_a_file_and_goes_on_to_the_same_bits(command, tmp_path):
    for name in ("whole", "cut"):
        assert command("--out", tmp_path / name, "--lora", 2)[0] == 0
    (tmp_path / "cut" / "checkpoints" / "step-00000004.safetensors").unlink()
    assert command("--out", tmp_path / "cut", "--lora", 2, "--resume")[0] == 0
    one, other = (tmp_path / name / training_run.LORA for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()
    header = files.read_header(checkpoint.paths(tmp_path / "whole" / "checkpoints")[-1])
    learned = [name for name in header.tensors if name.startswith(("train.params.", "old."))]
    assert learned and all(name.endswith((".down", ".up", ".alpha")) for name in learned)


METHODS = [
    ("awm",),
    ("awm", "--updates", 2),
    ("dpo",),
    ("draft", "--last", 2),
    ("grpo", "--cfg", 2, "--updates", 2),
    *(("grpo", "--form", form, "--sampling-steps", 3) for form in ("fast", "cps", "mix", "dance", "guard")),
]


@pytest.mark.parametrize("words", METHODS, ids=lambda words: "-".join(map(str, words)).replace("--", ""))
def test_every_method_learns_and_goes_on_to_the_same_bits(command, model_folder, tmp_path, words):
    method = ["--method", *words, "--steps", 2, "--save-every", 1]
    assert command("--out", tmp_path / "out", *method)[0] == 0
    whole, first = (path.read_bytes() for path in checkpoint.paths(tmp_path / "out" / "checkpoints")[::-1])
    (tmp_path / "out" / "checkpoints" / "step-00000002.safetensors").unlink()
    assert command("--out", tmp_path / "out", *method, "--resume")[0] == 0
    assert checkpoint.paths(tmp_path / "out" / "checkpoints")[-1].read_bytes() == whole != first
    rows = log.read(tmp_path / "out" / "log.csv")
    assert {"reward", "kl"} <= rows[0].keys() and float(rows[1]["grad_norm"]) > 0
    before, after = (weights.load(path, dtype="stored").params for path in (model_folder, tmp_path / "out"))
    assert {name for name in before if tree.diff(before[name], after[name])} == {"transformer"}


def test_draft_needs_a_reward_with_a_gradient(command, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RewardError, match="no gradient with respect to the images"):
        command("--out", out, "--method", "draft", reward_name="blind")
    with pytest.raises(RewardError, match="the scorer is gone"):
        command("--out", out, "--method", "draft", "--save-every", 100, reward_name="later")
    assert [checkpoint.step_of(path) for path in checkpoint.paths(out / "checkpoints")] == [3]


@pytest.mark.parametrize(
    ("name", "said", "kept"),
    [
        ("later", "reward reward_functions:later raised RuntimeError: the scorer is gone", 3),
        ("nan", "score 'red' is nan for 8 of 8 images", 2),
        ("shape", "has shape [2]; it must be (8,)", None),
        ("numbers", "its score 'red' is ndarray; it must be a tensor (8,)", None),
    ],
)
def test_a_reward_that_fails_ends_the_run_with_its_state_saved(command, tmp_path, name, said, kept):
    out = tmp_path / "out"
    with pytest.raises(RewardError) as caught:
        command(
            "--out", out, "--save-every", 100, *(["--weight", "shape=1"] if name == "shape" else []), reward_name=name
        )
    assert said in str(caught.value)
    saved = [checkpoint.step_of(path) for path in checkpoint.paths(out / "checkpoints")]
    assert saved == ([] if kept is None else [kept])
    if kept:
        reward_name = "reward_functions:" + name
        (tmp_path / "reward_functions.py").write_text(FUNCTIONS.replace("calls > ", "calls > 99 + "))
        import sys

        sys.modules.pop("reward_functions")
        words = ["--reward", reward_name, "--weight", "red=1", "--save-every", 100]
        assert f"resuming at step {kept} of 4" in command("--out", out, "--resume", *words)[1]


def test_a_score_with_the_name_of_a_column_of_the_log_is_an_error(command, tmp_path):
    words = ["--reward", "reward_functions:named_as_the_log", "--weight", "one=1", "--save-every", 100]
    with pytest.raises(RewardError, match="a reward gives the score old_distance, which the log has of its own"):
        command("--out", tmp_path / "out", *words)
    assert [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path / "out" / "checkpoints")] == [2]


def test_what_is_no_exception_within_a_rollout_keeps_the_steps_before(command, tmp_path):
    words = ["--reward", "reward_functions:giving_up", "--weight", "red=1", "--save-every", 100]
    status, messages = command("--out", tmp_path / "out", *words)
    assert status == 130 and "stopped at once; --resume goes on from the newest checkpoint" in messages
    assert [checkpoint.step_of(path) for path in checkpoint.paths(tmp_path / "out" / "checkpoints")] == [2]


# The second reports the signal as an error of its own, as a pool of processes does.
@pytest.mark.parametrize("name", ["interrupting", "dying_of_the_signal"])
def test_a_signal_within_a_rollout_gives_it_up_and_saves(command, tmp_path, name):
    command("--out", tmp_path / "whole", "--reward", "reward_functions:red", "--weight", "red=1")
    words = ["--reward", f"reward_functions:{name}", "--weight", "red=1", "--save-every", 100]
    status, messages = command("--out", tmp_path / "cut", *words)
    assert status == 130 and "stopped at step 3, saved in" in messages
    assert command("--out", tmp_path / "cut", *words, "--resume")[0] == 0
    ours, theirs = (weights.load(tmp_path / name, dtype="stored").params for name in ("whole", "cut"))
    assert not tree.diff(ours, theirs)


def test_groups_without_spread_teach_nothing_and_are_logged(command, model_folder, tmp_path):
    words = ["--reward", "reward_functions:same", "--draws", 2, "--steps", 2]
    status, messages = command("--out", tmp_path / "out", *words)
    assert status == 0 and messages.count("note: the rewards of every group were equal, so nothing was learned") == 1
    rows = log.read(tmp_path / "out" / "log.csv")
    assert [(row["draws"], row["spread"], row["all_right"], row["kl"]) for row in rows] == [("2", "0", "1", "nan")] * 2
    ours, theirs = (weights.load(path, dtype="stored").params for path in (model_folder, tmp_path / "out"))
    assert not tree.diff(ours, theirs)


def test_a_change_needs_force(command, tmp_path):
    command("--out", tmp_path / "out")
    (tmp_path / "prompts.txt").write_text("a large red circle\na small blue star\n")
    with pytest.raises(ValueError, match="lr 0.01 -> 0.02"):
        command("--out", tmp_path / "out", "--resume", "--lr", 0.02)
    with pytest.raises(ValueError, match=r"reward \['reward_functions:red'\] -> \['reward_functions:blind'\]"):
        command("--out", tmp_path / "out", "--resume", reward_name="blind")
    with pytest.raises(ValueError, match="lora None -> 2.*Even with --force"):
        command("--out", tmp_path / "out", "--resume", "--force", "--lora", 2)
    status, messages = command(
        "--out", tmp_path / "out", "--resume", "--force", "--steps", 5, "--prompts", "prompts.txt"
    )
    assert status == 0 and "note: 4 steps were planned, now 5" in messages


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--group", 16], "--group 16 is larger than --batch-size 8"),
        (["--group", 3], "--batch-size 8 must be a multiple of --group 3"),
        (["--group", 1], "--group 1 must be at least 2"),
        (["--times", 3], "--times 3 must be at most --sampling-steps 2"),
        (["--reward", "shape"], "--reward 'shape' must be shapes, colours, clip, psnr:FILE or module:function"),
        (["--reward", "clip"], "--reward clip needs --clip DIR"),
        (["--clip", "x"], "--clip is for --reward clip"),
        (["--reward", "psnr:nowhere.png"], "--reward psnr:nowhere.png: the target is no file"),
        (["--reward", "shapes", "--prompts", "p"], "--reward shapes reads captions of the shapes"),
        (["--reward", "shapes", "--reward", "shapes"], "--reward shapes is given twice"),
        (["--weight", "red"], "--weight 'red' must be NAME=NUMBER"),
        (["--weight", "blue=inf"], "--weight blue 'inf' must be a finite number"),
        (["--weight", "red=2"], "--weight red is given twice"),
        (["--sampler", "eulr"], "--method 'eulr' must be one of"),
        (["--sampler", "dopri5"], "--sampler dopri5 chooses its own steps"),
        (["--force"], "--force is for --resume"),
        (["--pairs", "p"], "--pairs is for --method dpo, not for nft"),
        (["--pairs", "p", "--method", "dpo"], "--pairs says what is learned and of which prompts: leave out --reward"),
        (["--form", "cps"], "--form is for --method grpo, not for nft"),
        (["--last", 2], "--last is for --method draft, not for nft"),
        (["--method", "grpo", "--beta", 2], "--beta is for --method nft or dpo, not for grpo"),
        (["--method", "grpo", "--sampler", "heun"], "--method grpo follows steps of its own"),
        (["--method", "grpo", "--sampling-steps", 1], "needs --sampling-steps of at least 2"),
        (["--method", "grpo", "--times", 2], "--times is for --method nft, awm or dpo, not for grpo"),
        (["--method", "draft", "--updates", 2], "--updates is not for --method draft"),
        (["--method", "draft", "--last", 3], "--last 3 must be at most --sampling-steps 2"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt is no file"),
        (["--reward", "reward_functions:nothing"], "the module reward_functions has no nothing"),
        (["--reward", "no_such_module:red"], "the module no_such_module cannot be imported: No module named"),
        (["--reward", "broken_module:red"], "the module broken_module cannot be imported: '(' was never closed"),
        (["--reward", "reward_functions:red", "--weight", "blue=1"], "no reward gives the score blue"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_said(command, tmp_path, words, said):
    with pytest.raises(ValueError) as caught:
        command("--out", tmp_path / "out", *words)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_target_of_another_size_is_refused(command, tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 10), (200, 0, 0)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="psnr:wide.png is 20x10; the images that are drawn are 16x16"):
        command("--out", tmp_path / "out", "--reward", "psnr:wide.png")
    Image.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / "red.png")
    assert command("--out", tmp_path / "out", "--reward", "psnr:red.png", "--steps", 1)[0] == 0
    Image.new("RGB", (16, 16), (0, 0, 200)).save(tmp_path / "red.png")
    with pytest.raises(ValueError, match="contents of the target of psnr:red.png changed"):
        command("--out", tmp_path / "out", "--reward", "psnr:red.png", "--steps", 2, "--resume")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ppo"}, "method 'ppo' must be one of nft, awm"),
        ({"group": 1}, "group 1 must be at least 2"),
        ({"group": 16, "batch": 8}, "group 16 is larger than the batch of 8 images"),
        ({"group": 3, "batch": 8}, "batch 8 must be a multiple of the group, 3"),
        *(({name: 0}, f"{name} 0 must be at least 1") for name in ("draws", "updates", "rows", "at_once")),
    ],
)
def test_what_is_wrong_with_settings_is_said(options, said):
    with pytest.raises(ValueError, match=said):
        reward_settings.check(reward_settings.Settings(**{"method": "nft", "steps": 1, **options}))


def test_the_words_of_the_command_line_are_those_of_the_methods():
    assert reward_options.METHODS == reward_settings.NAMES and reward_options.FORMS == tuple(reward_methods.FORMS)


@pytest.mark.parametrize("method", ["nft", "draft"])
def test_the_clip_score_is_a_reward(command, tmp_path, method):
    from functional_sd3.layouts import rules
    from functional_sd3.layouts.clip_dual import LAYOUT
    from functional_sd3.text import bpe, clip
    from functional_sd3.text.clip import dual as clip_dual

    tables = models.tokenizers().clip_l
    config = clip_dual.Config(
        clip.Config(len(tables.vocab), 24, 32, 2, 2, 48, projection_width=16, eos_id=tables.eos_id),
        clip.ImageConfig(16, 8, 32, 2, 2, 48, projection_width=16),
    )
    folder = tmp_path / "clip"
    folder.mkdir()
    leaves = tree.flatten_paths(clip_dual.init(prng.key(0), config))
    files.write(folder / "model.safetensors", rules.to_theirs(LAYOUT, clip_dual.spec(config), leaves))
    towers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    text = {**towers, "vocab_size": len(tables.vocab), "max_position_embeddings": 24, "eos_token_id": tables.eos_id}
    vision = {**towers, "image_size": 16, "patch_size": 8}
    described = {"model_type": "clip", "projection_dim": 16, "text_config": text, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(described))
    words = ["--reward", "clip", "--clip", folder, "--method", method, "--steps", 1]
    with pytest.raises(ValueError, match="no tokenizer, so it reads no prompts"):
        command("--out", tmp_path / "out", *words)
    bpe.save(folder, tables)
    assert command("--out", tmp_path / "out", *words)[0] == 0
    row = log.read(tmp_path / "out" / "log.csv")[0]
    assert float(row["grad_norm"]) > 0 and abs(float(row["reward"])) < 100


def test_pairs_are_learned_from_without_a_reward(model_folder, tmp_path, capsys):
    from PIL import Image

    parser = argparse.ArgumentParser()
    reward.add_arguments(parser)

    def run(*words):
        base = ["--params", model_folder, *BASE, "--method", "dpo", "--out", tmp_path / "out", *words]
        return reward.run(parser.parse_args([str(word) for word in base]))

    listed = tmp_path / "pairs.jsonl"
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (24, 16), colour).save(tmp_path / f"{name}.png")
    lines = [
        {"prompt": f"a {kind} star", "winner": "red.png", "loser": "blue.png"} for kind in ("small", "large", "red")
    ]
    listed.write_text("\n\n".join(map(json.dumps, lines)))
    assert run("--pairs", listed, "--steps", 6, "--save-every", 3) == 0
    last = checkpoint.paths(tmp_path / "out" / "checkpoints")[-1]
    whole = last.read_bytes()
    last.unlink()
    assert run("--pairs", listed, "--steps", 6, "--save-every", 3, "--resume") == 0 and last.read_bytes() == whole
    rows = log.read(tmp_path / "out" / "log.csv")
    assert float(rows[0]["margin"]) == pytest.approx(0.0, abs=1e-5) and float(rows[-1]["margin"]) > 0
    Image.new("RGB", (24, 16), (0, 200, 0)).save(tmp_path / "blue.png")
    with pytest.raises(ValueError, match="contents of the pairs changed"):
        run("--pairs", listed, "--steps", 7, "--resume")
    for text, said in [
        ("", "lists no pairs"),
        ('{"prompt": "x", "winner": "red.png"}', "line 1: has no loser"),
        ("\n[1]", "line 2: is \\[1\\], not a JSON object"),
        ('{"prompt": "x", "winner": "red.png", "loser": "green.png"}', "green.png"),
    ]:
        listed.write_text(text)
        with pytest.raises(ValueError, match=said):
            run("--pairs", listed, "--out", tmp_path / "other")
    with pytest.raises(ValueError, match="--pairs nowhere is no file"):
        run("--pairs", "nowhere")
    with pytest.raises(ValueError, match="--reward says what images are rewarded by"):
        run()
    assert not (tmp_path / "other").exists()
