"""Folders and files that are replaced whole or not at all, whatever stops the process that replaces them."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.formats import atomic, files
from functional_sd3.image import vae
from functional_sd3.layouts import diffusers_folder
from functional_sd3.weights import Config, Model, WeightsError

SMALL = Config(vae=vae.Config(channels=(2, 2), blocks_per_level=1, groups=1, sample_size=4))

# Saves over a folder again and again, each time killed one change to the disk later than before; printed is what loads
# afterwards, and what lies in the folder after one more save. Forked, because importing torch for each takes too long.
KILLED = """
import json, os, shutil, signal, sys
import torch
from functional_sd3 import weights
path, old, new = sys.argv[1:]
model = weights.load(new)
CHANGES = {"open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir"}

def die_at(count):
    left = [count]
    def hook(event, arguments):
        if event in CHANGES:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def loaded():
    leaves = weights.load(path).params["vae"]
    return [leaves["encoder"]["conv_in"]["bias"][0].item(), leaves["decoder"]["conv_out"]["bias"][0].item()]

def entries():
    return sorted(os.path.relpath(os.path.join(at, name), path) for at, _, names in os.walk(path) for name in names)

found, status = [], 1
while status:
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(old, path)
    child = os.fork()
    if child == 0:
        die_at(len(found))
        weights.save(path, model)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found.append([loaded()])
    weights.save(path, model)
    found[-1] += [loaded(), entries()]
print(json.dumps(found))
"""


def filled(make_model, value: float) -> Model:
    model = make_model(SMALL)
    return model._replace(params=tree.map(lambda leaf: torch.full_like(leaf, value), model.params))


def first(path) -> float:
    return weights.load(path).params["vae"]["encoder"]["conv_in"]["bias"][0].item()


def entries(folder) -> list[str]:
    return sorted(os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names)


WHOLE = ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


def test_a_save_killed_at_any_change_leaves_the_old_model_or_the_new_never_a_mixture(make_model, tmp_path):
    weights.save(tmp_path / "old", filled(make_model, 1.0))
    weights.save(tmp_path / "new", filled(make_model, 2.0))
    (tmp_path / "old" / "README.md").write_text("mine")
    script = [sys.executable, "-c", KILLED, *(str(tmp_path / name) for name in ("model", "old", "new"))]
    output = subprocess.run(script, capture_output=True, text=True, timeout=600, check=True)
    after_death, after_saving, left = zip(*json.loads(output.stdout), strict=True)
    committed = after_death.index([2.0, 2.0])
    assert committed > 10
    assert len(after_death) > committed + 10
    assert all(found == [1.0, 1.0] for found in after_death[:committed])
    assert all(found == [2.0, 2.0] for found in (*after_death[committed:], *after_saving))
    # Nothing that the dead left behind outlives the next save, and what was not of the model is still there.
    assert all(names == ["README.md", *WHOLE] for names in left)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_at_any_write_leaves_the_old_model(make_model, tmp_path, monkeypatch, code):
    old, new = filled(make_model, 1.0), filled(make_model, 2.0)
    weights.save(tmp_path / "model", old)
    said = []
    while not said or said[-1]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing_after(len(said), code))
            try:
                weights.save(tmp_path / "model", new)
                said.append("")
            except WeightsError as error:
                said.append(str(error))
        kept = "what was there still loads" in said[-1]
        assert first(tmp_path / "model") == (1.0 if kept else 2.0)
        if not kept:
            weights.save(tmp_path / "model", old)
    assert all(os.strerror(code).lower() in sentence for sentence in said[:-1])
    assert sum("what was there still loads" in sentence for sentence in said) > 3
    assert sum("is saved in .saved and loads" in sentence for sentence in said) > 1
    assert entries(tmp_path / "model") == WHOLE


def failing_after(count: int, code: int):
    left, fsync = [count], os.fsync

    def write(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    return write


def test_a_failed_save_to_a_new_place_leaves_nothing(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing_after(2, errno.ENOSPC))
    with pytest.raises(WeightsError, match="no space left on device"):
        weights.save(tmp_path / "new", filled(make_model, 1.0))
    assert os.listdir(tmp_path) == []


def test_an_interrupt_while_saving_leaves_the_old_model_and_no_litter(make_model, tmp_path, monkeypatch):
    weights.save(tmp_path / "model", filled(make_model, 1.0))

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.save(tmp_path / "model", filled(make_model, 2.0))
    assert first(tmp_path / "model") == 1.0
    assert entries(tmp_path / "model") == WHOLE


def test_a_save_removes_what_was_of_the_old_model_and_keeps_what_was_not(make_model, tmp_path):
    folder = tmp_path / "model"
    weights.save(folder, make_model())
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "7.safetensors").write_bytes(b"mine")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of the old model")
    weights.save(folder, filled(make_model, 2.0))
    assert entries(folder) == ["checkpoints/7.safetensors", *WHOLE]


def test_a_folder_may_be_saved_over_itself_while_its_files_are_mapped(make_model, same, tmp_path):
    model = make_model()
    weights.save(tmp_path / "model", model)
    weights.save(tmp_path / "model", weights.load(tmp_path / "model"))
    assert same(weights.load(tmp_path / "model").params, model.params)


def test_the_working_directory_can_be_saved_into(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights.save(".", filled(make_model, 1.0))
    weights.save(".", filled(make_model, 2.0))
    assert first(".") == 2.0
    assert entries(tmp_path) == WHOLE


def test_a_file_in_the_way_of_a_folder_stays(make_model, tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(WeightsError, match="cannot be written"):
        weights.save(tmp_path / "model", filled(make_model, 1.0))
    assert (tmp_path / "model").read_text() == "a file"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(make_model, tmp_path, fails):
    weights.save(tmp_path / "model", filled(make_model, 1.0))
    seen = []

    def read(folder):
        seen.append(first(tmp_path / "model"))
        if len(seen) == 1:
            weights.save(tmp_path / "model", filled(make_model, 2.0))
            if fails:
                raise WeightsError("a file has gone")
        return seen[-1]

    assert atomic.read_stable(tmp_path / "model", read, diffusers_folder.OWNED) == 2.0
    assert seen == [1.0, 2.0]


def test_a_reader_never_sees_two_models_at_once(make_model, tmp_path):
    models = [filled(make_model, float(value)) for value in range(2)]
    weights.save(tmp_path / "model", models[0])
    stop = threading.Event()

    def rewrite():
        while not stop.is_set():
            for model in models:
                weights.save(tmp_path / "model", model)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(40):
            try:
                leaves = weights.load(tmp_path / "model").params["vae"]
            except WeightsError as error:
                assert "was replaced each of the" in str(error)
                continue
            assert leaves["encoder"]["conv_in"]["bias"][0] == leaves["decoder"]["conv_out"]["bias"][0]
    finally:
        stop.set()
        writer.join()


def test_what_a_living_process_is_writing_is_not_swept_away(tmp_path):
    living = tmp_path / atomic._temporary(tmp_path, "x").name
    living.write_bytes(b"half")
    dead = tmp_path / living.name.replace(f"-{os.getpid()}-", "-999999999-")
    dead.write_bytes(b"half")
    files.write_atomic(tmp_path / "x", b"whole")
    assert sorted(os.listdir(tmp_path)) == sorted([living.name, "x"])


@pytest.mark.parametrize("link", [False, True])
def test_a_saved_folder_that_no_save_put_there_is_never_loaded(make_model, same, tmp_path, link):
    folder, other = tmp_path / "model", tmp_path / "other"
    weights.save(folder, make_model(seed=1))
    weights.save(other, make_model(seed=2))
    if link:
        (folder / atomic._SAVED).symlink_to(other)
    else:
        shutil.copytree(other, folder / atomic._SAVED)
    assert same(weights.load(folder).params, make_model(seed=1).params)
    with pytest.raises(WeightsError, match=r"\.saved: is in the way and was not written by a save here"):
        weights.save(folder, make_model(seed=3))
    assert same(weights.load(folder).params, make_model(seed=1).params)
    assert (folder / atomic._SAVED / "vae").is_dir()


def test_an_interrupted_save_counts_where_it_was_begun_and_in_no_copy(make_model, same, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    weights.save(folder, make_model(seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_install", lambda path, owned: (_ for _ in ()).throw(OSError(5, "killed")))
        with pytest.raises(WeightsError, match="is saved in .saved and loads"):
            weights.save(folder, make_model(seed=2))
    assert same(weights.load(folder).params, make_model(seed=2).params)
    shutil.copytree(folder, tmp_path / "copy")
    assert same(weights.load(tmp_path / "copy").params, make_model(seed=1).params)
    weights.save(folder, make_model(seed=3))
    assert same(weights.load(folder).params, make_model(seed=3).params)
    assert not (folder / atomic._SAVED).exists() and not (folder / atomic._PROOF).exists()


def test_a_replaced_file_keeps_its_mode_and_a_link_is_written_through(tmp_path):
    path, link = tmp_path / "a.bin", tmp_path / "link.bin"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    files.write_atomic(link, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    files.write_atomic(tmp_path / "dangling", b"x")
    assert (tmp_path / "later").read_bytes() == b"x" and (tmp_path / "dangling").is_symlink()


def test_devices_pipes_folders_and_circles_are_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "null").symlink_to("/dev/null")
    for name, kind in {"pipe": "named pipe", "folder": "folder", "circle": "link", "null": "device"}.items():
        with pytest.raises(WeightsError, match=f"cannot be written: is a {kind}"):
            files.write_atomic(tmp_path / name, b"x")
    assert sorted(os.listdir(tmp_path)) == ["circle", "folder", "null", "pipe"]
