"""`train` of a ControlNet, a word, a subject with its prior, and with masks; validation of held-out images."""

import argparse
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from functional_sd3 import lora, pipeline, weights
from functional_sd3.cli import train, train_checks, train_data, train_extras, train_setup
from functional_sd3.core import prng, tree
from functional_sd3.text import textual_inversion
from functional_sd3.training import checkpoint, log, training_set, validation, views

# The model of these tests has no CLIP-G.
pytestmark = pytest.mark.filterwarnings("ignore:the text encoder CLIP-G is missing")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a random model of three encoders whose residual blocks are open."""
    from tests import models

    folder = tmp_path_factory.mktemp("whole") / "model"
    weights.save(folder, models.random_model())
    return folder


@pytest.fixture
def data(tmp_path):
    """Five images of 64 pixels with captions in which <mine> stands, their masks and control images."""
    for name in ("data", "masks", "control"):
        (tmp_path / name / "sub").mkdir(parents=True)
    for index in range(5):
        name = f"sub/{index}" if index % 2 else str(index)
        Image.new("RGB", (64, 64), (40 * index, 90, 200)).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text("a large <mine> circle on a white background")
        mask = Image.new("L", (32, 32), 0)
        mask.paste(255, (0, 0, 16, 32))
        mask.save(tmp_path / "masks" / f"{name}.webp", lossless=True)
        Image.new("RGB", (128, 128), (0, 20 * index, 0)).save(tmp_path / "control" / f"{name}.png")
    return tmp_path


def cut(command, out, *words):
    """A run whose last checkpoint a kill took, resumed."""
    assert command("--out", out, *words)[0] == 0
    checkpoint.paths(out / "checkpoints")[-1].unlink()
    status, messages = command("--out", out, *words, "--resume")
    assert status == 0 and "resuming at step 3 of 6" in messages


def last(out):
    return checkpoint.paths(out / "checkpoints")[-1].read_bytes()


def runs(data):
    """Words of a run of each kind."""
    return {
        "control": ["--control", "canny", "--validation", "3"],
        "control data": ["--data", data / "data", "--control", "depth", "--control-data", data / "control"],
        "word": ["--data", data / "data", "--inversion", "<mine>", "--initial-word", "red", "--vectors", 2,
                 "--inversion-t5", "--prior-prompt", "a circle", "--prior-images", "3", "--validation", "1"],
        "subject": ["--data", data / "data", "--lora", "2", "--prior-data", data / "data", "--prior-weight", "0.5",
                    "--masks", data / "masks", "--mask-outside", "0.1", "--accumulate", "2",
                    "--density", "mode:0.5", "--shift", "2", "--loss-weight", "min-snr:3", "--loss-weight", "cosmap"],
    }  # fmt: skip


def grey(folder):
    """Six grey images of two shapes."""
    folder.mkdir()
    for index in range(6):
        image = Image.linear_gradient("L").rotate(30 * index).resize((128 if index % 3 else 64, 64))
        image.convert("RGB").save(folder / f"{index}.png")
    return folder


VIEWED = ["--caption", "a circle", "--buckets", "64", "--bucket-step", "16", "--bucket-min", "2", "--batch-size", "2",
          "--crops", "2", "--flips"]  # fmt: skip


@pytest.mark.parametrize("name", ["control", "control data", "word", "subject"])
def test_a_resumed_run_ends_in_the_same_bits(command, whole, data, name):
    words = ["--params", whole, *runs(data)[name]]
    assert command("--out", data / "straight", *words)[0] == 0
    cut(command, data / "cut", *words)
    assert last(data / "straight") == last(data / "cut")
    rows, again = (log.read(data / out / "log.csv") for out in ("straight", "cut"))
    timeless = [[{**row, "seconds": ""} for row in each] for each in (rows, again)]
    assert timeless[0] == timeless[1]


def test_a_controlnet_is_a_folder_that_diffusers_and_generate_read(command, whole, data, tmp_path):
    out = tmp_path / "out"
    assert command("--params", whole, "--out", out, *runs(data)["control data"], "--sample-every", 3)[0] == 0
    assert len(list((out / "samples").iterdir())) == 2
    net, model = weights.load_controlnet(out), weights.load(whole)
    assert net.config.kind == "depth" and net.config.depth == model.config.transformer.depth // 2
    trained = tree.flatten_paths(net.params)
    assert trained["residuals.0.weight"].abs().max() > 0 and trained["control_patch.weight"].abs().max() > 0
    assert not (out / "transformer").exists()
    theirs = pytest.importorskip("diffusers").SD3ControlNetModel.from_pretrained(out)
    assert sum(leaf.numel() for leaf in theirs.parameters()) == sum(
        leaf.numel() for name, leaf in trained.items() if not name.startswith("position")
    )
    from functional_sd3 import cli

    drawn = ["generate", "a large red circle", "--params", whole, "--steps", 2, "--out", tmp_path / "drawn.png"]
    control = ["--control", f"depth={data / 'control' / '0.png'}", "--controlnet", out]
    assert cli.main([str(word) for word in (*drawn, *control)]) == 0


def test_a_word_is_a_file_with_vectors_and_nothing_else_changed(command, whole, data, tmp_path):
    out = tmp_path / "out"
    status, messages = command("--params", whole, "--out", out, *runs(data)["word"])
    assert status == 0 and "drawing 3 images of the class" in messages
    word, model = weights.load_inversion(out / "learned_embeds.safetensors", token="<mine>"), weights.load(whole)
    assert {name: len(vectors) for name, vectors in word.vectors.items()} == {"clip_l": 2, "clip_g": 2, "t5": 2}
    start = textual_inversion.initial_vectors(model.params, model.tokenizers, "red", ["clip_l"], 2)["clip_l"]
    assert not torch.equal(word.vectors["clip_l"], start)
    assert torch.allclose(word.vectors["clip_l"], start, atol=0.2)
    params, config, tokenizers = textual_inversion.add(*model, word)
    options = {"steps": 2, "t5_length": 16}
    pipeline.generate(params, config, tokenizers, "a <mine> circle", prng.key(0), **options)
    # The checkpoint holds the vectors alone.
    names = tree.flatten_paths(checkpoint.load(checkpoint.paths(out / "checkpoints")[-1], _state_like(out)))
    assert {name for name in names if name.startswith("params.")} == {
        f"params.word.{encoder}" for encoder in ("clip_l", "clip_g", "t5")
    }
    assert len(list((out / "prior").glob("*.png"))) == 3


def _state_like(out):
    from functional_sd3.formats import files

    mapped = files.open_mapped(checkpoint.paths(out / "checkpoints")[-1])
    nested: dict = {}
    for name in mapped.header.tensors:
        *parts, leaf = name.split(".")
        place = nested
        for part in parts:
            place = place.setdefault(part, {})
        place[leaf] = files.tensor(mapped, name)
    return nested


def test_a_lora_and_a_word_learn_together(command, whole, data, tmp_path):
    """Each as alone where the other has changed nothing yet; both files make the model that samples are drawn with."""
    words = ["--params", whole, "--data", data / "data", "--inversion", "<mine>", "--initial-word", "red", "--lora", 2]
    status, _ = command("--out", tmp_path / "both", *words, "--word-lr", "1e-3", "--ema", "0")
    assert status == 0
    cut(command, tmp_path / "cut", *words, "--word-lr", "1e-3", "--ema", "0")
    assert last(tmp_path / "both") == last(tmp_path / "cut")
    files = {path.name for path in (tmp_path / "both").iterdir() if path.is_file()}
    assert {"learned_embeds.safetensors", "pytorch_lora_weights.safetensors"} <= files
    model = weights.load(whole)
    word = weights.load_inversion(tmp_path / "both" / "learned_embeds.safetensors", token="<mine>")
    start = textual_inversion.initial_vectors(model.params, model.tokenizers, "red", ["clip_l"], 1)["clip_l"]
    # Adam's steps are at most the rate, 1e-3 at its peak, whatever that of the LoRA is, ten times it.
    assert 0 < (word.vectors["clip_l"] - start).abs().max() <= 6e-3
    adapters = lora.load(tmp_path / "both" / "pytorch_lora_weights.safetensors", model.config)
    grown = [leaf for path, leaf in tree.flatten_paths(adapters).items() if ".up" in path]
    assert max(leaf.abs().max() for leaf in grown) > 6e-3
    from functional_sd3 import cli

    drawn = ["generate", "a <mine> circle", "--params", whole, "--steps", 1, "--out", tmp_path / "drawn.png"]
    both = ["--lora", tmp_path / "both" / "pytorch_lora_weights.safetensors",
            "--embedding", f"<mine>={tmp_path / 'both' / 'learned_embeds.safetensors'}"]  # fmt: skip
    assert cli.main([str(each) for each in (*drawn, *both)]) == 0


def test_images_of_the_class_that_are_there_are_kept_and_the_rest_drawn_alike(command, whole, data, tmp_path):
    words = ["--params", whole, "--data", data / "data", "--prior-prompt", "a circle", "--prior-images", "3"]
    command("--out", tmp_path / "one", *words)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "one" / "prior").glob("*.png")}
    shutil.copytree(tmp_path / "one" / "prior", tmp_path / "class")
    (tmp_path / "class" / "drawn-00001.png").unlink()
    status, messages = command("--out", tmp_path / "two", *words, "--prior-data", tmp_path / "class")
    assert status == 0 and "drawing 1 images of the class" in messages
    assert {path.name: path.read_bytes() for path in (tmp_path / "class").glob("*.png")} == kept
    assert last(tmp_path / "one") is not None
    rows = log.read(tmp_path / "two" / "log.csv")
    assert float(rows[-1]["prior_loss"]) > 0 and float(rows[-1]["subject_loss"]) > 0


def test_a_run_that_may_not_go_on_draws_no_images_of_the_class(command, whole, data, tmp_path):
    words = ["--params", whole, "--data", data / "data", "--out", tmp_path / "out", "--prior-prompt", "a circle"]
    command(*words, "--prior-images", "2")
    with pytest.raises(ValueError, match="prior-images 2 -> 3"):
        command(*words, "--prior-images", "3", "--resume")
    # The run itself is as it was, and goes on.
    status, messages = command(*words, "--prior-images", "2", "--resume", "--steps", "7")
    assert status == 0 and "drawing" not in messages and len(list((tmp_path / "out" / "prior").glob("*.png"))) == 2
    fresh = [*words[:5], tmp_path / "fresh", "--prior-data", tmp_path / "out" / "prior", "--prior-images", "3"]
    with pytest.raises(ValueError, match="a square: .*drawn-00000.png was drawn of 'a circle': name another folder"):
        command(*fresh, "--prior-prompt", "a square")


def test_masks_of_ones_train_as_no_masks(command, data, tmp_path):
    white = tmp_path / "white"
    for path in (data / "data").rglob("*.png"):
        target = white / path.relative_to(data / "data")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 64), 255).save(target)
    command("--out", tmp_path / "plain", "--data", data / "data")
    command("--out", tmp_path / "white-run", "--data", data / "data", "--masks", white)
    command("--out", tmp_path / "half", "--data", data / "data", "--masks", data / "masks")
    plain, same, other = (weights.load(tmp_path / name).params for name in ("plain", "white-run", "half"))
    assert not tree.diff(plain, same) and tree.diff(plain, other)


def test_masks_and_control_images_have_the_cuts_of_their_images(whole, tmp_path):
    """Control images of a ControlNet without pooled embedding are encoded as images are, but for the shift."""
    folders = [grey(tmp_path / name) for name in ("images", "masks", "control")]
    words = ["--data", folders[0], "--masks", folders[1], "--control-data", folders[2]]
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    words = ["--params", whole, "--out", tmp_path / "out", "--control", "depth", *words, *VIEWED]
    arguments = parser.parse_args([str(word) for word in words])
    sets = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_setup.flow_task, "flow_task", lambda *given, **options: sets.append(given[3]))
        train_setup.prepare(arguments, lambda text: None)
    (learned,) = sets
    model = weights.outline(whole)
    images = train_data.images(arguments, model, lambda text: None)
    cuts = train_data.image_views(arguments, model, images)
    assert len(set(learned.latents.buckets)) == 2 and learned.latents.views == 4
    for sample in range(24):
        batch = training_set.batch_of(learned, torch.tensor([sample]))
        shift = model.config.vae.scaling * model.config.vae.shift
        assert torch.allclose(batch["control"], batch["latents"] + shift, atol=1e-5)
        image = images.cut(sample // 4, views.cut(cuts, sample // 4, sample % 4))
        assert torch.allclose(batch["mask"][0], F.avg_pool2d(image[:1] / 255, 8), atol=1 / 255)


def test_images_are_held_out_where_their_bucket_has_more_than_a_batch():
    buckets = [0, 0, 1, 1, 1, 1, 0]
    assert train_extras._held_out([0, 1, 2, 3, 4, 5, 6], buckets, 3, 2) == [0, 2, 3]
    with pytest.raises(ValueError, match="--validation 4: 3 images can be held out, as each bucket needs 2"):
        train_extras._held_out([0, 1, 2, 3, 4, 5, 6], buckets, 4, 2)
    assert train_extras._held_out([3, 1, 2, 0], [5] * 4, 3, 4) == [3, 1, 2]


def test_a_controlnet_on_buckets_resumes_to_the_bit_and_draws_samples(command, whole, tmp_path):
    words = ["--params", whole, "--data", grey(tmp_path / "images"), "--control", "canny", *VIEWED, "--sample-every", 6,
             "--validation", 1]  # fmt: skip
    assert command("--out", tmp_path / "straight", *words)[0] == 0
    cut(command, tmp_path / "cut", *words)
    assert last(tmp_path / "straight") == last(tmp_path / "cut")
    # Of the commonest bucket, whose control images the samples are drawn with: four of 80 x 48 in a row.
    with Image.open(tmp_path / "straight" / "samples" / "00000006.png") as sheet:
        assert sheet.size == (4 * 80 + 3 * 2, 48)


def test_validation_is_in_the_log_and_said_and_does_not_change_the_run(command, data, tmp_path):
    words = ["--data", data / "data", "--validate-every", "2"]
    messages = command("--out", tmp_path / "out", *words, "--validation", data / "data")[1]
    command("--out", tmp_path / "plain", "--data", data / "data")
    assert not tree.diff(weights.load(tmp_path / "out").params, weights.load(tmp_path / "plain").params)
    rows = log.read(tmp_path / "out" / "log.csv")
    measured = [row["step"] for row in rows if math.isfinite(float(row["validation"]))]
    assert measured == ["2", "4", "6"] and set(validation.NAMES) <= set(rows[0])
    mean = sum(float(rows[-1][name]) for name in validation.NAMES[1:]) / 10
    assert float(rows[-1]["validation"]) == pytest.approx(mean, rel=1e-5)
    assert f"validation at step 6: {float(rows[-1]['validation']):.4f}; by t 0.05: " in messages
    # A number of images is held out: they are not learned from.
    command("--out", tmp_path / "held", *words, "--validation", "2")
    assert tree.diff(weights.load(tmp_path / "held").params, weights.load(tmp_path / "plain").params)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--density", "normal"], "--density 'normal': 'normal' must be one of logit-normal, uniform, mode, cosmap"),
        (["--density", "mode:2"], "its scale must be between -1 and"),
        (["--density", "logit-normal:0,0"], "its std must be a positive number"),
        (["--density", "uniform:1"], "uniform takes no number"),
        (["--loss-weight", "min-snr:-1"], "its gamma must be a positive number"),
        (["--loss-weight", "min-snr:x"], "its gamma 'x' must be a number"),
        (["--part", "vae", "--shift", "3"], "--shift belongs to --part transformer"),
        (["--part", "vae", "--control", "canny"], "--control belongs to --part transformer"),
        (["--control", "depth"], "--control depth needs --control-data DIR"),
        (["--control", "canny", "--lora", "2"], "--control trains a ControlNet .* so --lora does not go with it"),
        (["--control", "canny", "--canny", "5"], "--canny '5' must be LOW,HIGH"),
        (["--control", "canny", "--canny", "9,5"], "whole numbers with 0 <= LOW <= HIGH"),
        (["--control", "canny", "--control-depth", "9"], "cannot be copied from a transformer of 1"),
        (["--control-depth", "1"], "--control-depth belongs to --control, which is not given"),
        (["--control", "canny", "--prior-images", "3", "--prior-prompt", "x"], "--control learns no subject"),
        (["--inversion", "<x>"], "--inversion '<x>' needs --initial-word"),
        (["--inversion", "<x>", "--initial-word", "red", "--word-lr", "1"], "--word-lr is for --inversion with --lora"),
        (["--lora", "2", "--word-lr", "1"], "--word-lr belongs to --inversion"),
        (["--inversion", "<x>", "--initial-word", "red", "--lora", "2", "--word-lr", "nan"], "--word-lr nan must be"),
        (
            ["--inversion", "<x>", "--initial-word", "red", "--lora", "2", "--fused-update"],
            "leave out --inversion, or --lora",
        ),
        (["--inversion", "<x>", "--initial-word", " "], "--inversion '<x>' needs --initial-word"),
        (["--inversion", " x", "--initial-word", "red"], "must be a word, such as '<mine>', without white space"),
        (["--inversion", "<x>", "--initial-word", "red", "--scratch"], "so --scratch does not go with it"),
        (["--vectors", "2"], "--vectors belongs to --inversion"),
        (["--prior-images", "3"], "--prior-images needs --prior-prompt"),
        (["--prior-weight", "0.5"], "--prior-weight needs images of the class"),
        (["--prior-data", "nowhere"], "--prior-data nowhere is not a folder that exists"),
        (["--masks", "nowhere"], "--masks is for a folder of images"),
        (["--mask-outside", "0.5"], "--mask-outside belongs to --masks"),
        (["--prior-data", ".", "--flips"], "--prior-data is of images cut to one square"),
        (["--control", "canny", "--weights", "bfloat16"], "what --control trains is small and stays float32"),
        (["--validation", "nowhere"], "--validation nowhere is neither a number"),
        (["--validation", "12"], "--validation 12 holds out all images \\(12\\)"),
        (["--validate-every", "0"], "--validate-every 0 must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_runs(command, tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        command("--out", tmp_path / "out", *words)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_what_does_not_fit_the_images_is_named(command, whole, data, tmp_path):
    base = ["--params", whole, "--out", tmp_path / "out", "--data", data / "data"]
    (data / "masks" / "2.webp").unlink()
    with pytest.raises(ValueError, match=r"has no masks for 1 of 5 images \(2.png\)"):
        command(*base, "--masks", data / "masks")
    Image.new("L", (64, 32), 255).save(data / "masks" / "2.png")
    with pytest.raises(ValueError, match="2.png is 64 x 32, but its image 64 x 64"):
        command(*base, "--masks", data / "masks")
    Image.new("L", (64, 64), 0).save(data / "masks" / "2.png")
    with pytest.raises(ValueError, match="1 masks are black everywhere"):
        command(*base, "--masks", data / "masks")
    with pytest.raises(ValueError, match=r"has no masks for 5 of 5 images"):
        command(*base, "--masks", data / "data")
    word = ["--initial-word", "red", "--inversion"]
    with pytest.raises(ValueError, match="no caption of --data holds <other>"):
        command(*base, *word, "<other>")
    with pytest.raises(ValueError, match="is a token of clip_l already"):
        command(*base, *word, "a</w>")
    with pytest.raises(ValueError, match="the model has no clip_g to learn"):
        command("--out", tmp_path / "out", "--data", data / "data", *word, "<mine>")


def test_what_a_run_learns_beside_its_images_cannot_change_unsaid(command, whole, data, tmp_path):
    words = ["--params", whole, *runs(data)["subject"]]
    out = tmp_path / "out"
    assert command("--out", out, *words)[0] == 0
    Image.new("L", (64, 64), 200).save(data / "masks" / "0.webp")
    with pytest.raises(ValueError, match="the contents of the masks changed"):
        command("--out", out, *words, "--resume")
    with pytest.raises(ValueError, match="density mode:0.5 -> uniform.*; shift 2.0 -> 3.0"):
        command("--out", out, *words, "--density", "uniform", "--shift", "3", "--resume")
    moved = shutil.move(data / "masks", data / "moved")
    moved_words = [moved if word == data / "masks" else word for word in words]
    assert command("--out", out, *moved_words, "--resume", "--force")[0] == 0
    with pytest.raises(ValueError, match="control None -> canny.*Even with --force"):
        command("--params", whole, "--out", out, "--control", "canny", "--resume", "--force")


def test_tensorboard_is_an_extra(command, tmp_path, monkeypatch):
    monkeypatch.setattr(train_checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard needs the package tensorboard.*pip install"):
        command("--out", tmp_path / "out", "--tensorboard")


@pytest.mark.filterwarnings("default")
def test_tensorboard_has_the_rows_of_the_log_and_the_samples(command, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    command("--out", out, "--tensorboard", "--sample-every", "3", "--validation", "2")
    checkpoint.paths(out / "checkpoints")[-1].unlink()
    command("--out", out, "--tensorboard", "--sample-every", "3", "--validation", "2", "--resume")
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    rows = log.read(out / "log.csv")
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [int(row["step"]) for row in rows]
    assert [event.value for event in scalars] == pytest.approx([float(row["loss"]) for row in rows], rel=1e-5)
    assert [event.step for event in events.Scalars("validation")] == [6]
    assert "samples" in {name.partition("/")[0] for name in events.Tags()["images"]}


def test_what_the_guide_says_goes_together_runs(command, whole, data, tmp_path):
    prior = ["--prior-data", data / "data", "--masks", data / "masks", "--validation", "1"]
    for index, words in enumerate(
        [
            ["--text-encoders", "train", *prior],
            ["--inversion", "<mine>", "--initial-word", "red", "--flips", "--validation", "1"],
            ["--inversion", "<mine>", "--initial-word", "red", "--remat", "--masks", data / "masks"],
            ["--control", "canny", "--masks", data / "masks", "--remat", "--dtype", "bfloat16", "--validation", "1"],
        ]
    ):
        base = ["--params", whole, "--out", tmp_path / str(index), "--data", data / "data", "--steps", 1]
        assert command(*base, *words)[0] == 0, words
        (row,) = log.read(tmp_path / str(index) / "log.csv")
        assert float(row["grad_norm"]) > 0
        assert math.isfinite(float(row["validation"])) if "--validation" in words else "validation" not in row
