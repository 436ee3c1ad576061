"""Training on images in several sizes and views, with a cache and without."""

import argparse
import contextlib
import functools
import io
import os
from collections import Counter

import pytest
import torch
from PIL import Image

from functional_sd3.cli import cache as cache_command
from functional_sd3.cli import cache_run, train_data, train_setup
from functional_sd3.core import prng, tree
from functional_sd3.formats import files
from functional_sd3.image import cuts
from functional_sd3.training import buckets, cache, checkpoint, views
from functional_sd3.transformer import embeddings

# The model here has no CLIP-G, which is noted whenever prompts are encoded.
pytestmark = pytest.mark.filterwarnings("ignore:the text encoder CLIP-G is missing")
BUCKETS = ["--buckets", "16", "--bucket-step", "8"]
SHAPES = [(32, 16)] * 5 + [(40, 40)] * 7 + [(18, 30)] * 4 + [(60, 16)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images in three aspect ratios, and one that is wider than any bucket."""
    folder = tmp_path_factory.mktemp("mixed")
    for index, size in enumerate(SHAPES):
        noise = prng.randint(prng.fold_in(prng.key(0), index), (size[1], size[0], 3), 0, 256).to(torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text("a red ring" if index % 2 else "a blue star")
    return folder


def last_state(out):
    file = files.open_mapped(checkpoint.paths(out / "checkpoints")[-1])
    return {name: files.tensor(file, name) for name in file.header.tensors}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def batches(monkeypatch):
    """The shapes of the latents of the batches that runs take, in order."""
    taken = []
    task = train_setup.flow_task.flow_task

    def spy(*parts, **options):
        made = task(*parts, **options)

        def batch(step):
            taken.append(tuple(made.batch(step)["latents"].shape))
            return made.batch(step)

        return made._replace(batch=batch)

    monkeypatch.setattr(train_setup.flow_task, "flow_task", spy)
    return taken


def test_training_on_buckets_is_resumed_to_the_bit_and_the_same_from_a_cache(
    command, model_folder, images, tmp_path, batches
):
    constant = [*BUCKETS, "--schedule", "constant", "--data", images, "--sample-every", 3]
    status, said = command("--out", tmp_path / "whole", *constant)
    assert (
        status == 0 and "3 buckets" in said and "16 x 8 (2.00): 6 images" in said and "8 x 16 (0.50): 4 images" in said
    )
    # Batches of 4 images: each of one size, and every size among them.
    assert Counter(batches).keys() == {(4, 16, 1, 2), (4, 16, 2, 1), (4, 16, 2, 2)}
    assert command("--out", tmp_path / "cut", *constant, "--steps", 2)[0] == 0
    assert command("--out", tmp_path / "cut", *constant, "--resume")[0] == 0
    assert same(last_state(tmp_path / "whole"), last_state(tmp_path / "cut"))
    parser = argparse.ArgumentParser()
    cache_command.add_arguments(parser)
    words = ["--params", model_folder, "--data", images, "--out", tmp_path / "cache", *BUCKETS, "--bucket-min", 4]
    assert cache_run.run(parser.parse_args([str(word) for word in words])) == 0
    assert command("--out", tmp_path / "cached", "--data", tmp_path / "cache", "--schedule", "constant")[0] == 0
    assert same(last_state(tmp_path / "whole"), last_state(tmp_path / "cached"))
    with pytest.raises(ValueError, match="--batch-size 8 is more than the images of a bucket"):
        command("--out", tmp_path / "large", "--data", tmp_path / "cache", "--batch-size", 8)


def on_processes(words):
    """The exit status of `functional-sd3 train` in this process of several."""
    from functional_sd3 import cli

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        # As torchrun does.
        patch.setenv("LOCAL_RANK", os.environ["RANK"])
        return cli.main(["train", *map(str, words)]), said.getvalue()


@pytest.mark.parametrize("cached", [False, True])
def test_two_processes_take_the_batches_of_one(command, processes, model_folder, images, tmp_path, cached):
    data, sized = images, [*BUCKETS, "--flips"]
    if cached:
        parser = argparse.ArgumentParser()
        cache_command.add_arguments(parser)
        made = ["--params", model_folder, "--data", images, "--out", tmp_path / "cache", *sized, "--bucket-min", 4]
        assert cache_run.run(parser.parse_args([str(word) for word in made])) == 0
        data, sized = tmp_path / "cache", []
    words = ["--data", data, *sized, "--steps", 6, "--batch-size", 4, "--sample-every", 0, "--save-every", 6]
    assert command("--out", tmp_path / "one", *words, "--accumulate", 2)[0] == 0
    more = ["--params", model_folder, "--warmup", 2, "--lr", "1e-2", "--log-every", 2]
    results = processes(2, on_processes, [*words, *more, "--out", tmp_path / "two", "--mesh", "data=2"])
    assert [status for status, _ in results] == [0, 0], results[0][1]
    alone, like = last_state(tmp_path / "one"), {}
    for name, leaf in alone.items():
        *branches, last = name.split(".")
        functools.reduce(lambda node, branch: node.setdefault(branch, {}), branches, like)[last] = leaf
    # A file from each process.
    together = checkpoint.load(checkpoint.paths(tmp_path / "two" / "checkpoints")[-1], like)
    assert same(alone, tree.flatten_paths(together))


def test_images_of_buckets_smaller_than_a_batch_go_to_the_nearest(command, images, tmp_path, batches):
    status, said = command("--out", tmp_path / "out", *BUCKETS, "--data", images, "--batch-size", 5)
    assert status == 0 and "2 buckets" in said and "16 x 16 (1.00): 11 images" in said
    assert Counter(batches).keys() == {(5, 16, 1, 2), (5, 16, 2, 2)}


def test_crops_and_mirror_images_are_taken_in_turn(command, images, tmp_path):
    assert command("--out", tmp_path / "out", "--data", images, "--crops", 2, "--flips")[0] == 0
    held = cache.open_cache(tmp_path / "out" / "checkpoints" / train_data.VIEWS)
    assert held.manifest.views == 4
    stored = cache.latents(held).fetch(torch.arange(4))
    assert len({tuple(view.flatten().tolist()) for view in stored}) == 4
    # Encoded again where the options are others.
    status, said = command(
        "--out", tmp_path / "out", "--data", images, "--crops", 3, "--steps", 8, "--resume", "--force"
    )
    assert status == 0 and "the images are encoded again" in said


def test_the_first_view_is_the_middle_and_every_second_a_mirror_image():
    plan = views.Views(buckets.Buckets(((16, 8), (8, 8)), (1, 0)), crops=3, flips=True, seed=5)
    assert plan.count == 6
    assert views.cut(plan, 0, 0) == cuts.Cut(8, 8) and views.cut(plan, 1, 1) == cuts.Cut(16, 8, 0.5, True)
    offsets = {views.cut(plan, image, view).offset for image in (0, 1) for view in range(6)}
    assert len(offsets) == 5 and all(0 <= offset < 1 for offset in offsets)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--buckets", "big"], "--buckets big must be sides in pixels"),
        (["--buckets", "16", "--bucket-step", "12"], "--bucket-step 12 must be a multiple of 8"),
        (["--buckets", "64", "--bucket-step", "8"], "--buckets 64 must be a side from .* to the 16 pixels"),
        (["--bucket-ratio", "2"], "--bucket-ratio is for --buckets"),
        (["--buckets", "16", "--size", "16"], "give one of them"),
        (["--flips", "--part", "vae"], "belong to --part transformer"),
    ],
)
def test_options_that_make_no_sense_are_named(command, images, tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        command("--out", tmp_path / "out", "--data", images, *words)


def test_positions_are_the_middle_of_the_table_for_every_size():
    """So that the centre of an image has the same positions in every bucket."""
    size, width = 48, 8
    table = embeddings.position_table(width, size, 24)
    grid = table.reshape(size, size, width)
    params = {"patch": {"weight": torch.zeros(width, 4, 2, 2), "bias": torch.zeros(width)}, "position": table}
    for pixels in buckets.sizes(512, buckets.Options((512,)), 768):
        columns, rows = (side // 16 for side in pixels)
        tokens = embeddings.embed_image(params, 2, torch.zeros(1, 4, 2 * rows, 2 * columns))
        top, left = (size - rows) // 2, (size - columns) // 2
        assert torch.equal(tokens.reshape(rows, columns, width), grid[top : top + rows, left : left + columns])
