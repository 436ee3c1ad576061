"""`functional-sd3 distill`: what it leaves, how that is drawn, that it goes on to the same bits, and its errors."""

import argparse
import json
import os
import shutil

import pytest
import torch

from functional_sd3 import pipeline, weights
from functional_sd3.cli import distill, generate, likelihood, numbers, reward, run_options, train, training_run
from functional_sd3.cli import lora as lora_command
from functional_sd3.cli.report import printing
from functional_sd3.core import prng, tree
from functional_sd3.formats import files
from functional_sd3.recipes.shapes import dataset
from functional_sd3.training import checkpoint, log
from functional_sd3.transformer import mmdit
from tests.models import random_leaves

# The model here has no CLIP-G, which is noted whenever prompts are encoded.
pytestmark = pytest.mark.filterwarnings("ignore:the text encoder CLIP-G is missing")
BASE = ["--pictures", 12, "--steps", 4, "--batch-size", 4, "--lr", "1e-2", "--warmup", 0, "--save-every", 2]
BASE += ["--log-every", 1, "--sample-every", 0]


@pytest.fixture(scope="module")
def teacher_folder(model_folder, tmp_path_factory):
    """`model_folder` with a transformer whose velocity is not zero."""
    model, folder = weights.load(model_folder, dtype="stored"), tmp_path_factory.mktemp("teacher")
    leaves = random_leaves(mmdit.spec(model.config.transformer))
    half = tree.cast(leaves, torch.float16)
    weights.save(folder, model._replace(params={**model.params, "transformer": half}))
    return folder


@pytest.fixture
def command(teacher_folder, capsys):
    """`functional-sd3 distill` with a few small settings; answers (exit status, standard error)."""

    def run(*words):
        parser = argparse.ArgumentParser(prog="functional-sd3 distill")
        distill.add_arguments(parser)
        numbers.check_options(parser)
        params = [] if "--params" in words else ["--params", teacher_folder]
        status = distill.run(parser.parse_args([str(word) for word in (*params, *BASE, *words)]))
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def draw(capsys):
    """`functional-sd3 generate` of one prompt; answers standard error."""

    def run(*words):
        parser = argparse.ArgumentParser()
        generate.add_arguments(parser)
        with printing(quiet=False):
            generate.run(parser.parse_args(["a red circle", *(str(word) for word in words)]))
        return capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def student(teacher_folder, tmp_path_factory):
    """The folder of a run of 4 segments."""
    out = tmp_path_factory.mktemp("student") / "out"
    parser = argparse.ArgumentParser()
    distill.add_arguments(parser)
    words = ["--params", teacher_folder, *BASE, "--to", 4, "--out", out, "--sample-every", 4]
    assert distill.run(parser.parse_args([str(word) for word in words])) == 0
    return out


def test_a_run_leaves_a_student_that_says_how_it_is_drawn(student, teacher_folder):
    rows = log.read(student / "log.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"] and {"loss", "error", "rate"} <= rows[0].keys()
    assert [path.name for path in (student / "samples").iterdir()] == ["00000004.png"]
    before, after = (weights.load(path, dtype="stored") for path in (teacher_folder, student))
    assert {name for name in before.params if tree.diff(before.params[name], after.params[name])} == {"transformer"}
    levels = after.config.schedule
    assert (levels.distilled_steps, levels.distillation, levels.guidance_distilled) == (4, "segments", True)
    assert levels.shift == 3.0


def test_generate_draws_a_student_with_its_own_steps_without_guidance(student, draw, tmp_path):
    folded = "has guidance folded in: drawn in 4 steps, --cfg 1"
    said = draw("--params", student, "--out", tmp_path / "a.png")
    assert said.count(folded) == 1
    explicit = draw("--params", student, "--out", tmp_path / "b.png", "--steps", 4, "--cfg", 1)
    assert "distilled" not in explicit
    assert pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")
    said = draw("--params", student, "--out", tmp_path / "c.png", "--steps", 2)
    assert "each spans 2 of the steps that it learned" in said
    assert "guides a model that has guidance folded in" in draw(
        "--params", student, "--out", tmp_path / "d.png", "--cfg", 3
    )
    with pytest.raises(ValueError, match="steps 3: this model was distilled into 4 segments"):
        draw("--params", student, "--out", tmp_path / "e.png", "--steps", 3)
    with pytest.raises(ValueError, match="--method heun: this model is a student by segments"):
        draw("--params", student, "--out", tmp_path / "e.png", "--method", "heun")
    assert not (tmp_path / "e.png").exists()


def pixels(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes()


def test_a_run_that_was_cut_goes_on_to_the_same_bits(command, student, tmp_path):
    out = tmp_path / "cut"
    assert command("--to", 4, "--out", out)[0] == 0
    checkpoint.paths(out / "checkpoints")[-1].unlink()
    assert "resuming at step 2 of 4" in command("--to", 4, "--out", out, "--resume")[1]
    one, other = (checkpoint.paths(folder / "checkpoints")[-1].read_bytes() for folder in (student, out))
    assert one == other
    strip = lambda rows: [{name: value for name, value in row.items() if name != "seconds"} for row in rows]  # noqa: E731
    assert strip(log.read(student / "log.csv")) == strip(log.read(out / "log.csv"))
    with pytest.raises(ValueError, match=r"started with other settings: cfg 5.0 -> 2.0"):
        command("--to", 4, "--out", out, "--resume", "--cfg", 2)
    with pytest.raises(ValueError, match=r"started with other settings: .*to 4 -> 2"):
        command("--to", 2, "--out", out, "--resume")


def test_a_lora_of_a_student_makes_the_model_one(command, draw, teacher_folder, tmp_path):
    for name in ("whole", "cut"):
        assert command("--to", 2, "--out", tmp_path / name, "--lora", 2)[0] == 0
    checkpoint.paths(tmp_path / "cut" / "checkpoints")[-1].unlink()
    assert command("--to", 2, "--out", tmp_path / "cut", "--lora", 2, "--resume")[0] == 0
    one, other = (tmp_path / name / training_run.LORA for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()
    learned = files.read_header(checkpoint.paths(tmp_path / "whole" / "checkpoints")[-1]).tensors
    assert all(name.endswith((".down", ".up", ".alpha")) for name in learned if name.startswith("params."))
    said = draw("--params", teacher_folder, "--lora", one, "--out", tmp_path / "a.png")
    assert "distilled for 2 steps and has guidance folded in: drawn in 2 steps, --cfg 1" in said
    assert "distilled" not in draw("--params", teacher_folder, "--lora", f"{one}=0", "--out", tmp_path / "b.png")


def test_a_lora_extracted_from_a_student_makes_the_model_one(student, teacher_folder, draw, tmp_path):
    parser = argparse.ArgumentParser()
    lora_command.add_arguments(parser)
    words = ["extract", student, teacher_folder, "--rank", 2, "--out", tmp_path / "student.safetensors"]
    assert lora_command.run(parser.parse_args([str(word) for word in words])) == 0
    said = draw("--params", teacher_folder, "--lora", tmp_path / "student.safetensors", "--out", tmp_path / "a.png")
    assert "distilled for 4 steps and has guidance folded in: drawn in 4 steps, --cfg 1" in said
    words = ["extract", teacher_folder, student, "--rank", 2, "--out", tmp_path / "teacher.safetensors"]
    assert lora_command.run(parser.parse_args([str(word) for word in words])) == 0
    assert "distilled" not in draw(
        "--params", teacher_folder, "--lora", tmp_path / "teacher.safetensors", "--out", tmp_path / "b.png"
    )


def test_a_student_is_halved_and_nothing_else(command, student, tmp_path):
    for to in (3, 4, 8):
        with pytest.raises(ValueError, match=f"--to {to}: this model is a student of 4 segments.*1 or 2"):
            command("--params", student, "--to", to, "--out", tmp_path / "no")
    with pytest.raises(ValueError, match="--cfg 5.0: guidance is folded into this model already"):
        command("--params", student, "--to", 2, "--out", tmp_path / "no", "--cfg", 5)
    with pytest.raises(ValueError, match="--inner and --shift are for a teacher"):
        command("--params", student, "--to", 2, "--out", tmp_path / "no", "--inner", 3)
    assert command("--params", student, "--to", 2, "--out", tmp_path / "two")[0] == 0
    levels = weights.load(tmp_path / "two").config.schedule
    assert (levels.distilled_steps, levels.shift, levels.guidance_distilled) == (2, 3.0, True)


OWN = {
    "scm": ["--tangent-warmup", 3],
    "scm, weighted": ["--log-variance"],
    "rcm": ["--fake-updates", 2],
    "reflow": ["--teacher-steps", 2],
    "shortcut": ["--equal", 0.5],
}


@pytest.mark.parametrize(
    ("form", "rank"),
    [("scm", 0), ("scm, weighted", 0), ("scm, weighted", 2), ("rcm", 0), ("rcm", 2), ("reflow", 0), ("shortcut", 2)],
)
def test_every_method_leaves_a_student_and_goes_on_to_the_same_bits(
    command, draw, teacher_folder, tmp_path, form, rank
):
    method = form.partition(",")[0]
    words = ["--method", method, "--to", 2, *OWN[form], *(["--lora", rank] if rank else [])]
    for name in ("whole", "cut"):
        assert command(*words, "--out", tmp_path / name)[0] == 0
    checkpoint.paths(tmp_path / "cut" / "checkpoints")[-1].unlink()
    assert "resuming at step 2 of 4" in command(*words, "--out", tmp_path / "cut", "--resume")[1]
    one, other = (checkpoint.paths(tmp_path / name / "checkpoints")[-1] for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()
    before, after = (checkpoint.paths(tmp_path / "whole" / "checkpoints")[index] for index in (0, 1))
    assert before.read_bytes() != after.read_bytes()
    row = log.read(tmp_path / "whole" / "log.csv")[-1]
    columns = {"scm": {"tangent", "dropped"}, "rcm": {"matching", "fake_loss"}, "shortcut": {"bootstrap"}}
    assert columns.get(method, set()) <= row.keys()
    kept = files.read_header(after).tensors
    # The fake score is used as it is, and the log-variance is in no model.
    assert not any(name.startswith("fake.ema.") for name in kept)
    assert ("params.log_variance.weight" in kept) == (form == "scm, weighted")
    if form == "scm, weighted":
        path = tmp_path / "whole" / (training_run.LORA if rank else "transformer/diffusion_pytorch_model.safetensors")
        assert not any("variance" in name for name in files.read_header(path).tensors)
        learned = files.tensor(files.open_mapped(after), "params.log_variance.weight")
        assert learned.abs().min() > 0

    out = tmp_path / "whole"
    options = ["--params", teacher_folder, "--lora", out / training_run.LORA] if rank else ["--params", out]
    said = draw(*options, "--out", tmp_path / "a.png")
    assert "distilled for 2 steps and has guidance folded in: drawn in 2 steps, --cfg 1" in said
    usual = {"reflow": "euler", "shortcut": "meanflow"}.get(method, "euler_renoised")
    draw(*options, "--out", tmp_path / "b.png", "--method", usual)
    assert pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")
    draw(*options, "--out", tmp_path / "c.png", "--steps", 3)
    if form == "scm":
        levels = weights.load(out).config.schedule
        assert (levels.distillation, levels.stochastic_sampling) == ("consistency", True)
        draw(*options, "--out", tmp_path / "d.png", "--method", "euler")
        assert pixels(tmp_path / "a.png") != pixels(tmp_path / "d.png")
        with pytest.raises(ValueError, match="--method heun: .* leads to the end of the flow: it is drawn by euler or"):
            draw(*options, "--out", tmp_path / "e.png", "--method", "heun")
        with pytest.raises(ValueError, match="a student by consistency, whose velocity leads to the end of a flow"):
            command("--params", out, "--method", "scm", "--to", 1, "--cfg", 1, "--out", tmp_path / "no")
    if method == "reflow":
        assert weights.load(out).config.schedule.distillation == "reflow"
        # Its velocity is that of a flow, which can be distilled again.
        again = ["--params", out, "--method", "scm", "--to", 1, "--steps", 1]
        assert command(*again, "--out", tmp_path / "again")[0] == 0


def test_a_method_with_another_state_takes_another_folder(command, student, tmp_path):
    """No checkpoint is taken for a broken one, and none is renamed."""
    shutil.copytree(student, tmp_path / "out")
    kept = sorted((tmp_path / "out" / "checkpoints").iterdir())
    for method in ("rcm", "meanflow"):
        with pytest.raises(ValueError, match=f"method segments -> {method}.*Even with --force that takes another"):
            command("--to", 4, "--out", tmp_path / "out", "--resume", "--force", "--method", method)
    assert sorted((tmp_path / "out" / "checkpoints").iterdir()) == kept
    said = command("--to", 4, "--out", tmp_path / "out", "--resume", "--force", "--method", "scm", "--steps", 5)[1]
    assert "changed by --force: " in said and "method segments -> scm" in said
    with pytest.raises(ValueError, match="log-variance False -> True.*takes another folder"):
        command("--to", 4, "--out", tmp_path / "out", "--resume", "--method", "scm", "--log-variance", "--steps", 5)


def test_a_number_of_shapes_has_no_effect_on_a_folder(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    distill.add_arguments(parser)
    words = ["--to", "2", "--out", "x", "--data", str(tmp_path), "--pictures", "8"]
    with printing(quiet=False):
        run_options.check_images(parser.parse_args(words))
        run_options.check_images(parser.parse_args(words[:-2]))
    assert capsys.readouterr().err.count("--pictures 8 is how many of the shapes") == 1


def test_a_student_is_not_trained_as_a_flow(command, student, tmp_path):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    words = ["--params", student, "--data", "shapes", "--out", tmp_path / "flow"]
    with pytest.raises(ValueError, match="--params is a student by segments, whose velocity is another"):
        train.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sampling-steps", 3], "--sampling-steps 3: this model was distilled into 4 segments"),
        (["--sampler", "heun"], "--sampler heun: this model is a student by segments"),
        ([], "steps of the student"),
    ],
)
def test_rewards_draw_a_student_in_its_own_steps(student, tmp_path, words, said):
    parser = argparse.ArgumentParser()
    reward.add_arguments(parser)
    given = ["--params", student, "--reward", "shapes", "--out", tmp_path / "out", "--steps", 1, "--batch-size", 4]
    parsed = parser.parse_args([str(word) for word in (*given, "--group", 2, "--sample-every", 0, *words)])
    if words:
        with pytest.raises(ValueError, match=said):
            reward.run(parsed)
        return
    assert reward.run(parsed) == 0
    saved = checkpoint.settings(checkpoint.paths(tmp_path / "out" / "checkpoints")[-1])
    assert (saved["sampling-steps"], saved["sampler"]) == (4, "euler")


def test_rewards_do_not_train_a_mean_velocity(mean_student, tmp_path):
    parser = argparse.ArgumentParser()
    reward.add_arguments(parser)
    with pytest.raises(ValueError, match="--params is a student by meanflow, which is drawn by its mean velocity"):
        words = ["--params", mean_student, "--reward", "shapes", "--out", tmp_path / "out"]
        reward.run(parser.parse_args([str(word) for word in words]))


def test_a_student_has_no_likelihood(student, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    parser = argparse.ArgumentParser()
    likelihood.add_arguments(parser)
    with pytest.raises(ValueError, match="likelihood follows the velocity of a flow, and this model is a student by"):
        words = [tmp_path / "a.png", "--prompt", "x", "--params", student]
        likelihood.run(parser.parse_args([str(word) for word in words]))


def test_pairs_are_the_teachers_runs_and_are_kept(command, teacher_folder, tmp_path):
    words = ["--method", "reflow", "--to", 2, "--teacher-steps", 2, "--cfg", 3]
    assert command(*words, "--out", tmp_path / "out")[0] == 0
    (path,) = (tmp_path / "out" / "checkpoints" / "pairs").iterdir()
    mapped = files.open_mapped(path)
    noise, latents = (files.tensor(mapped, name) for name in ("noise", "latents"))
    assert len(noise) == 12 and noise.std() == pytest.approx(1, abs=0.1)
    model = weights.load(teacher_folder, dtype=torch.float32)
    captions = dataset.dataset(prng.key(0), 12, 16).captions
    conditions = pipeline.encode(*model[:3], captions, t5_length=16)
    expected = pipeline.sample(model.params, model.config, conditions, noise, steps=2, cfg=3.0)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4)
    # Read again by the same run, drawn again for another.
    stamp = path.stat().st_mtime_ns
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    shutil.copytree(path.parent, tmp_path / "other" / "checkpoints" / "pairs")
    kept = tmp_path / "other" / "checkpoints" / "pairs" / path.name
    os.utime(kept, ns=(stamp, stamp))
    assert "drawn again" not in command(*words, "--out", tmp_path / "other")[1]
    assert kept.stat().st_mtime_ns == stamp
    shutil.copytree(kept.parent, tmp_path / "third" / "checkpoints" / "pairs")
    assert "pairs are drawn again" in command(*words[:-1], 2, "--out", tmp_path / "third")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", 4, "--method", "scm", "--inner", 3], "--inner is for --method segments, not for scm"),
        (["--to", 4, "--method", "scm", "--fake-rate", 1], "--fake-rate is for --method rcm, not for scm"),
        (["--to", 4, "--method", "reflow", "--teacher-steps", 0], "--teacher-steps 0 must be at least 1"),
        (["--to", 0], "--to 0 must be between 1 and 1,000"),
        (["--to", 10**9], "--to 1000000000 must be between 1 and 1,000"),
        (["--to", 4, "--batch-size", 2**31 - 1], "--batch-size 2147483647 must be at most 1,000,000"),
        (["--to", 4, "--log-variance"], "--log-variance is for --method scm, not for segments"),
        (["--to", 4, "--equal", 0.5], "--equal is for --method meanflow, imeanflow or shortcut, not for segments"),
        (["--to", 4, "--template", "a {}"], "--template is for a folder of images"),
        (["--to", 4, "--follow"], "--follow is for a folder of images"),
        (["--to", 4, "--cfg", 0.5], "--cfg 0.5 must be at least 1"),
        (["--to", 4, "--cfg", "nan"], "--cfg nan must be a finite number"),
        (["--to", 4, "--inner", 0], "--inner 0 must be between 1 and 1,000"),
        (["--to", 4, "--shift", -1], "--shift -1.0 must be above 0"),
        (["--to", 4, "--lr", "inf"], "--lr inf must be a positive number"),
        (["--to", 4, "--lora", 0], "--lora 0 must be a rank of at least 1"),
        (["--to", 4, "--accumulate", 3], "cannot be taken in 3 equal parts"),
        (["--to", 4, "--force"], "--force is for --resume"),
        (["--to", 4, "--caption", "x"], "--caption is for a folder of images"),
        (["--to", 4, "--data", "/nowhere"], "--data /nowhere is not a folder that exists"),
        (["--to", 4, "--params", "/nowhere"], "--params /nowhere: there is no such file"),
        (["--to", 4, "--ema", 1], "--ema 1.0 must be at least 0 and below 1"),
    ],
)
def test_options_that_make_no_sense_are_errors(command, tmp_path, words, said):
    with pytest.raises((ValueError, numbers.OutOfRange), match=said.replace("(", r"\(")):
        command(*words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def mean_student(teacher_folder, tmp_path_factory):
    """The folder of a run of MeanFlow."""
    out = tmp_path_factory.mktemp("mean") / "out"
    parser = argparse.ArgumentParser()
    distill.add_arguments(parser)
    words = ["--params", teacher_folder, *BASE, "--to", 2, "--out", out, "--sample-every", 4, "--method", "meanflow"]
    assert distill.run(parser.parse_args([str(word) for word in (*words, "--tangent-warmup", 3)])) == 0
    return out


def test_a_mean_velocity_is_stored_with_its_embedder_in_every_layout(mean_student, teacher_folder, tmp_path):
    rows = log.read(mean_student / "log.csv")
    assert float(rows[0]["tangent"]) == 0 and float(rows[-1]["tangent"]) > 0
    model = weights.load(mean_student, dtype="stored")
    levels = model.config.schedule
    assert (levels.distilled_steps, levels.distillation, levels.guidance_distilled) == (2, "meanflow", True)
    assert model.config.transformer.interval_size == 64
    written = json.loads((mean_student / "transformer" / "config.json").read_text())
    assert written["interval_size"] == 64
    learned = model.params["transformer"]["interval"]
    assert {leaf.dtype for leaf in tree.leaves(learned)} == {torch.float16}
    assert learned["out"]["weight"].abs().sum() > 0
    for name, layout in (("native", "native"), ("one.safetensors", "native"), ("again", "diffusers")):
        weights.save(tmp_path / name, model, layout=layout)
        again = weights.load(tmp_path / name, dtype="stored")
        assert again.config.transformer == model.config.transformer and again.config.schedule == levels
        assert not tree.diff(again.params["transformer"], model.params["transformer"])
    plain = weights.load(teacher_folder, dtype="stored")
    assert "interval" not in plain.params["transformer"]


def test_a_mean_velocity_is_drawn_by_its_own_method_in_any_steps(mean_student, teacher_folder, draw, tmp_path):
    said = draw("--params", mean_student, "--out", tmp_path / "a.png")
    assert "distilled for 2 steps and has guidance folded in: drawn in 2 steps, --cfg 1" in said
    own = ("--steps", 2, "--cfg", 1)
    draw("--params", mean_student, "--out", tmp_path / "b.png", *own, "--method", "meanflow")
    draw("--params", mean_student, "--out", tmp_path / "c.png", *own, "--method", "euler")
    assert pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png") != pixels(tmp_path / "c.png")
    for steps in (1, 3):
        assert "distilled" not in draw(
            "--params", mean_student, "--out", tmp_path / f"{steps}.png", "--steps", steps, "--cfg", 1
        )
    with pytest.raises(ValueError, match="--method meanflow takes steps of a mean velocity .* no interval_size"):
        draw("--params", teacher_folder, "--out", tmp_path / "e.png", "--method", "meanflow")
    assert not (tmp_path / "e.png").exists()


def test_a_run_of_a_mean_velocity_goes_on_to_the_same_bits(command, mean_student, tmp_path):
    out, words = tmp_path / "cut", ("--method", "meanflow", "--tangent-warmup", 3)
    status, said = command("--to", 2, "--out", out, *words)
    assert status == 0 and "diffusers has no embedder of t - r" in said
    checkpoint.paths(out / "checkpoints")[-1].unlink()
    assert "resuming at step 2 of 4" in command("--to", 2, "--out", out, *words, "--resume")[1]
    one, other = (checkpoint.paths(folder / "checkpoints")[-1].read_bytes() for folder in (mean_student, out))
    assert one == other
    with pytest.raises(ValueError, match="started with other settings: .*tangent-warmup 3 -> 0"):
        command("--to", 2, "--out", out, "--method", "meanflow", "--resume")


def test_a_lora_of_a_mean_velocity_brings_the_embedder(command, draw, teacher_folder, tmp_path, capsys):
    assert command("--to", 2, "--out", tmp_path / "a", "--method", "imeanflow", "--lora", 2)[0] == 0
    file = tmp_path / "a" / training_run.LORA
    said = draw("--params", teacher_folder, "--lora", file, "--out", tmp_path / "a.png")
    assert "distilled for 2 steps and has guidance folded in: drawn in 2 steps, --cfg 1" in said
    draw("--params", teacher_folder, "--lora", f"{file}=0", "--out", tmp_path / "off.png", "--steps", 2)
    draw("--params", teacher_folder, "--out", tmp_path / "without.png", "--steps", 2)
    assert pixels(tmp_path / "off.png") == pixels(tmp_path / "without.png") != pixels(tmp_path / "a.png")
    parser = argparse.ArgumentParser()
    lora_command.add_arguments(parser)
    words = ["merge", str(teacher_folder), str(file), "--out", str(tmp_path / "merged")]
    assert lora_command.run(parser.parse_args(words)) == 0
    merged = weights.load(tmp_path / "merged", dtype="stored")
    assert merged.config.schedule.distillation == "meanflow" and merged.config.transformer.interval_size == 64
    draw("--params", tmp_path / "merged", "--out", tmp_path / "merged.png")
    info = ["info", str(file), "--params", str(teacher_folder)]
    capsys.readouterr()
    assert lora_command.run(parser.parse_args(info)) == 0 and "left out" not in capsys.readouterr().out


def test_a_mean_velocity_is_distilled_on_and_is_no_teacher_of_segments(command, mean_student, student, tmp_path):
    with pytest.raises(ValueError, match="this model is a student by meanflow"):
        command("--params", mean_student, "--to", 2, "--cfg", 1, "--out", tmp_path / "no")
    with pytest.raises(ValueError, match="this model is a student by segments"):
        command("--params", student, "--to", 2, "--method", "meanflow", "--out", tmp_path / "no")
    with pytest.raises(ValueError, match="--inner is for --method segments, not for meanflow"):
        command("--to", 2, "--method", "meanflow", "--inner", 2, "--out", tmp_path / "no")
    with pytest.raises(ValueError, match="--tangent-warmup is for --method meanflow, .* or rcm, not for segments"):
        command("--to", 2, "--tangent-warmup", 2, "--out", tmp_path / "no")
    words = ("--params", mean_student, "--to", 3, "--method", "shortcut", "--out", tmp_path / "three")
    assert command(*words)[0] == 0
    model = weights.load(tmp_path / "three")
    assert (model.config.schedule.distilled_steps, model.config.schedule.guidance_distilled) == (3, True)
