import re
import shutil

import pytest
import torch
from PIL import Image

from functional_sd3 import lora, weights
from functional_sd3.cli import train_checks, train_data, train_model, train_setup, training_run
from functional_sd3.core import tree
from functional_sd3.training import checkpoint, log

# The model here has no CLIP-G, which is noted whenever prompts are encoded.
pytestmark = pytest.mark.filterwarnings("ignore:the text encoder CLIP-G is missing")


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--part", "transformer"], {"transformer"}),
        (["--part", "transformer", "--text-encoders", "train", "--accumulate", "2"], {"clip_l", "t5", "transformer"}),
        (["--part", "transformer", "--scratch"], {"clip_l", "t5", "transformer"}),
        (["--part", "vae"], {"vae"}),
        (["--part", "vae", "--scratch", "--dtype", "bfloat16"], {"vae"}),
    ],
)
def test_the_trained_folder_is_a_whole_model_in_which_only_the_part_changed(
    command, model_folder, tmp_path, options, changed
):
    assert command("--out", tmp_path / "out", *options)[0] == 0
    before, after = weights.load(model_folder), weights.load(tmp_path / "out")
    assert {name for name in before.params if tree.diff(before.params[name], after.params[name])} == changed
    assert {leaf.dtype for leaf in tree.leaves(after.params)} == {leaf.dtype for leaf in tree.leaves(before.params)}
    assert after.tokenizers.clip_l is not None and after.tokenizers.t5 is not None
    rows = log.read(tmp_path / "out" / "log.csv")
    assert [row["step"] for row in rows] == ["2", "3", "4", "6"]
    assert float(rows[-1]["rate"]) < 1e-2 and float(rows[-1]["loss"]) > 0


def test_a_fresh_autoencoder_measures_its_own_scale(command, model_folder, tmp_path):
    command("--out", tmp_path / "out", "--part", "vae", "--scratch")
    command("--out", tmp_path / "tuned", "--part", "vae")
    before = weights.load(model_folder).config.vae
    assert weights.load(tmp_path / "out").config.vae.scaling != before.scaling
    assert weights.load(tmp_path / "tuned").config.vae == before


def test_decoder_only_leaves_the_latents_as_they_were(command, model_folder, tmp_path):
    command("--out", tmp_path / "out", "--part", "vae", "--decoder-only")
    command("--out", tmp_path / "sharp", "--part", "vae", "--decoder-only", "--edges", "1", "--latent-noise", "0")
    before, after, sharp = (
        weights.load(path).params["vae"] for path in (model_folder, tmp_path / "out", tmp_path / "sharp")
    )
    for each in (after, sharp):
        assert not tree.diff(before["encoder"], each["encoder"]) and tree.diff(before["decoder"], each["decoder"])
    assert tree.diff(after["decoder"], sharp["decoder"])
    with pytest.raises(ValueError, match="edges 1.0 -> 0.0; latent-noise 0.0 -> 1.0"):
        command("--out", tmp_path / "sharp", "--part", "vae", "--decoder-only", "--resume")


def test_sample_images_are_drawn_during_training(command, tmp_path):
    for part in ("transformer", "vae"):
        command("--out", tmp_path / part, "--part", part, "--sample-every", "4")
        names = sorted(path.name for path in (tmp_path / part / "samples").iterdir())
        assert names == ["00000004.png", "00000006.png"]
        rows = {"transformer": 1, "vae": 2}[part]
        with Image.open(tmp_path / part / "samples" / names[0]) as image:
            assert image.size == (4 * 18 - 2, rows * 18 - 2)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_resumed_run_ends_in_the_same_bits(command, tmp_path, part):
    command("--out", tmp_path / "whole", "--part", part)
    command("--out", tmp_path / "cut", "--part", part)
    # As a kill between the two checkpoints would leave it.
    (tmp_path / "cut" / "checkpoints" / "step-00000006.safetensors").unlink()
    status, messages = command("--out", tmp_path / "cut", "--part", part, "--resume")
    assert status == 0 and "resuming at step 3 of 6" in messages
    one, other = (checkpoint.paths(tmp_path / name / "checkpoints")[-1].read_bytes() for name in ("whole", "cut"))
    assert one == other
    assert not tree.diff(weights.load(tmp_path / "whole").params, weights.load(tmp_path / "cut").params)


def test_the_seed_decides_the_run(command, tmp_path):
    folders = []
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        command("--out", tmp_path / name, "--seed", str(seed))
        folders.append(weights.load(tmp_path / name).params["transformer"])
    assert not tree.diff(folders[0], folders[1]) and tree.diff(folders[0], folders[2])


def test_a_folder_of_images_is_trained_on_and_its_broken_files_named(command, tmp_path):
    for index in range(5):
        folder = tmp_path / "data" / f"class_{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (40 * index, 90, 200)).save(folder / f"{index}.png")
    (tmp_path / "data" / "broken.png").write_text("nothing")
    status, messages = command("--out", tmp_path / "out", "--data", tmp_path / "data", "--part", "vae")
    assert status == 0 and "smaller" not in messages
    assert "5 images in" in messages and "skipped broken.png: not a readable image" in messages


@pytest.mark.parametrize("options", [[], ["--buckets", "16", "--bucket-step", "8"]])
def test_images_that_are_enlarged_are_named(command, tmp_path, options):
    for index, size in enumerate([(16, 16), (16, 15), (300, 300), (1, 40), (31, 31)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    options = ["--caption", "a circle", "--steps", "1", *options]
    status, messages = command("--out", tmp_path / "out", "--data", tmp_path, *options)
    assert status == 0 and messages.count("are smaller than the size that is learned") == 1
    assert "2 images (1.png: 16 x 15, 3.png: 1 x 40) of 5" in messages


def test_images_without_captions_are_counted_in_one_line(command, tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a circle", encoding="utf-8-sig")
    (tmp_path / "b.tags").write_text("round, red")
    options = ("--data", tmp_path, "--steps", "1", "--sample-every", "0")
    status, messages = command("--out", tmp_path / "out", *options)
    assert status == 0 and "2 of 3 images have no caption (1 beside the image); captions are read from" in messages
    assert "look like captions and were not read: 1 file (b.tags)" in messages
    status, messages = command("--out", tmp_path / "other", *options, "--caption", "a circle")
    assert status == 0 and "all with captions (3 --caption)" in messages
    with pytest.raises(ValueError, match="--caption is for a folder of images"):
        command("--out", tmp_path / "third", "--caption", "a circle")


def test_resuming_with_nothing_there_is_refused(command, tmp_path):
    with pytest.raises(ValueError, match="--resume found no checkpoint"):
        command("--out", tmp_path / "out", "--resume")


def test_a_run_is_not_begun_over_another(command, tmp_path):
    command("--out", tmp_path / "out")
    with pytest.raises(ValueError, match="holds a run already: --resume goes on with it"):
        command("--out", tmp_path / "out")


def test_resuming_with_other_arguments_names_them(command, tmp_path):
    command("--out", tmp_path / "out")
    with pytest.raises(ValueError, match=re.escape("lr 0.01 -> 0.5; seed 0 -> 3; ") + ".*Resume with the same"):
        command("--out", tmp_path / "out", "--resume", "--lr", "0.5", "--seed", "3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "--data nowhere is not a folder"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--batch-size", "4", "--accumulate", "3"], "cannot be taken in 3 equal parts"),
        (["--lr", "-1"], "--lr -1.0 must be a positive number"),
        (["--lr", "nan"], "--lr nan must be a positive number"),
        (["--dropout", "1"], "--dropout 1.0 must be at least 0 and below 1"),
        (["--size", "20"], "--size 20: height 20 is not a multiple of 8"),
        (["--size", "100000"], "--size 100000: height 100000 is beyond the 16 pixels .*; the largest is 16"),
        (["--size", "20", "--part", "vae"], "20 is not a multiple of 8"),
        (["--device", "abacus"], "--device 'abacus'"),
        (["--params", "nowhere"], "nowhere"),
        (["--part", "vae", "--text-encoders", "train"], "--text-encoders belongs to --part transformer"),
        (["--decoder-only"], "--decoder-only belongs to --part vae"),
        (["--edges", "1"], "--edges belongs to --part vae"),
        (["--latent-noise", "0"], "--latent-noise belongs to --part vae"),
        (["--edges", "nan", "--part", "vae"], "--edges nan must be a finite number of at least 0"),
        (["--latent-noise", "-1", "--part", "vae"], "--latent-noise -1.0 must be a finite number of at least 0"),
    ],
)
def test_wrong_arguments_are_named(command, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        command("--out", tmp_path / "out", *options)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_an_empty_folder_is_refused(command, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        command("--out", tmp_path / "out", "--data", tmp_path / "empty")


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused_at_once(command, tmp_path, monkeypatch):
    usage = train_checks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(train_checks.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match="has 0.0 MiB free; 4 checkpoints of .* MiB and 1 result of .*: make room, or"):
        command("--out", tmp_path / "out")


def test_a_disk_for_a_lora_needs_no_room_for_the_model(command, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_checks, "check_disk", lambda out, *needed: seen.append(needed))
    command("--out", tmp_path / "out", "--lora", 2, "--result-every", 2)
    (checkpoints, result, results) = seen[0]
    state, file = (sum(path.stat().st_size for path in (tmp_path / "out").glob(pattern))
                   for pattern in ("checkpoints/step-00000006*", "*.safetensors"))  # fmt: skip
    # Numbers without the names of the tensors, which are most of so small a file.
    assert 0 < 4 * result < checkpoints <= 4 * state and result <= file and results == 4
    command("--out", tmp_path / "out", "--lora", 2, "--result-every", 2, "--steps", 9, "--resume")
    assert seen[1] == (checkpoints, result, 2)


def test_a_learning_rate_that_is_too_high_stops_with_advice(command, tmp_path):
    with pytest.raises(ArithmeticError, match="at step .*Try a lower learning rate"):
        command("--out", tmp_path / "out", "--lr", "1e30", "--warmup", "0")


def test_training_leaves_the_global_generator_alone(command, tmp_path):
    before = torch.random.get_rng_state()
    command("--out", tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("options", [[], ["--text-encoders", "train"], ["--dtype", "bfloat16"]])
def test_a_lora_is_left_as_a_file_that_changes_the_model_it_was_trained_on(command, tmp_path, options):
    from functional_sd3 import lora
    from functional_sd3.lora import tree as adapters
    from tests import models

    # In a fresh transformer every gate is shut, and nothing reaches the attentions.
    model = models.random_model()
    weights.save(tmp_path / "model", model)
    assert command("--params", tmp_path / "model", "--out", tmp_path / "out", "--lora", 2, *options)[0] == 0
    trained = lora.load(tmp_path / "out", model.config)
    parts = {"transformer", *(("clip_l", "clip_g", "t5") if "train" in options else ())}
    assert {path.partition(".")[0] for path in adapters.entries(trained)} == parts
    assert not (tmp_path / "out" / "transformer").exists()
    changed = lora.apply(model.params, trained)
    assert {name for name in model.params if tree.diff(model.params[name], changed[name])} == parts
    rows = log.read(tmp_path / "out" / "log.csv")
    assert float(rows[-1]["grad_norm"]) > 0


def test_a_lora_that_was_interrupted_goes_on_to_the_same_bits(command, tmp_path):
    from functional_sd3.formats import files

    assert command("--out", tmp_path / "whole", "--lora", 2)[0] == 0
    assert command("--out", tmp_path / "cut", "--lora", 2)[0] == 0
    (tmp_path / "cut" / "checkpoints" / "step-00000006.safetensors").unlink()
    assert "resuming at step 3" in command("--out", tmp_path / "cut", "--lora", 2, "--resume")[1]
    names = [tmp_path / name / training_run.LORA for name in ("whole", "cut")]
    assert names[0].read_bytes() == names[1].read_bytes()
    saved = checkpoint.paths(tmp_path / "whole" / "checkpoints")[-1]
    assert all(".down" in name or ".up" in name or ".alpha" in name for name in files.read_header(saved).tensors
               if name.startswith("params."))  # fmt: skip


@pytest.mark.parametrize("words, said", [
    (["--lora", 0], "--lora 0 must be a rank of at least 1"),
    (["--lora", 2, "--scratch"], "--lora adapts a transformer"),
    (["--lora", 2, "--part", "vae"], "--lora adapts a transformer"),
])  # fmt: skip
def test_settings_that_do_not_go_with_a_lora_are_named(command, tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        command("--out", tmp_path / "out", *words)


@pytest.fixture
def seen(monkeypatch):
    """The models and options that runs are made of, in order."""
    made = []
    for name in ("flow_task", "vae_task"):
        module = getattr(train_setup, name)
        original = getattr(module, name)

        def spy(key, model, *rest, original=original, **kwargs):
            made.append((model, rest[-1]))
            return original(key, model, *rest, **kwargs)

        monkeypatch.setattr(module, name, spy)
    return made


def dtypes(params):
    return {name: {leaf.dtype for leaf in tree.leaves(part)} for name, part in params.items()}


@pytest.mark.parametrize(
    ("options", "learned"),
    [
        ([], {"transformer"}),
        (["--text-encoders", "train"], {"transformer", "clip_l", "t5"}),
        (["--part", "vae"], {"vae"}),
    ],
)
def test_components_that_are_not_trained_stay_as_stored(command, model_folder, tmp_path, seen, options, learned):
    weights.save(tmp_path / "model", weights.load(model_folder, dtype=torch.bfloat16))
    assert command("--params", tmp_path / "model", "--out", tmp_path / "out", "--sample-every", 3, *options)[0] == 0
    model, _ = seen[0]
    wide = {name: {torch.float32 if name in learned else torch.bfloat16} for name in model.params}
    assert dtypes(model.params) == wide
    folders = {"clip_l": "text_encoder", "t5": "text_encoder_3", "transformer": "transformer", "vae": "vae"}
    for name, folder in folders.items():
        (before,), (after,) = ((tmp_path / place / folder).glob("*.safetensors") for place in ("model", "out"))
        assert (before.read_bytes() == after.read_bytes()) == (name not in learned)
    assert set(dtypes(weights.load(tmp_path / "out", dtype="stored").params)["transformer"]) == {torch.bfloat16}
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 2


@pytest.mark.parametrize(
    ("stored", "options", "computed"),
    [
        (torch.bfloat16, [], torch.bfloat16),
        (torch.bfloat16, ["--dtype", "float32"], torch.float32),
        (torch.float16, [], torch.float32),
        (torch.float32, ["--dtype", "bfloat16"], torch.bfloat16),
    ],
)
def test_the_base_of_a_lora_is_computed_as_it_is_stored(
    command, model_folder, tmp_path, seen, stored, options, computed
):
    weights.save(tmp_path / "model", weights.load(model_folder, dtype=stored))
    base = ["--params", tmp_path / "model", "--out", tmp_path / "out", "--lora", 2, *options]
    assert command(*base, "--sample-every", 3)[0] == 0
    model, settings = seen[0]
    assert dtypes(model.params)["transformer"] == {computed}
    assert (settings.dtype or torch.float32) == computed
    assert "resuming at step 6" in command(*base, "--resume")[1]
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 2


def test_numbers_that_outgrew_their_dtype_are_stored_in_a_wider_one():
    grown = {"a": torch.tensor([1e5]), "b": torch.ones(1)}
    stored = {name: torch.ones(1).half() for name in grown}
    saved = train_model.as_stored(grown, stored)
    assert saved["a"].dtype == torch.float32 and saved["b"].dtype == torch.float16
    assert train_model.as_stored(grown, tree.cast(stored, torch.float8_e4m3fn))["b"].dtype == torch.bfloat16


def test_a_model_without_text_encoders_is_refused_before_images_are_drawn(command, model_folder, tmp_path, monkeypatch):
    weights.save(tmp_path / "bare", weights.load(model_folder, only=["transformer", "vae"]))
    drawn = []
    monkeypatch.setattr(train_data, "images", lambda *_: drawn.append(1))
    with pytest.raises(ValueError, match="no text encoder, so it cannot read prompts"):
        command("--params", tmp_path / "bare", "--out", tmp_path / "out")
    assert not drawn


@pytest.mark.parametrize("trained", [[], ["--lora", "2"]])
def test_a_checkpoint_given_as_a_model_or_a_lora_is_said_to_be_one(command, model_folder, tmp_path, trained):
    out = tmp_path / "out"
    assert command("--out", out, *trained)[0] == 0
    newest = checkpoint.paths(out / "checkpoints")[-1]
    unfinished = tmp_path / "unfinished"
    shutil.copytree(out / "checkpoints", unfinished / "checkpoints")
    sentence = re.escape("is a checkpoint of `train` or `reward`, which --resume goes on from; ") + ".*--params OUT"
    for path in (newest, out / "checkpoints", unfinished):
        with pytest.raises(weights.WeightsError, match=f"{newest.name}: {sentence}") as caught:
            weights.load(path)
        # One sentence for all checkpoints of a run.
        assert len(caught.value.problems) == 1 and str(caught.value).count("is a checkpoint") == 1
    with pytest.raises(weights.WeightsError, match="is the encoded images of a training run"):
        weights.load(out / "checkpoints" / train_data.ENCODED)
    with pytest.raises(weights.WeightsError, match="is a checkpoint of `train` or `reward`.*--lora OUT"):
        lora.load(newest, weights.outline(model_folder).config)
