"""Caches of encoded training sets, and training from them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from functional_sd3 import cli, weights
from functional_sd3.cli import cache as command_module
from functional_sd3.cli import cache_run, view_options
from functional_sd3.core import prng, tree
from functional_sd3.formats import files
from functional_sd3.image import pixels
from functional_sd3.recipes import shapes
from functional_sd3.training import cache, checkpoint, flow_task, training_set
from functional_sd3.training.buckets import Buckets
from functional_sd3.training.views import Views
from functional_sd3.weights import WeightsError

# The model here has no CLIP-G, which is noted whenever prompts are encoded.
pytestmark = pytest.mark.filterwarnings("ignore:the text encoder CLIP-G is missing")
COUNT = 20
"""Images: a shard of 16, and the rest."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of captioned images, some captions twice."""
    folder = tmp_path_factory.mktemp("images")
    drawn, captions = shapes.images(prng.key(5), COUNT)
    for index, image in enumerate(pixels.to_pil(pixels.from_bytes(drawn))):
        image.resize((24, 24)).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(captions[index % 18], encoding="utf-8")
    return folder


def make(model_folder, images, out, *words):
    """`functional-sd3 cache`; answers its exit status."""
    import argparse

    parser = argparse.ArgumentParser()
    command_module.add_arguments(parser)
    base = ["--params", model_folder, "--data", images, "--out", out, "--shard", 16]
    return cache_run.run(parser.parse_args([str(word) for word in (*base, *words)]))


@pytest.fixture(scope="module")
def made(model_folder, images, tmp_path_factory):
    """A cache of the images; to be read only."""
    out = tmp_path_factory.mktemp("caches") / "cache"
    assert make(model_folder, images, out) == 0
    return out


def last_state(out):
    return checkpoint.paths(out / "checkpoints")[-1].read_bytes()


def train(command, out, data, *words):
    return command("--out", out, "--data", data, *words)


def test_a_cache_has_shards_of_latents_and_of_each_distinct_caption(made):
    manifest = cache.read_manifest(made)
    assert (manifest.images, manifest.texts, manifest.rows, manifest.views) == (COUNT, 19, 16, 1)
    assert set(manifest.model) == {"clip_l", "t5", "vae"}
    names = ["cache.json", *(f"{kind}-0000{n}.safetensors" for kind in ("latents", "text") for n in (0, 1))]
    assert sorted(os.listdir(made)) == names
    held = cache.open_cache(made)
    assert held.captions.tolist() == [1 + index % 18 for index in range(COUNT)]
    texts = cache.texts(held)
    assert texts[0] == "" and len(set(texts)) == 19


@pytest.mark.parametrize("options", [[], ["--lora", 2], ["--dtype", "bfloat16"], ["--text-encoders", "train"]])
def test_training_from_a_cache_gives_the_same_bits(command, made, images, tmp_path, options):
    assert train(command, tmp_path / "images", images, *options)[0] == 0
    assert train(command, tmp_path / "cache", made, *options)[0] == 0
    one, other = (checkpoint.paths(tmp_path / name / "checkpoints")[-1] for name in ("images", "cache"))
    tensors = [
        {name: files.tensor(file, name) for name in file.header.tensors}
        for file in map(files.open_mapped, (one, other))
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_training_from_a_cache_reads_neither_encoders_nor_the_encoder_of_the_vae(
    command, model_folder, made, images, tmp_path, monkeypatch
):
    read = []
    original = weights.load

    def spy(path, **options):
        read.append(options.get("only"))
        return original(path, **options)

    def refuse(*_, **__):
        raise AssertionError("encoded again")

    monkeypatch.setattr(flow_task.conditioning, "encode", refuse)
    monkeypatch.setattr("functional_sd3.image.vae.encode", refuse)
    monkeypatch.setattr("functional_sd3.cli.train_model.weights.load", spy)
    seen = []
    task = flow_task.flow_task
    monkeypatch.setattr(
        flow_task,
        "flow_task",
        lambda key, model, *rest, **more: seen.append(model) or task(key, model, *rest, **more),
    )
    sampled = tmp_path / "sampled"
    assert train(command, sampled, made, "--sample-every", 6)[0] == 0
    assert set(seen[0].params) == {"transformer", "vae"} and set(seen[0].params["vae"]) == {"decoder"}
    # The others are read when the result is written, which is the whole model.
    assert read == [["transformer", "vae"], ["clip_l", "t5"]]
    result = weights.load(sampled, dtype="stored")
    assert set(result.params) == {"transformer", "vae", "clip_l", "t5"}
    assert not tree.diff(result.params["t5"], original(model_folder, dtype="stored").params["t5"])
    monkeypatch.undo()
    # The samples are those of a run that encodes their prompts.
    assert train(command, tmp_path / "images", images, "--sample-every", 6)[0] == 0
    name = "samples/00000006.png"
    assert (sampled / name).read_bytes() == (tmp_path / "images" / name).read_bytes()


def test_a_model_without_encoders_and_vae_trains_from_a_cache(command, model_folder, made, tmp_path):
    weights.save(tmp_path / "bare", weights.load(model_folder, dtype="stored", only=["transformer"]))
    assert train(command, tmp_path / "out", made, "--params", tmp_path / "bare")[0] == 0
    assert set(weights.load(tmp_path / "out").params) == {"transformer"}
    with pytest.raises(ValueError, match="has no vae"):
        train(command, tmp_path / "other", made, "--params", tmp_path / "bare", "--sample-every", 3)


def test_a_run_goes_on_from_the_cache_of_its_images_and_back(command, made, images, tmp_path):
    constant = ["--schedule", "constant"]
    assert train(command, tmp_path / "whole", images, *constant)[0] == 0
    assert train(command, tmp_path / "cut", images, *constant, "--steps", 2)[0] == 0
    assert "resuming at step 2 of 4" in train(command, tmp_path / "cut", made, *constant, "--steps", 4, "--resume")[1]
    assert "resuming at step 4 of 6" in train(command, tmp_path / "cut", images, *constant, "--resume")[1]
    assert not tree.diff(*(weights.load(tmp_path / name).params["transformer"] for name in ("whole", "cut")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_text_of_16_bits_takes_half_of_the_room_and_changes_little(
    command, model_folder, made, images, tmp_path, dtype
):
    assert make(model_folder, images, tmp_path / "half", "--text-dtype", dtype) == 0
    one, other = (cache.text(cache.open_cache(folder)) for folder in (made, tmp_path / "half"))
    rows = torch.arange(COUNT)
    for name, part in one.fetch(rows).items():
        half = other.fetch(rows)[name]
        assert half.dtype == getattr(torch, dtype) and half.nbytes * 2 == part.nbytes
        assert (half.float() - part).norm() <= part.norm() * torch.finfo(half.dtype).eps / 2
    assert train(command, tmp_path / "out", tmp_path / "half", "--sample-every", 6)[0] == 0
    with pytest.raises(ValueError, match="the contents of the data changed"):
        train(command, tmp_path / "out", made, "--steps", 8, "--resume")


def test_a_cache_that_was_interrupted_is_made_further(model_folder, made, images, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    write, written = cache.write_latents, []

    def interrupted(folder, manifest, number, *rest):
        if number:
            os.kill(os.getpid(), signal.SIGTERM)
        write(folder, manifest, number, *rest)

    monkeypatch.setattr(cache, "write_latents", interrupted)
    assert make(model_folder, images, out) == 130
    monkeypatch.undo()
    kept = {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)}
    assert sorted(kept) == [
        "cache.json",
        *(f"{kind}.safetensors" for kind in ("latents-00000", "text-00000", "text-00001")),
    ]
    (out / ".latents-00001.safetensors.left.partial").write_bytes(b"half")
    assert make(model_folder, images, out) == 0
    assert all((out / name).stat().st_mtime_ns == time for name, time in kept.items())
    for name in os.listdir(made):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    # Once more: nothing is left to do, and no component is read.
    monkeypatch.setattr(cache_run.train_model, "read", lambda *_: written.append(1))
    assert make(model_folder, images, out) == 0 and not written


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copied")


def exchange(folder):
    shutil.copy(folder / "text-00001.safetensors", folder / "text-00000.safetensors")


def damage_manifest(folder):
    table = json.loads((folder / cache.MANIFEST).read_text())
    (folder / cache.MANIFEST).write_text(json.dumps({**table, "images": "many"}))


def claim(folder):
    """A manifest of more shards than could be listed."""
    table = json.loads((folder / cache.MANIFEST).read_text())
    (folder / cache.MANIFEST).write_text(json.dumps({**table, "images": 2**39}))


def exchange_captions(folder):
    path = folder / "latents-00000.safetensors"
    held = files.open_mapped(path)
    tensors = {name: files.tensor(held, name).clone() for name in held.header.tensors}
    tensors["captions"] = tensors["captions"].flip(0)
    files.write_atomic(path, tensors, metadata=held.header.metadata)


def flip(path, place=-5):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "latents-00001.safetensors").unlink(), "latents-00001.safetensors: is missing"),
        (lambda folder: os.truncate(folder / "text-00000.safetensors", 5000), "text-00000.safetensors: is truncated"),
        (exchange, "text-00000.*lacks"),
        (damage_manifest, "cache.json: images is 'many', not a number"),
        (claim, "has 4 of the 34,359,738,370 shards that cache.json says"),
        (exchange_captions, "latents-00000.*is damaged"),
        (lambda folder: flip(folder / "latents-00000.safetensors"), r"latents-00000.*row \d+ \('..\.png'\) is damaged"),
        (lambda folder: flip(folder / "text-00000.safetensors"), r"text-00000.*row \d+ \('.*'\) is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_cache_is_refused_by_the_name_of_its_file(command, copied, tmp_path, damage, said):
    damage(copied)
    with pytest.raises(WeightsError, match=said):
        train(command, tmp_path / "out", copied)


def test_a_shard_given_as_a_model_is_said_to_be_one(made):
    with pytest.raises(WeightsError, match="text-00000.safetensors: is a shard of a training set that `cache` encoded"):
        weights.load(made / "text-00000.safetensors")


def test_a_damaged_shard_is_written_again(model_folder, made, images, copied):
    os.truncate(copied / "latents-00000.safetensors", 4000)
    (copied / "text-00001.safetensors").unlink()
    assert make(model_folder, images, copied) == 0
    assert all((copied / name).read_bytes() == (made / name).read_bytes() for name in os.listdir(made))


def test_a_cache_of_another_model_is_refused(command, model_folder, made, tmp_path):
    model = weights.load(model_folder, dtype="stored")
    path = max(path for path, leaf in tree.flatten_paths(model.params["t5"]).items() if leaf.ndim == 2)
    changed = tree.map_with_path(lambda at, leaf: leaf * 1.5 if at == path else leaf, model.params["t5"])
    weights.save(tmp_path / "other", model._replace(params={**model.params, "t5": changed}))
    with pytest.raises(
        WeightsError, match="was made by another model: its t5 differ from those of .*other; make a cache"
    ):
        train(command, tmp_path / "out", made, "--params", tmp_path / "other")


def test_a_cache_of_other_images_or_options_is_not_written_over(model_folder, made, images, copied, tmp_path):
    shutil.copytree(images, tmp_path / "fewer", ignore=lambda *_: ["00.png"])
    before = {name: (copied / name).read_bytes() for name in os.listdir(copied)}
    for words, said in (
        ([tmp_path / "fewer"], "holds a cache of other images or captions: name a new folder"),
        ([images, "--text-dtype", "bfloat16"], r"of other options \(text-dtype None, now bfloat16\): name"),
    ):
        with pytest.raises(WeightsError, match=said):
            make(model_folder, words[0], copied, *words[1:])
    assert {name: (copied / name).read_bytes() for name in os.listdir(copied)} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--part", "vae"], "is a cache of latents, and --part vae learns from images"),
        (["--caption", "x"], "--caption is for images"),
        (["--template", "a {}"], "--template is for images"),
        (["--crops", "2"], "--buckets, --crops and --flips are for images"),
        (["--prior-images", "2", "--prior-prompt", "a ring"], "--prior-images is for images"),
        (["--inversion", "<x>", "--initial-word", "ring"], "--inversion is for images"),
        (["--validation", "."], "--validation .: of a cache give a number"),
        (["--size", "8"], "--size 8: --data .* is a cache of images of 16 x 16 pixels"),
    ],
)
def test_options_that_a_cache_has_no_use_for_are_refused(command, made, tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        train(command, tmp_path / "out", made, *words)


def test_a_cache_is_no_place_for_other_things(model_folder, made, images, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds notes.txt and no cache"):
        make(model_folder, images, tmp_path / "full")
    with pytest.raises(ValueError, match="is a cache already"):
        make(model_folder, made, tmp_path / "out")
    with pytest.raises(ValueError, match="--shard 10 must be a multiple of 16"):
        make(model_folder, images, tmp_path / "out", "--shard", 10)


def test_crops_and_mirror_images_are_views_of_each_image(model_folder, made, images, tmp_path, capsys):
    wide = shutil.copytree(images, tmp_path / "wide")
    for path in wide.glob("*.png"):
        Image.open(path).resize((48, 24)).save(path)
    assert make(model_folder, wide, tmp_path / "views", "--crops", 2, "--flips") == 0
    assert f"4 views of each: {4 * COUNT} latents, 0.0 MiB" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"999,999 views of \d+ images, whose latents need .*give fewer --crops"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
            make(model_folder, wide, tmp_path / "more" / "views", "--crops", 999_999)
    assert not (tmp_path / "more").exists()
    latents = cache.latents(cache.open_cache(tmp_path / "views"))
    assert latents.views == 4
    plan = Views(Buckets(((16, 16),), (0,) * COUNT), crops=2, flips=True)
    assert latents.fetch(torch.arange(4 * COUNT)).nbytes == view_options.nbytes(plan, weights.load(model_folder).config)
    views = latents.fetch(torch.arange(8)).unflatten(0, (2, 4))
    assert all(not torch.equal(views[:, one], views[:, other]) for one in range(4) for other in range(one))
    order = training_set.sample_order(training_set.TrainingSet(latents, None), prng.key(0), 4)
    seen = torch.cat([order(step) for step in range(COUNT)])
    # Four epochs: every view of every image once.
    assert sorted(seen.tolist()) == list(range(4 * COUNT))


def test_samples_of_a_step_are_stacked_from_their_shards(made):
    held = cache.open_cache(made)
    data = training_set.TrainingSet(cache.latents(held), cache.text(held))
    batch = training_set.batch_of(data, torch.tensor([0, 17, 19]))
    assert batch["latents"].shape == (3, 16, 2, 2) and batch["context"].shape == (3, 32, 32)
    file = files.open_mapped(made / "latents-00001.safetensors")
    assert torch.equal(batch["latents"][1], files.tensor(file, "17")[0])
    text = files.open_mapped(made / "text-00001.safetensors")
    assert torch.equal(batch["context"][1], files.tensor(text, "context")[18 - 16])
    assert torch.equal(
        batch["pooled"][2], files.tensor(files.open_mapped(made / "text-00000.safetensors"), "pooled")[2]
    )


def test_the_command_says_what_it_wrote(model_folder, images, tmp_path, capsys):
    words = ["cache", "--params", model_folder, "--data", images, "--out", tmp_path / "cache", "--shard", 16]
    assert cli.main([str(word) for word in words]) == 0
    said = capsys.readouterr()
    assert (
        "20 images, 18 captions" in said.out
        and f"functional-sd3 train --data {tmp_path / 'cache'} reads it" in said.out
    )


KILLED = """
import os, sys, signal
from functional_sd3.cli import main
from functional_sd3.formats import files
write, done = files.write, []

def write_and_die(path, tensors, **options):
    write(path, tensors, **options)
    done.append(path)
    if len(done) == 3:
        # The third shard is on the disk and has not been given its name.
        os.kill(os.getpid(), signal.SIGKILL)

files.write = write_and_die
main(sys.argv[1:])
"""


def test_a_cache_that_was_killed_is_made_further(model_folder, made, images, tmp_path):
    out = tmp_path / "cache"
    words = ["cache", "--params", model_folder, "--data", images, "--out", out, "--shard", 16]
    script = [sys.executable, "-c", KILLED, *map(str, words)]
    assert subprocess.run(script, capture_output=True, timeout=200).returncode == -signal.SIGKILL
    whole = sorted(name for name in os.listdir(out) if not name.startswith("."))
    assert whole == ["cache.json", "text-00000.safetensors", "text-00001.safetensors"]
    assert make(model_folder, images, out) == 0
    # Nothing is left of the one that was cut short.
    assert sorted(os.listdir(out)) == sorted(os.listdir(made))
    assert all((out / name).read_bytes() == (made / name).read_bytes() for name in os.listdir(made))
