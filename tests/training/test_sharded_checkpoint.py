"""Checkpoints that several processes write: read on any mesh to the bit, complete or absent, whatever is killed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from functional_sd3.core import prng, tree
from functional_sd3.formats import files
from functional_sd3.parallel import mesh, pieces
from functional_sd3.parallel.placement import Placement
from functional_sd3.parallel.processes import Processes
from functional_sd3.parallel.tensor import Cut
from functional_sd3.training import checkpoint, loop, manifest, sharded, step
from functional_sd3.weights import WeightsError
from tests.processes import ProcessError
from tests.training import interrupted

WHOLE = {"qkv": (12, 4), "out": (4, 8), "bias": (3,)}


def state_of(number):
    """A whole state, which differs from those of other steps in every float."""
    key = prng.fold_in(prng.key(7), number)
    part = lambda index: {name: prng.normal(prng.fold_in(key, index), shape) for name, shape in WHOLE.items()}  # noqa: E731
    moments = {"mean": part(1), "count": torch.tensor(number)}
    return step.TrainState(part(0), [moments], tree.cast(part(2), torch.bfloat16), torch.tensor(number), prng.key(3))


def placed(grid):
    """Placements of its leaves: three fused matrices, and what cannot be divided."""
    cut = grid.size("tensor") > 1
    dim = 0 if grid.size("fsdp") > 1 else None
    leaves = {
        "qkv": Placement((6, 4), dim, Cut(0, 3)) if cut else Placement((12, 4), dim),
        "out": Placement((4, 8), None if dim is None else 1),
        "bias": Placement((3,)),
    }
    by_path = lambda path, leaf: leaves.get(path.split(".")[-1], Placement(tuple(leaf.shape)))  # noqa: E731
    return tree.map_with_path(by_path, state_of(0))


def part_of(state, grid, placements):
    return tree.map(lambda leaf, at: pieces.cut(leaf, pieces.piece(at, grid)), state, placements)


def opened(sizes):
    grid = mesh.init(sizes)
    return Processes(grid), placed(grid)


def write(sizes, folder, *numbers):
    team, placements = opened(sizes)
    for number in numbers:
        own = part_of(state_of(number), team.mesh, placements)
        checkpoint.save(folder, number, own, {"lr": 0.1}, placements=placements, processes=team)


def read(sizes, folder):
    """The step of the newest that can be read, whether each leaf is that of the whole, and what is passed over."""
    team, placements = opened(sizes)
    like = part_of(state_of(0), team.mesh, placements)
    resumed = checkpoint.load_newest(folder, like, lambda saved: None, placements=placements, processes=team)
    number = checkpoint.step_of(resumed.path)
    wanted = part_of(state_of(number), team.mesh, placements)
    return number, not tree.diff(resumed.state, wanted), [str(error) for _, error in resumed.passed_over]


MESHES = [(2, {"fsdp": 2}), (4, {"data": 2, "fsdp": 2}), (4, {"tensor": 2, "fsdp": 2}), (2, {"data": 2}), (1, {})]


@pytest.fixture(scope="module")
def written(processes, tmp_path_factory):
    """Mesh -> a folder that it has written checkpoints to."""
    folders = []
    for count, sizes in MESHES:
        folders.append(tmp_path_factory.mktemp("written"))
        if count == 1:
            write(sizes, folders[-1], 5)
        else:
            processes(count, write, sizes, folders[-1], 5)
    return folders


def test_a_checkpoint_is_read_on_every_other_mesh_to_the_bit(processes, written):
    for count, sizes in MESHES:
        for folder in written:
            results = [read(sizes, folder)] if count == 1 else processes(count, read, sizes, folder)
            assert results == [(5, True, [])] * count


def test_each_process_writes_its_own_and_what_all_have_is_written_once(written):
    for (count, _), folder in zip(MESHES[:-1], written, strict=False):
        (path,) = checkpoint.paths(folder)
        described = manifest.read(path)
        sizes = [(path / file.name).stat().st_size for file in described.files]
        assert path.name == "step-00000005" and len(sizes) == count
        assert sorted(os.listdir(path)) == sorted([manifest.NAME, *(file.name for file in described.files)])
        held = [name for file in described.files for name in files.read_header(path / file.name).tensors]
        assert held.count("params.bias") == 1 == held.count("step")
        assert sum(
            entry.end - entry.start
            for file in described.files
            for entry in files.read_header(path / file.name).tensors.values()
        ) == tree.nbytes(state_of(0))


def test_the_whole_average_is_put_together_from_the_files(written):
    for folder in written:
        (path,) = checkpoint.paths(folder)
        whole = checkpoint.whole(path, "ema", state_of(0).ema, lambda name, leaf: leaf.float())
        assert not tree.diff(whole, tree.cast(state_of(5).ema, torch.float32))
        assert checkpoint.paths(folder) == [path] and not list(folder.glob(".*"))


def flipped(path):
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def changed(**fields):
    def damage(path):
        content = json.loads((path / manifest.NAME).read_text())
        (path / manifest.NAME).write_text(json.dumps({**content, **fields}))

    return damage


def shard(path, number=1):
    return path / manifest.read(path).files[number].name


def of_another(path):
    """The file of another checkpoint under the name of one of this, and of its size."""
    os.replace(shard(path.with_name("step-00000005")), shard(path))


def without_rows(path):
    content = json.loads((path / manifest.NAME).read_text())
    content["leaves"]["params.qkv"]["pieces"].pop()
    (path / manifest.NAME).write_text(json.dumps(content))


DAMAGES = {
    "is missing, and manifest.json names it": lambda path: shard(path).unlink(),
    "bytes, not the": lambda path: os.truncate(shard(path), shard(path).stat().st_size - 10),
    "belongs to another checkpoint": of_another,
    "its digest is another": lambda path: flipped(shard(path)),
    "params.qkv lacks 24 of 48 values": without_rows,
    "manifest.json: is no JSON that can be read": lambda path: (path / manifest.NAME).write_text("{"),
    "it is later than 1": changed(version=2),
    "must be the name of a file beside": changed(files=[{"name": "../x", "bytes": 1, "sha256": ""}]),
    "a newer one wrote it": changed(layout=99),
    "has no settings": changed(settings=None),
    "holds the state of step 10": lambda path: path.rename(path.with_name("step-00000099")),
}


@pytest.fixture(scope="module")
def two(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    processes(2, write, {"fsdp": 2}, folder, 5, 10)
    return folder


@pytest.mark.parametrize("sentence", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(two, tmp_path, sentence):
    folder = shutil.copytree(two, tmp_path / "copy")
    if sentence.startswith("belongs"):
        shutil.copytree(folder / "step-00000005", folder / "step-00000001")
    DAMAGES[sentence](folder / "step-00000010")
    if sentence.startswith("belongs"):
        shutil.rmtree(folder / "step-00000005")
        os.rename(folder / "step-00000001", folder / "step-00000005")
    number, is_equal, (error,) = read({}, folder)
    assert (number, is_equal) == (5, True) and sentence in error and "step-000000" in error
    newest = checkpoint.paths(folder)[-1]
    assert checkpoint.set_aside(newest).is_dir() and len(checkpoint.paths(folder)) == 1


def failing(sizes, folder):
    try:
        return read(sizes, folder)
    except ValueError as error:
        return type(error).__name__, str(error)


def test_a_damage_that_one_process_meets_is_the_same_for_all(processes, two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "copy")
    # Digests are divided: the second process alone reads the second file for it.
    flipped(shard(folder / "step-00000010"))
    results = processes(2, read, {"fsdp": 2}, folder)
    assert results[0] == results[1] and results[0][:2] == (5, True) and "its digest" in results[0][2][0]
    shard(folder / "step-00000005").unlink()
    (first, sentence), (second, _) = processes(2, failing, {"fsdp": 2}, folder)
    assert (first, second) == ("WeightsError", "ElsewhereError")
    assert "step-00000010" in sentence and "step-00000005" in sentence and "is missing" in sentence


def full_disk(folder, number):
    """The second process has no room."""
    team, placements = opened({"fsdp": 2})
    own = part_of(state_of(number), team.mesh, placements)
    write_atomic = files.write_atomic

    def refuse(path, *args, **kwargs):
        raise WeightsError(f"{path}: no room") from OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if not team.is_first:
            patch.setattr(files, "write_atomic", refuse)
        try:
            checkpoint.save(folder, number, own, {}, placements=placements, processes=team)
        except WeightsError as error:
            assert files.write_atomic is (write_atomic if team.is_first else refuse)
            return str(error), error.__cause__.errno
    return None


def test_a_disk_that_one_process_finds_full_is_said_on_all_and_nothing_is_left(processes, two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "copy")
    before = sorted(folder.rglob("*"))
    # Also in place of a checkpoint that is there.
    for number in (15, 10):
        first, second = processes(2, full_disk, folder, number)
        assert first == second and "process-00001-of-00002" in first[0] and first[1] == 28
        assert sorted(folder.rglob("*")) == before
    assert read({}, folder)[:2] == (10, True)


def run(out, moment=None, victim=0):
    """The run of `interrupted` on two processes, killed in one of them while the checkpoint of step 10 is written."""
    grid = mesh.init({"data": 2})
    state, _, batch = interrupted.setting()
    rate = step.optim.warmup_cosine(1e-2, 3, interrupted.STEPS)
    optimizer = step.optim.chain(step.optim.clip_by_global_norm(1.0), step.optim.adamw(rate))
    train_step = step.make_train_step(interrupted.loss, optimizer, rate=rate, ema_decay=0.9, mesh=grid)
    replace, remove = os.replace, sharded.remove

    def kill_at(place):
        if place == moment and grid.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed_replace(source, target):
        target = Path(target)
        if target.parent.name == "step-00000010":
            kill_at("manifest" if target.name == manifest.NAME else "file")
        replace(source, target)
        if target.parent.name == "step-00000010":
            kill_at("written" if target.name != manifest.NAME else "published")

    def killed_remove(folder):
        (folder / manifest.NAME).unlink()
        kill_at("pruned")
        remove(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", killed_replace)
        patch.setattr(sharded, "remove", killed_remove)
        options = {"steps": 15, "save_every": 5, "log_every": 5, "progress": False, "keep": 2}
        loop.run(state, train_step, batch, out=out, processes=Processes(grid), **options)


def alone(out, steps, notes):
    state, _, batch = interrupted.setting()
    paths = checkpoint.paths(out / "checkpoints")
    state = checkpoint.load(paths[-1], state) if paths else state
    rate = step.optim.warmup_cosine(1e-2, 3, interrupted.STEPS)
    optimizer = step.optim.chain(step.optim.clip_by_global_norm(1.0), step.optim.adamw(rate))
    train_step = step.make_train_step(interrupted.loss, optimizer, rate=rate, ema_decay=0.9, accumulate=2)
    options = {"save_every": 5, "log_every": 5, "progress": False, "keep": 2, "note": notes.append}
    return loop.run(state, train_step, batch, steps=steps, out=out, **options).state


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return alone(tmp_path_factory.mktemp("undisturbed"), 15, [])


MOMENTS = {
    ("file", 1): (5, [10]),
    ("written", 1): (5, [10]),
    ("manifest", 0): (5, [10]),
    ("published", 0): (10, []),
    ("pruned", 0): (15, [5]),
}
"""Where which process is killed: the step of the newest checkpoint, and steps of which something else is left."""


@pytest.mark.parametrize(("moment", "victim"), MOMENTS)
def test_whichever_process_is_killed_while_a_checkpoint_is_written_nothing_is_lost(
    processes, undisturbed, tmp_path, moment, victim
):
    with pytest.raises(ProcessError):
        processes(2, run, tmp_path, moment, victim)
    newest, left = MOMENTS[moment, victim]
    assert checkpoint.step_of(checkpoint.paths(tmp_path / "checkpoints")[-1]) == newest
    notes = []
    # One process goes on with what two began: the batch is added up from the same parts.
    assert not tree.diff(alone(tmp_path, 15, notes), undisturbed)
    swept = [f"the write of the checkpoint of step {number} was broken off" for number in left]
    assert len(notes) == len(swept) and all(each in note for each, note in zip(swept, notes, strict=True))
    assert all(checkpoint.settings(path) == {} for path in checkpoint.paths(tmp_path / "checkpoints"))
