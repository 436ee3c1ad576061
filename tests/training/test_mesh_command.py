"""`train --mesh` on several processes: the run of one process, its files written once, its errors said once."""

import argparse
import itertools
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.formats import files
from functional_sd3.training import checkpoint
from tests.training.mesh_runs import error, result, tensors, train


@pytest.fixture(scope="module")
def alone(model_folder, tmp_path_factory):
    """Folder of a run of one process in two parts."""
    out = tmp_path_factory.mktemp("alone") / "run"
    status, _, err = train(model_folder, "--out", out, "--accumulate", "2")
    assert status == 0, err
    return out


def test_data_parallel_training_is_accumulated_training_to_the_bit(processes, model_folder, alone, tmp_path):
    results = processes(2, train, model_folder, "--out", tmp_path / "run", "--mesh", "data=2")
    assert [status for status, _, _ in results] == [0, 0]
    ours, theirs = tensors(tmp_path / "run"), tensors(alone)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [(out / "log.csv").read_text().splitlines() for out in (tmp_path / "run", alone)]
    assert [row.split(",")[2:4] for row in rows[0]] == [row.split(",")[2:4] for row in rows[1]]
    # The first process alone says something, and leaves the files of one run, but for those of a checkpoint.
    assert results[0][1] == f"{tmp_path / 'run'}\n" and "step 6 of 6" in results[0][2] and results[1][1:] == ("", "")
    left = [
        sorted(path.relative_to(out) for path in out.rglob("*") if "step-" not in str(path))
        for out in (tmp_path / "run", alone)
    ]
    assert left[0] == left[1] and result(tmp_path / "run") == result(alone)
    newest = checkpoint.paths(tmp_path / "run" / "checkpoints")[-1]
    sizes = [path.stat().st_size for path in newest.glob("process-*")]
    assert len(sizes) == 2 and max(sizes) < 0.7 * sum(sizes)


@pytest.mark.parametrize("mesh", ["fsdp=2", "data=2,fsdp=2", "sequence=2", "fsdp=2,sequence=2", "data=2,tensor=2"])
def test_sharded_training_equals_that_of_one_process(processes, model_folder, alone, tmp_path, mesh):
    results = processes(4 if "," in mesh else 2, train, model_folder, "--out", tmp_path / "run", "--mesh", mesh)
    assert [status for status, _, _ in results] == [0] * len(results), results[0][2]
    assert error(tensors(tmp_path / "run"), tensors(alone)) < 1e-5
    # The result is written from the files of the checkpoint.
    model = weights.load(tmp_path / "run", dtype=torch.float32, only=["transformer"])
    average = {name.removeprefix("ema."): leaf for name, leaf in tensors(tmp_path / "run").items() if "ema." in name}
    assert all(
        torch.equal(leaf, average[f"transformer.{name}"].half().float())
        for name, leaf in tree.flatten_paths(model.params["transformer"]).items()
    )
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_run_goes_on_with_another_number_of_processes(processes, model_folder, alone, tmp_path):
    out = tmp_path / "run"
    assert train(model_folder, "--out", out, "--steps", "3")[0] == 0
    # The cosine was planned for three steps.
    done = processes(2, train, model_folder, "--out", out, "--mesh", "fsdp=2", "--steps", "5", "--resume")
    assert [status for status, _, _ in done] == [0, 0], done[0][2]
    assert "resuming at step 3 of 5" in done[0][2]
    status, _, err = train(model_folder, "--out", out, "--resume")
    assert status == 0 and "resuming at step 5 of 6" in err
    plain = tmp_path / "plain"
    for steps in (3, 5, 6):
        assert train(model_folder, "--out", plain, "--steps", steps, *(["--resume"] if steps > 3 else []))[0] == 0
    assert error(tensors(out), tensors(plain)) < 1e-5


def test_processes_go_on_as_accumulated_parts_without_force(processes, model_folder, alone, tmp_path):
    out = tmp_path / "run"
    assert processes(2, stopped, model_folder, "--out", out, "--mesh", "data=2")[0][0] == 130
    status, _, err = train(model_folder, "--out", out, "--resume", "--accumulate", "2")
    assert status == 0 and "note: mesh data=2 -> data=1; a batch is added up from 2 parts as before\n" in err
    ours, theirs = tensors(out), tensors(alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and result(out) == result(alone)
    # One part and not two is another number, whoever has it.
    shutil.rmtree(checkpoint.paths(out / "checkpoints")[-1], ignore_errors=True)
    status, _, err = train(model_folder, "--out", out, "--resume", "--accumulate", "4")
    assert status == 1 and "accumulate 2 -> 4" in err
    status, _, err = train(model_folder, "--out", out, "--resume", "--accumulate", "2", "--steps", "7")
    assert status == 0 and "mesh" not in err


def test_a_lora_and_an_autoencoder_train_on_a_mesh(processes, model_folder, tmp_path):
    for name, words in (("lora", ["--lora", "2"]), ("vae", ["--part", "vae"])):
        assert train(model_folder, "--out", tmp_path / name, *words, "--accumulate", "2")[0] == 0
        results = processes(2, train, model_folder, "--out", tmp_path / f"{name}-2", *words, "--mesh", "data=2")
        assert [status for status, _, _ in results] == [0, 0], results[0][2]
        ours, theirs = tensors(tmp_path / f"{name}-2"), tensors(tmp_path / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("method", ["meanflow", "rcm"])
def test_distillation_on_a_mesh_is_that_of_one_process(processes, model_folder, tmp_path, method):
    words = ["--method", method, "--to", "2", "--steps", "2", "--save-every", "2"]
    alone = train(model_folder, "--out", tmp_path / "alone", *words, "--accumulate", "2", command="distill")
    assert alone[0] == 0, alone[2]
    results = processes(
        2, train, model_folder, "--out", tmp_path / "run", *words, "--mesh", "data=2", command="distill"
    )
    assert [status for status, _, _ in results] == [0, 0], results[0][2]
    assert error(tensors(tmp_path / "run", 2), tensors(tmp_path / "alone", 2)) < 1e-5


BRIGHT = """
import torch

seen = []

def red(images, prompts, facts):
    seen.append(len(images))
    return images[:, 0].mean((1, 2))
"""


def rewarded(folder, *words):
    """The command, and the numbers of images that this process has rewarded."""
    import importlib
    import sys

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(words[0]))
        sys.modules.pop("bright", None)
        result = train(folder, *words[1:], command="reward")
        return result, importlib.import_module("bright").seen


@pytest.mark.parametrize("method", ["grpo", "nft", "draft"])
def test_rounds_of_rewards_are_divided_by_prompts(processes, model_folder, tmp_path, method):
    (tmp_path / "bright.py").write_text(BRIGHT)
    words = [tmp_path, "--reward", "bright:red", "--method", method, "--prompts", tmp_path / "prompts.txt"]
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\na green ring\n")
    alone, seen = rewarded(model_folder, *words, "--out", tmp_path / "alone")
    assert alone[0] == 0, alone[2]
    results = processes(2, rewarded, model_folder, *words, "--out", tmp_path / "run", "--mesh", "data=2")
    for (status, _, err), own_seen in results:
        assert status == 0, err
        assert sum(own_seen) == sum(seen) / 2
    ours, theirs = tensors(tmp_path / "run", 2), tensors(tmp_path / "alone", 2)
    assert error(ours, theirs) < 1e-5


REFUSED = {
    "data=3": "--mesh data=3 is for 3 processes, but there are 2: torchrun --nproc-per-node 3 -m functional_sd3 train",
    "data": "must be axis=size",
    "guidance=2": "the axis one of data, fsdp, sequence, tensor",
}


@pytest.mark.parametrize("mesh", REFUSED)
def test_a_mesh_that_does_not_fit_is_an_error_on_every_process(processes, model_folder, tmp_path, mesh):
    for status, _, err in processes(2, train, model_folder, "--out", tmp_path / "run", "--mesh", mesh):
        assert status == 1 and REFUSED[mesh] in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_other_options_that_do_not_fit_are_one_error(processes, model_folder, alone, tmp_path):
    words = {
        "--batch-size 3 cannot be divided over 2 processes": ["--batch-size", "3"],
        "give a multiple of 8": ["--accumulate", "4"],
        "--mesh sequence divides the tokens of the transformer": ["--part", "vae", "--mesh", "sequence=2"],
        "--mesh tensor divides the heads of the transformer, and --part vae": ["--part", "vae", "--mesh", "tensor=2"],
        "and --control copies whole blocks": ["--control", "canny", "--mesh", "tensor=2"],
        "--optimizer muon turns whole matrices": ["--optimizer", "muon", "--mesh", "tensor=2"],
    }
    for sentence, given in words.items():
        first, second = processes(2, train, model_folder, "--out", tmp_path / "run", "--mesh", "data=2", *given)
        assert first[0] == second[0] == 1 and sentence in first[2] and second[2] == ""
    heads = processes(4, train, model_folder, "--out", tmp_path / "run", "--mesh", "tensor=4")
    assert [status for status, _, _ in heads] == [1] * 4 and "the 2 heads of the attention divide" in heads[0][2]
    # A folder that holds a run; and processes without a mesh, which would have written into one folder.
    first, second = processes(2, train, model_folder, "--out", alone, "--mesh", "data=2")
    assert first[0] == second[0] == 1 and "holds a run already" in first[2] and second[2] == ""
    first, second = processes(2, train, model_folder, "--out", tmp_path / "run")
    assert "torchrun has started 2 processes, which would all do the same" in first[2] and "--mesh data=2" in first[2]
    assert not (tmp_path / "run").exists()


def test_a_mesh_without_torchrun_names_it(model_folder, tmp_path):
    status, _, err = train(model_folder, "--out", tmp_path / "run", "--mesh", "data=2")
    assert status == 1 and "torchrun --nproc-per-node 2 -m functional_sd3 train" in err
    assert train(model_folder, "--out", tmp_path / "run", "--mesh", "data=1", "--steps", "1")[0] == 0


def other_option(folder, *words):
    return train(folder, *words, *(["--lr", "1e-3", "--ema", "0.5"] if os.environ["RANK"] == "1" else []))


def other_program(folder, *words):
    from functional_sd3.cli import mesh_options

    def changed(patch):
        if os.environ["RANK"] == "1":
            patch.setattr(mesh_options, "_program_digest", lambda: "another")

    return train(folder, *words, fault=changed)


def test_processes_with_other_options_or_another_program_are_refused(processes, model_folder, tmp_path):
    out = tmp_path / "run"
    first, second = processes(2, other_option, model_folder, "--out", out, "--mesh", "data=2")
    assert first[0] == second[0] == 1 and second[2] == ""
    assert "process 1 has another value than process 0 of: ema, lr" in first[2]
    first, second = processes(2, other_program, model_folder, "--out", out, "--mesh", "data=2")
    assert "process 1 has another value than process 0 of: the program" in first[2]
    assert not checkpoint.paths(out / "checkpoints")


def stopped(folder, *words):
    """A signal to the second process, in its fourth step."""
    from functional_sd3.training import step

    def send(patch):
        advance, calls = step._advance, []

        def counted(*args, **kwargs):
            calls.append(0)
            if len(calls) == 4 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return advance(*args, **kwargs)

        patch.setattr(step, "_advance", counted)

    return train(folder, *words, fault=send)


def test_a_signal_to_one_process_stops_all_after_the_same_step(processes, model_folder, alone, tmp_path):
    out = tmp_path / "run"
    first, second = processes(2, stopped, model_folder, "--out", out, "--mesh", "data=2")
    assert first[0] == second[0] == 130 and "stopped at step 4, saved in" in first[2]
    results = processes(2, train, model_folder, "--out", out, "--mesh", "data=2", "--resume")
    assert [status for status, _, _ in results] == [0, 0]
    ours, theirs = tensors(out), tensors(alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def failing(folder, *words, kind):
    """The second process reads a broken image in its fifth batch, or has an infinite gradient, or the disk is full."""
    from functional_sd3.training import flow_task, step

    is_second = os.environ["RANK"] == "1"

    def batch(patch):
        own = flow_task.own_rows
        calls = []

        def broken(samples, mesh):
            calls.append(0)
            if len(calls) == 5 and is_second:
                raise ValueError("image 7 is broken")
            return own(samples, mesh)

        patch.setattr(flow_task, "own_rows", broken)

    def state(patch):
        advance = step._advance

        def poisoned(*args, **kwargs):
            after = advance(*args, **kwargs)
            if is_second and int(after.step) == 6:
                after.params["transformer"]["final"]["out"]["bias"][0] = torch.inf
            return after

        patch.setattr(step, "_advance", poisoned)

    def disk(patch):
        write = files.write_atomic

        def full(path, *args, **kwargs):
            if path.name.startswith("process-"):
                raise files.WeightsError(f"{path}: no room")
            write(path, *args, **kwargs)

        if is_second:
            patch.setattr(files, "write_atomic", full)

    return train(folder, *words, fault={"batch": batch, "state": state, "disk": disk}[kind])


def test_an_error_of_one_process_ends_all_and_loses_nothing(processes, model_folder, tmp_path):
    out = tmp_path / "batch"
    first, second = processes(2, failing, model_folder, "--out", out, "--mesh", "data=2", kind="batch")
    assert first[0] == second[0] == 1 and "image 7 is broken" in second[2] and "broken" not in first[2]
    assert [path.name for path in checkpoint.paths(out / "checkpoints")][-1] == "step-00000004"
    first, second = processes(2, failing, model_folder, "--out", tmp_path / "state", "--mesh", "data=2", kind="state")
    assert first[0] == second[0] == 1 and "holds an infinity at step 6" in first[2] + second[2]
    first, second = processes(2, failing, model_folder, "--out", tmp_path / "disk", "--mesh", "data=2", kind="disk")
    assert first[0] == second[0] == 1 and "could not be written" in first[2] and second[2] == ""
    assert "process-00001-of-00002" in first[2] and not list((tmp_path / "disk" / "checkpoints").glob("step-*"))


def rows():
    """Words of a command line and the four cells of each row of the guide's table of what goes with what."""
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "scale.md").read_text()
    lines = guide[guide.index("| command | options |") :].splitlines()[2:]
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines):
        command, options, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        yield from (([command, *words.split()], cells) for words in re.findall("`([^`]+)`", options))


def test_the_guide_says_what_goes_with_which_axis():
    from functional_sd3.cli import distill, mesh_options, reward, train

    commands = {"train": train, "distill": distill, "reward": reward}
    needed = {"train": ["--data", "shapes", "--out", "out"], "distill": ["--to", "2", "--out", "out"]}
    seen = set()
    for (command, *words), cells in rows():
        parser = argparse.ArgumentParser()
        commands[command].add_arguments(parser)
        arguments = parser.parse_args([*needed.get(command, ["--out", "out"]), *words])
        refused = [mesh_options.refusal(arguments, axis) for axis in ("data", "fsdp", "sequence", "tensor")]
        assert cells == ["yes" if reason is None else "no" for reason in refused], (command, words)
        seen |= {*filter(None, refused)}
    assert len(seen) == 5  # Each refusal, by axis, is in the table.
