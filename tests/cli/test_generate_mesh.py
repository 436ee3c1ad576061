"""`generate --mesh`: several processes draw the images of one, of which the first alone writes and prints."""

import contextlib
import io
import os
from unittest import mock

import pytest
import torch
from PIL import Image

from functional_sd3 import cli

PROMPTS = ("a red circle", "a blue star")


def run(words, out):
    """Exit status, standard output and error of a command in one of several processes."""
    streams = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, LOCAL_RANK=os.environ["RANK"]),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        status = cli.main([*words, "--out", f"{out}/{os.environ['RANK']}"])
    return status, *(stream.getvalue() for stream in streams)


def images(folder):
    return {path.name: torch.tensor(list(Image.open(path).tobytes())).int() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("count", "mesh"), [(2, "guidance=2"), (2, "sequence=2"), (2, "tensor=2"), (4, "guidance=2,tensor=2")]
)
def test_processes_draw_the_images_of_one(processes, folder, tmp_path, capsys, count, mesh):
    words = ["generate", *PROMPTS, "--params", str(folder), "--steps", "2"]
    assert cli.main([*words, "--out", str(tmp_path / "alone")]) == 0
    alone = images(tmp_path / "alone")
    capsys.readouterr()
    (first, *others) = processes(count, run, [*words, "--mesh", mesh], str(tmp_path))
    assert first[0] == 0 and len(first[1].splitlines()) == 3 and "sampling" in first[2]
    assert others == [(0, "", "")] * (count - 1)
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "0"}
    together = images(tmp_path / "0")
    assert together.keys() == alone.keys()
    for name, pixels in together.items():
        difference = (pixels - alone[name]).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.01, name


WRONG = {
    "guidance=4": "--mesh guidance=4 is for 4 processes, but there are 2: torchrun --nproc-per-node 4 -m",
    "heads=2": "the axis one of guidance, sequence, tensor",
    "data=2": "the axis one of guidance, sequence, tensor",
    None: "torchrun has started 2 processes, which would all do the same: --mesh says what they divide",
}


@pytest.mark.parametrize("cache", ["fast", "adaptive:tolerance=2,order=0"])
def test_a_cache_leaves_out_the_same_steps_in_every_process(processes, folder, tmp_path, capsys, cache):
    words = ["generate", PROMPTS[0], "--steps", "8", "--params", str(folder), "--cache", cache]
    assert cli.main([*words, "--out", f"{tmp_path}/alone"]) == 0
    capsys.readouterr()
    results = processes(2, run, [*words, "--mesh", "guidance=2"], tmp_path)
    assert [status for status, *_ in results] == [0, 0]
    alone, divided = images(tmp_path / "alone"), images(tmp_path / "0")
    assert alone.keys() == divided.keys()
    assert all((alone[name] - divided[name]).abs().max() <= 1 for name in alone)


@pytest.mark.parametrize("mesh", WRONG)
def test_a_mesh_that_does_not_fit_is_one_error_in_every_process(processes, folder, tmp_path, mesh):
    words = ["generate", PROMPTS[0], "--params", str(folder), *(["--mesh", mesh] if mesh else [])]
    for rank, (status, out, err) in enumerate(processes(2, run, words, str(tmp_path))):
        assert status == 1 and not out and WRONG[mesh] in err
        assert err.startswith("process 1: " if rank else "functional-sd3 generate: ") and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mesh", "tensor=2", "--params", "tiny"], "tensor=2, but the 5 heads of the attention divide over 1, 5"),
        (["--mesh", "guidance=2", "--cfg", "1"], "--mesh guidance=2 divides the conditionings"),
        (["--mesh", "sequence=2", "--compile"], "--compile makes one graph of a block"),
    ],
)
def test_a_run_that_does_not_divide_is_refused(processes, folder, tmp_path, words, said):
    words = ["generate", PROMPTS[0], *([] if "--params" in words else ["--params", str(folder)]), *words, "--quiet"]
    for status, out, err in processes(2, run, words, str(tmp_path)):
        assert status == 1 and not out and said in err and len(err.splitlines()) == 1, err


def test_a_mesh_needs_its_processes(folder, tmp_path, capsys):
    words = ["generate", PROMPTS[0], "--params", str(folder), "--out", str(tmp_path / "a.png")]
    assert cli.main([*words, "--mesh", "guidance=2"]) == 1
    assert "is for 2 processes, but there is 1" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "", "x", "65536"])
def test_a_port_at_which_nobody_meets_is_an_error_and_no_hang(folder, tmp_path, capsys, monkeypatch, port):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: pytest.fail("waits for ever"))
    words = [
        "generate",
        "a red circle",
        "--params",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--mesh",
        "guidance=2",
    ]
    assert cli.main(words) == 1
    assert f"MASTER_PORT is {port!r}" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["cache", "--data", "shapes", "--out"], ["merge", "tiny", "tiny", "--out"]])
def test_commands_without_a_mesh_are_refused_in_several_processes(tmp_path, capsys, monkeypatch, words):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*words, str(tmp_path / "out")]) == 1
    assert "process 1: " in (said := capsys.readouterr().err) and "start it without torchrun" in said
    assert not (tmp_path / "out").exists()
