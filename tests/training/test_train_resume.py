"""`train --resume`: settings that may change, their notes, and resuming stopped or damaged runs."""

import os
import re
import shutil
import signal

import pytest
import torch
from PIL import Image

from functional_sd3 import weights
from functional_sd3.cli import train, train_data, train_setup, training_run
from functional_sd3.core import tree
from functional_sd3.formats import files
from functional_sd3.training import checkpoint, digests, lock
from functional_sd3.weights import WeightsError

# The model here has no CLIP-G, which is noted whenever prompts are encoded.
pytestmark = pytest.mark.filterwarnings("ignore:the text encoder CLIP-G is missing")


def checkpoints(out):
    return {checkpoint.step_of(path): path for path in checkpoint.paths(out / "checkpoints")}


def params(out):
    return weights.load(out, dtype=torch.float32).params


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """The folder of a run of 6 steps with a checkpoint at 3: to be copied, not to be gone on with."""
    import argparse

    out = tmp_path_factory.mktemp("finished") / "out"
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    words = ["--params", str(model_folder), "--data", "shapes", "--pictures", "12", "--steps", "6", "--batch-size", "4"]
    words += ["--save-every", "3", "--log-every", "2", "--sample-every", "0", "--warmup", "2", "--lr", "1e-2"]
    assert train.run(parser.parse_args([*words, "--out", str(out)])) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "run")


def test_more_steps_at_a_constant_rate_equal_a_run_that_was_longer_from_the_start(command, tmp_path):
    constant = ["--schedule", "constant"]
    command("--out", tmp_path / "long", *constant, "--steps", 9)
    command("--out", tmp_path / "short", *constant, "--steps", 5)
    status, messages = command("--out", tmp_path / "short", *constant, "--steps", 9, "--resume")
    assert status == 0 and "resuming at step 5 of 9" in messages
    assert "note: 5 steps were planned, now 9\n" in messages
    assert not tree.diff(params(tmp_path / "short"), params(tmp_path / "long"))
    one, other = (checkpoints(tmp_path / name)[9].read_bytes() for name in ("long", "short"))
    assert one == other


def test_more_steps_of_a_cosine_go_on_at_the_rate_of_the_longer_one(command, run):
    status, messages = command("--out", run, "--resume", "--steps", 9)
    assert status == 0
    rate = float(train_setup.tasks.learning_rate(train_setup.tasks.Settings(9, 4, 1e-2, warmup=2))(torch.tensor(6)))
    assert f"6 steps were planned, now 9: the cosine of the learning rate ends there now, and the rate goes on at {rate:.3g}" in messages  # fmt: skip # noqa: E501
    assert sorted(checkpoints(run)) == [3, 6, 9]


def test_a_finished_run_writes_its_result_again(command, run):
    before = params(run)
    shutil.rmtree(run / "transformer")
    status, messages = command("--out", run, "--resume")
    assert status == 0 and "all 6 steps were done before: only the result is written again" in messages
    assert not tree.diff(params(run), before)


def test_fewer_steps_than_are_done_are_refused(command, run):
    with pytest.raises(ValueError, match="--steps 5 counts all steps, of which 6 are done in .*: give more to go on"):
        command("--out", run, "--resume", "--steps", 5)


def test_a_changed_setting_needs_force_and_is_named(command, run):
    changes = ["--lr", "0.02", "--batch-size", "2", "--dropout", "0.2", "--ema", "0.9", "--steps", "8"]
    with pytest.raises(ValueError) as caught:
        command("--out", run, "--resume", *changes)
    said = "batch-size 4 -> 2; dropout 0.1 -> 0.2; ema 0.999 -> 0.9; lr 0.01 -> 0.02"
    assert f"was started with other settings: {said}. Resume with the same, pass --force" in str(caught.value)
    status, messages = command("--out", run, "--resume", "--force", *changes)
    assert status == 0 and f"note: changed by --force: {said}" in messages
    # From now on these are the run's.
    assert "changed" not in command("--out", run, "--resume", *changes)[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lora", 2], "lora None -> 2"),
        (["--part", "vae"], "part transformer -> vae"),
        (["--text-encoders", "train"], "text-encoders frozen -> train"),
        (["--scratch"], "scratch False -> True"),
    ],
)
def test_settings_that_change_the_contents_of_a_checkpoint_cannot_be_forced(command, run, options, said):
    with pytest.raises(ValueError, match=f"{said}.*Even with --force that takes another folder"):
        command("--out", run, "--resume", "--force", *options)


def with_settings(path, change):
    mapped = files.open_mapped(path)
    tensors = {name: files.tensor(mapped, name).clone() for name in mapped.header.tensors}
    import json

    settings = change(checkpoint.settings(path))
    files.write_atomic(path, tensors, metadata={"settings": json.dumps(settings)})


def test_a_checkpoint_older_than_an_option_resumes_with_its_default(command, run):
    def aged(settings):
        kept = {name: value for name, value in settings.items() if name not in ("schedule", "steps")}
        kept = {name: value for name, value in kept.items() if not name.startswith("contents of ")}
        return {**kept, "text-encoders": None}

    for path in checkpoints(run).values():
        with_settings(path, aged)
    with pytest.raises(ValueError, match="schedule cosine -> constant"):
        command("--out", run, "--resume", "--schedule", "constant")
    status, messages = command("--out", run, "--resume")
    assert status == 0 and "the checkpoint has no digests of the weights and images it began with" in messages


def test_a_setting_of_a_later_version_is_noted(command, run):
    for path in checkpoints(run).values():
        with_settings(path, lambda settings: {**settings, "wobble\x1b": 3})
    status, messages = command("--out", run, "--resume")
    assert status == 0 and r"this version does not know are ignored: wobble\x1b" in messages


def test_a_base_that_was_swapped_is_noticed_wherever_it_lies(command, model_folder, run, tmp_path):
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    assert command("--out", run, "--resume", "--params", moved)[0] == 0
    model = weights.load(moved, dtype=torch.float16)
    model.params["t5"]["blocks"][0]["norm1"]["weight"][3] += 1
    weights.save(moved, model)
    with pytest.raises(ValueError, match=r"contents of the t5 of .* changed \(digest .*\); params /.* -> .*Resume"):
        command("--out", run, "--resume", "--params", moved)
    assert "contents of the t5" in command("--out", run, "--resume", "--force", "--params", moved)[1]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        Image.new("RGB", (16, 16), (40 * index, 90, 200)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"image {index}")
    return folder


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_images_that_were_swapped_are_noticed_and_encoded_again(command, images, tmp_path, part):
    base = ["--out", tmp_path / "out", "--data", images, "--part", part]
    command(*base, "--steps", 3)
    Image.new("RGB", (16, 16), (1, 2, 3)).save(images / "3.png")
    with pytest.raises(ValueError, match="was started with other settings: the contents of the data changed"):
        command(*base, "--resume")
    messages = command(*base, "--resume", "--force")[1]
    assert "changed by --force: the contents of the data" in messages
    assert ("the images are encoded again" in messages) == (part == "transformer")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(command, finished, run):
    os.truncate(checkpoints(run)[6], 1000)
    status, messages = command("--out", run, "--resume")
    assert status == 0 and "resuming at step 3 of 6" in messages
    assert re.search("a checkpoint cannot be read: .*step-00000006.*set aside as .*00000006.safetensors.unreadable", messages, re.S)  # fmt: skip # noqa: E501
    assert not tree.diff(params(run), params(finished))


def test_latents_that_are_damaged_are_computed_again(command, run):
    path = run / "checkpoints" / train_data.ENCODED
    before = path.read_bytes()
    path.write_bytes(before[:-100])
    assert "the images are encoded again" in command("--out", run, "--resume")[1]
    assert path.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_sample_is_written_saves_and_the_sample_is_drawn_later(
    command, finished, tmp_path, monkeypatch, number
):
    out, save_image = tmp_path / "out", training_run.save_image

    def interrupted(path, images):
        os.kill(os.getpid(), number)
        save_image(path, images)

    monkeypatch.setattr(training_run, "save_image", interrupted)
    status, messages = command("--out", out, "--sample-every", 4)
    assert status == 130 and f"stopped at step 4, saved in {out / 'checkpoints'}" in messages
    assert max(checkpoints(out)) == 4 and not (out / lock.NAME).exists()
    monkeypatch.undo()
    assert command("--out", out, "--sample-every", 4, "--resume")[0] == 0
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["00000004.png", "00000006.png"]
    assert not tree.diff(params(out), params(finished))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_result_is_written_loses_nothing(command, finished, tmp_path, monkeypatch, number):
    out = tmp_path / "out"
    monkeypatch.setattr(training_run.weights, "save", lambda *arguments: os.kill(os.getpid(), number))
    status, messages = command("--out", out)
    assert status == 130 and "stopped while the result was written; step 6 is saved" in messages
    monkeypatch.undo()
    assert command("--out", out, "--resume")[0] == 0
    assert not tree.diff(params(out), params(finished))


def test_a_sample_that_cannot_be_written_does_not_end_the_run(command, finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "samples").write_text("in the way")
    status, messages = command("--out", out, "--sample-every", 3)
    assert status == 0 and messages.count("note: no sample of step") == 2
    assert not tree.diff(params(out), params(finished))


def test_the_error_for_a_result_that_cannot_be_written_names_the_checkpoint(command, tmp_path, monkeypatch):
    def full(*arguments):
        raise WeightsError("out: cannot be written: no space left on device")

    monkeypatch.setattr(training_run.weights, "save", full)
    with pytest.raises(WeightsError, match="no space left.*step 6 is saved in .*--resume writes the result"):
        command("--out", tmp_path / "out")


def test_a_result_for_which_there_is_room_is_written_even_where_the_last_checkpoint_is_not(
    command, finished, tmp_path, monkeypatch, capsys
):
    original = checkpoint.save

    def save(folder, step, *rest, **options):
        if step == 6:
            raise WeightsError("no space left on device")
        return original(folder, step, *rest, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(WeightsError, match="step 6 could not be written, the newest one is step-00000003"):
        command("--out", tmp_path / "out")
    assert "the result of all steps is written to" in capsys.readouterr().err
    assert not tree.diff(params(tmp_path / "out"), params(finished))


def lora_bytes(folder):
    return (folder / training_run.LORA).read_bytes()


def test_a_result_on_the_way_is_that_of_a_run_of_so_many_steps(command, tmp_path):
    options = ("--lora", 2, "--schedule", "constant", "--save-every", 3)
    command("--out", tmp_path / "long", *options, "--result-every", 2)
    command("--out", tmp_path / "short", *options, "--steps", 4)
    kept = tmp_path / "long" / "results"
    assert sorted(path.name for path in kept.iterdir()) == ["00000002", "00000004", "00000006"]
    assert lora_bytes(kept / "00000004") == lora_bytes(tmp_path / "short")
    assert lora_bytes(kept / "00000004") != lora_bytes(kept / "00000002")
    assert lora_bytes(kept / "00000006") == lora_bytes(tmp_path / "long")


def test_a_result_that_a_kill_prevented_is_written_by_the_resumed_run(command, tmp_path):
    options = ("--lora", 2, "--result-every", 4)
    command("--out", tmp_path / "whole", *options)
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    checkpoints(cut)[6].unlink()
    shutil.rmtree(cut / "results")
    assert "resuming at step 4" in command("--out", cut, *options, "--resume")[1]
    assert lora_bytes(cut / "results" / "00000004") == lora_bytes(tmp_path / "whole" / "results" / "00000004")


def test_results_of_a_whole_model_load_and_one_that_cannot_be_written_does_not_end_the_run(command, finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results").write_text("in the way")
    status, messages = command("--out", out, "--result-every", 3)
    assert status == 0 and messages.count("note: no result of step") == 2 and "Training goes on" in messages
    (out / "results").unlink()
    assert command("--out", out, "--result-every", 3, "--resume")[0] == 0
    for folder in (out, out / "results" / "00000006"):
        assert not tree.diff(params(folder), params(finished))


def test_images_are_encoded_once_although_a_run_ended_before_its_first_checkpoint(command, run, monkeypatch):
    for path in checkpoints(run).values():
        path.unlink()
    for path in run.iterdir():
        if path.name != "checkpoints":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(train_data.datasets, "encode_all", lambda *rest, **options: pytest.fail("encoded again"))
    assert command("--out", run)[0] == 0


def test_a_second_run_in_the_folder_is_refused(command, run):
    with lock.hold(run, pytest.fail), pytest.raises(WeightsError, match="is being trained in by process"):
        command("--out", run, "--resume")


def test_a_digest_depends_on_every_byte_and_not_on_file_names(tmp_path):
    params = {"a": torch.arange(6.0).reshape(2, 3), "b": [torch.ones(2, dtype=torch.float16), torch.zeros(0)]}
    digest = digests.params_digest(params)
    assert digest == digests.params_digest(tree.map(torch.clone, params))
    others = [
        {**params, "a": params["a"].reshape(3, 2)},
        {**params, "a": params["a"].double()},
        {**params, "a": params["a"].flip(0)},
        {**params, "a": torch.nextafter(params["a"], torch.tensor(9.0))},
        {"c": params["a"], "b": params["b"]},
    ]
    assert len({digest, *map(digests.params_digest, others)}) == 6
    for name, content in (("one", b"x" * 2**21), ("two", b"x" * 2**21), ("three", b"x" * (2**21 - 1) + b"y")):
        (tmp_path / name).write_bytes(content)
    one, two, three = digests.file_digests(tmp_path / name for name in ("one", "two", "three"))
    assert one == two != three
    with pytest.raises(WeightsError, match="nowhere"):
        digests.file_digests([tmp_path / "nowhere"])
    assert digests.combined(["ab", "c"]) != digests.combined(["a", "bc"]) and digests.combined(["\ud800"])


@pytest.mark.parametrize(("columns", "has_bars"), [(80, True), (0, False)])
def test_a_terminal_without_a_width_is_given_lines(monkeypatch, columns, has_bars):
    import fcntl
    import pty
    import struct
    import termios

    from functional_sd3.cli import report

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        assert report.has_bars() == has_bars
    os.close(ours)


def test_every_row_of_the_log_is_a_line_where_there_is_no_terminal(command, tmp_path):
    messages = command("--out", tmp_path / "out")[1]
    lines = [line for line in messages.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == [f"step {step} of 6" for step in (2, 3, 4, 6)]
    assert all(re.search(r"loss \d+\.\d{4}, rate \S+, \S+ steps/s, \d\d:\d\d:\d\d left", line) for line in lines)


def test_a_model_of_several_paths_is_the_model(command, model_folder, run, tmp_path, monkeypatch):
    model, out = weights.load(model_folder, dtype="stored"), tmp_path / "several"
    only = {name: model.params[name] for name in ("transformer", "vae")}
    rest = {name: value for name, value in model.params.items() if name not in only}
    for name, its in (("a", only), ("b", rest)):
        weights.save(tmp_path / name, weights.Model(its, model.config, model.tokenizers), layout="native")
    with pytest.raises(ValueError, match="--params nowhere: there is no such file or folder"):
        command("--out", out, "--params", "nowhere")
    monkeypatch.chdir(tmp_path)
    assert command("--out", out, "--params", "a", "--params", "b")[0] == 0
    assert not tree.diff(params(out), params(run))
    assert command("--out", out, "--resume", "--steps", 7)[0] == 0


def test_the_word_tiny_is_the_shipped_model_in_any_folder(tmp_path, monkeypatch):
    import argparse

    from functional_sd3.cli import train
    from functional_sd3.weights import shipped

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    seen = {}
    monkeypatch.setattr(
        train_setup.train_model, "load", lambda arguments, source, *_: seen.update(source=source) or 1 / 0
    )
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--params", "tiny"]):
        with pytest.raises(ZeroDivisionError):
            train_setup.prepare(parser.parse_args(["--data", "shapes", "--out", "o", *words]), print)
        assert seen.pop("source") == [shipped.folder()]
