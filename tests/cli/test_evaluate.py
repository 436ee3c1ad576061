"""`evaluate` as a person meets it: scores, files, JSON, and a message of one line for whatever is wrong."""

import functools
import json
import shutil
import zipfile

import numpy
import pytest
import torch
from PIL import Image

from functional_sd3 import cli, weights
from functional_sd3.core import prng, tree
from functional_sd3.formats import files
from functional_sd3.layouts import rules
from functional_sd3.layouts.clip_dual import LAYOUT
from functional_sd3.metrics import inception
from functional_sd3.recipes import shapes
from functional_sd3.text import bpe, clip
from functional_sd3.text.clip import dual as clip_dual
from tests import models


def draw(folder, count, seed, *, low=0, side=24):
    generator = numpy.random.default_rng(seed)
    for index in range(count):
        path = folder / f"{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = generator.integers(low, 256, (side + index % 3, side, 3), dtype=numpy.uint8)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two sets of images, the first also under other names and as an archive, and weights of all kinds."""
    top = tmp_path_factory.mktemp("evaluate")
    real = draw(top / "real", 12, 0)
    draw(top / "fake", 10, 1, low=90)
    (top / "renamed").mkdir()
    with zipfile.ZipFile(top / "real.zip", "w") as archive:
        for index, path in enumerate(sorted(real.rglob("*.png"))):
            shutil.copy(path, top / "renamed" / f"{97 * (index + 1) % 13:02}.png")
            archive.write(path, f"inside/{index}.png")
    torch.save(tree.flatten_paths(models.random_inception()), top / "inception.pth")
    weights.save(top / "model", models.random_model())
    return top


@pytest.fixture(scope="module")
def read_once():
    """Inception's file, 95 MB, is read by the first command that takes it: `metrics/test_inception_file.py` reads."""
    return functools.cache(inception.load)


@pytest.fixture
def run(here, monkeypatch, capsys, read_once):
    """Runs `evaluate` among the images: exit status, standard output, standard error."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(inception, "load", read_once)

    def run(*words):
        status = cli.main(["evaluate", *map(str, words)])
        return status, *capsys.readouterr()

    return run


FID = ("--inception", "inception.pth", "--features", "64")


def value(run, *words) -> float:
    status, out, _ = run(*words, "--json", "-")
    assert status == 0
    return json.loads(out)["value"]


def test_different_sets_are_apart_and_everything_is_said_of_how(run):
    status, out, err = run("fid", "real", "fake", *FID)
    assert status == 0
    assert out.startswith("Frechet distance at tap 64 ") and "(N = 12 and 10), preprocessing clean, layer 64" in out
    assert "is not that of pt_inception" in err and "few for 64 dimensions" in err
    assert float(out.split()[5]) > 1e-2


@pytest.mark.parametrize(
    "other, options",
    [("real", ()), ("renamed", ("--batch-size", 5)), ("real.zip", ("--batch-size", 1)), ("real", ("--workers", 2))],
)
def test_the_same_images_give_0_in_any_order_any_batches_any_number_of_processes(run, other, options):
    assert value(run, "fid", "real", other, *FID, *options) == pytest.approx(0, abs=1e-3)


def test_the_full_network_gives_0_too(run, here):
    draw(here / "few", 4, 5)
    assert value(run, "fid", "few", "few", "--inception", "inception.pth", "--batch-size", 3) < 1e-3


def test_saved_statistics_take_the_place_of_images(run, here):
    expected = value(run, "fid", "real", "fake", *FID, "--mode", "tf1")
    status, out, err = run("fid", "real", *FID, "--mode", "tf1", "--save", "real.npz")
    assert status == 0 and out == "real.npz\n"
    assert value(run, "fid", "real.npz", "fake", "--inception", "inception.pth") == pytest.approx(expected, rel=1e-6)
    assert value(run, "fid", "real.npz", "real.npz") == pytest.approx(0, abs=1e-3)
    status, _, err = run("fid", "real.npz", "fake", *FID, "--mode", "clean")
    assert status == 1 and "do not compare: preprocessing 'tf1' and 'clean'" in err


def test_statistics_of_pytorch_fid_are_taken_with_what_they_do_not_say(run, here):
    run("fid", "real", *FID, "--mode", "pytorch_fid", "--save", "said.npz")
    with numpy.load(here / "said.npz") as said:
        numpy.savez(here / "theirs.npz", mu=said["mu"], sigma=said["sigma"])
    status, _, err = run("fid", "theirs.npz", "fake", *FID)
    assert status == 1 and "pass --count N --mode pytorch_fid" in err
    options = (*FID, "--mode", "pytorch_fid")
    expected = value(run, "fid", "real", "fake", *options)
    assert value(run, "fid", "theirs.npz", "fake", *options, "--count", 12) == pytest.approx(expected, rel=1e-6)
    assert "pass --mode too" in run("fid", "theirs.npz", "fake", *FID, "--count", 12)[2]


def test_kid_of_subsets_with_its_spread_and_its_features_kept(run):
    status, out, err = run("kid", "real", "fake", *FID, "--subsets", 20, "--subset-size", 8, "--save", "features.npz")
    assert status == 0 and "(20 subsets of 8, N = 12 and 10)" in out and "published KIDs are of subsets of 1000" in err
    words = ("--subsets", 20, "--subset-size", 8, "--json", "-")
    found = json.loads(run("kid", "features.npz", "fake", "--inception", "inception.pth", *words)[1])
    assert found["deviation"] > 0 and f"KID {found['value']:.6f} +- {found['deviation']:.6f}" in out
    # Features tell everything that statistics do.
    expected = value(run, "fid", "real", "fake", *FID)
    assert value(run, "fid", "features.npz", "fake", *FID) == pytest.approx(expected, rel=1e-6)
    run("fid", "real", *FID, "--save", "statistics.npz")
    assert "features cannot be had back" in run("kid", "statistics.npz", "fake", *FID)[2]


def test_broken_images_are_named_and_counted(run, here):
    mixed = draw(here / "mixed", 4, 3)
    (mixed / "torn.png").write_bytes(b"torn")
    status, out, err = run("fid", "mixed", "fake", *FID, "--json", "mixed.json")
    assert status == 0 and "1 of 5 images of mixed were skipped:\n  torn.png: not a readable image" in err
    told = json.loads((here / "mixed.json").read_text())["real"]
    assert told["pictures"] == 4 and told["skipped"][0]["path"] == "torn.png" and "Frechet" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (("fid", "real", "fake"), "SHA-256 6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
        (("kid", "real", "fake"), "https://github.com/mseitzer/pytorch-fid/releases"),
        (("fid", "real", "fake", "--inception", "absent.pth"), "absent.pth: cannot be opened"),
        (("fid", "real", "fake", "--inception", "real/0/0.png"), "is not a file of tensors"),
        (("fid", "real", *FID), "give FAKE too, or --save"),
        (("fid", "absent", "fake", *FID), "no such folder or zip archive: absent"),
        (("fid", "", "fake", *FID), "the path of the images is empty"),
        (("fid", "real", "empty", *FID), "empty holds no images"),
        (("fid", "real", "torn", *FID), "none of 2 images could be read; the first, a.png: not a readable image"),
        (("fid", "real", "nothing.zip", *FID), "nothing.zip holds no images"),
        (("fid", "real", "inception.pth", *FID), "inception.pth holds no images"),
        (("fid", "real", "torn.npz", *FID), "torn.npz: is not an .npz file of statistics"),
        (("fid", "real", "fake", *FID, "--batch-size", 0), "--batch-size 0 must be at least 1"),
        (("fid", "real", "fake", *FID, "--workers", -1), "--workers -1 must be 0 (none"),
        (("fid", "real", "fake", *FID, "--json", "absent/x.json"), "cannot be written: there is no folder"),
        (("fid", "real", "fake", *FID, "--save", "real"), "real is a folder; a file is needed"),
        (("fid", "real", "fake", *FID, "--device", "tpu"), "--device 'tpu' must be"),
        (("kid", "real", "fake", *FID, "--subset-size", 11), "subsets of 11 cannot be drawn from 12 and 10"),
        (("cmmd", "real", "fake"), "pass --clip DIR"),
        (("clip", "absent", "--clip", "x"), "no such folder: absent"),
        (("clip", "flat", "--clip", "x"), "1 image (a.png) of 1 in flat has no caption to be compared with: write one"),
        (("cmmd", "real", "fake", "--clip", "absent"), "absent: does not exist"),
        (("vae", "absent"), "no such folder or zip archive: absent"),
        (("vae", "real", "--size", 60), "--size 60 must be a multiple of 8"),
        (("vae", "small"), "none of the 1 images of small can be measured"),
        (("prompts", "--method", "eulre"), "--method 'eulre' must be one of"),
        (("prompts", "--params", "absent"), "absent"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, here, words, message):
    (here / "empty").mkdir(exist_ok=True)
    (here / "torn").mkdir(exist_ok=True)
    (here / "torn" / "a.png").write_bytes(b"torn")
    (here / "torn" / "b.png").write_bytes(b"")
    (here / "torn.npz").write_bytes(b"torn")
    for name, side in (("flat", 20), ("small", 9)):
        (here / name).mkdir(exist_ok=True)
        Image.new("RGB", (side, side)).save(here / name / "a.png")
    with zipfile.ZipFile(here / "nothing.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing")
    status, out, err = run(*words)
    assert status == 1 and not out
    last = err.strip().splitlines()[-1]
    assert last.startswith("functional-sd3 evaluate: ") and message in last
    assert "Traceback" not in err


def test_ctrl_c_ends_in_one_word(run, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(inception, "apply", interrupted)
    status, out, err = run("fid", "real", "fake", *FID)
    assert status == 130 and not out and err.endswith("\nstopped\n") and "Traceback" not in err


def test_a_model_s_autoencoder_is_measured_at_the_images_own_sizes_or_one(run):
    words = ("vae", "real", "--params", "model", "--json", "-")
    own = json.loads(run(*words)[1])
    assert len(own["pictures"]) == 12 and own["pictures"][0]["name"] == "0/0.png"
    mean = sum(one["psnr"] for one in own["pictures"]) / 12
    assert own["psnr"] == pytest.approx(mean) and 3 < mean < 20 and -1 <= own["ssim"] < 1
    # Images are measured alone, in any batch and read by any number of processes.
    again = json.loads(run(*words, "--batch-size", 1, "--workers", 1)[1])
    assert again["psnr"] == pytest.approx(own["psnr"], abs=1e-3)
    status, out, _ = run("vae", "real", "--params", "model", "--size", 32)
    assert status == 0 and out.startswith("PSNR ") and "N = 12, at 32x32" in out


def test_prompt_following_of_any_model_as_a_table_and_as_json(run):
    words = ("prompts", "--params", "model", "--count", 3, "--steps", 2, "--batch-size", 2)
    status, out, _ = run(*words)
    assert status == 0 and out.startswith("| things | captions | right |") and out.count("\n") == 4
    found = json.loads(run(*words, "--things", 1, "--json", "-")[1])
    assert [row["things"] for row in found["rows"]] == [1] and found["rows"][0]["captions"] == 3
    assert 0 <= found["rows"][0]["right"] <= 1


@pytest.fixture(scope="module")
def tiny_clip(here):
    tables = models.tokenizers().clip_l
    config = clip_dual.Config(
        clip.Config(len(tables.vocab), 24, 32, 2, 2, 48, projection_width=16, eos_id=tables.eos_id),
        clip.ImageConfig(16, 8, 32, 2, 2, 48, projection_width=16),
    )
    folder = here / "clip"
    folder.mkdir()
    leaves = tree.flatten_paths(clip_dual.init(prng.key(0), config))
    files.write(folder / "model.safetensors", rules.to_theirs(LAYOUT, clip_dual.spec(config), leaves))
    towers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    text = {**towers, "vocab_size": len(tables.vocab), "max_position_embeddings": 24, "eos_token_id": tables.eos_id}
    said = {"text_config": text, "vision_config": {**towers, "image_size": 16, "patch_size": 8}}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 16, **said}))
    bpe.save(folder, tables)
    return "clip"


def test_cmmd_and_clip_score_with_weights_that_are_there(run, here, tiny_clip):
    assert value(run, "cmmd", "real", "renamed", "--clip", tiny_clip) == pytest.approx(0, abs=1e-6)
    status, out, _ = run("cmmd", "real", "fake", "--clip", tiny_clip)
    assert status == 0 and "(N = 12 and 10), CLIP with images of 16 pixels, patches of 8" in out
    found = json.loads(run("clip", "real", "--clip", tiny_clip, "--batch-size", 5, "--json", "-")[1])
    assert len(found["pictures"]) == 12 and found["pictures"][0]["caption"] == "a photo of a 0"
    assert found["value"] == pytest.approx(sum(one["score"] for one in found["pictures"]) / 12)


def test_images_of_two_kinds_are_farther_apart_than_halves_of_one(run, here):
    def draw_shapes(name, shape, seed):
        (here / name).mkdir()
        for number, (x, y) in enumerate(prng.uniform(prng.key(seed), (30, 2)).tolist()):
            thing = shapes.Thing("large", "black", shape, 20 + 24 * x, 20 + 24 * y)
            shapes.draw(shapes.Scene((thing,), "white")).save(here / name / f"{number}.png")

    draw_shapes("circles", "circle", 0)
    draw_shapes("more_circles", "circle", 1)
    draw_shapes("crosses", "cross", 2)
    near = value(run, "fid", "circles", "more_circles", *FID)
    assert value(run, "fid", "circles", "crosses", *FID) > 1.5 * near > 0
