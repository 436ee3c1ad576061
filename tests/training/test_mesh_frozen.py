"""What is frozen is divided too: a LoRA's base, the transformer under a ControlNet or a word, and the autoencoder."""

import argparse
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.transformer import mmdit
from tests.models import random_leaves
from tests.training.mesh_runs import error, tensors, train

SHORT = ["--steps", "2", "--save-every", "2", "--schedule", "constant", "--warmup", "0"]


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """`model_folder` with a CLIP-G, and a transformer of two blocks whose velocity is not zero."""
    model, path = weights.load(model_folder, dtype="stored"), tmp_path_factory.mktemp("random")
    network = replace(model.config.transformer, depth=2)
    config = replace(model.config, transformer=network, clip_g=model.config.clip_l)
    leaves = tree.cast(random_leaves(mmdit.spec(network)), torch.float16)
    params = {**model.params, "clip_g": model.params["clip_l"], "transformer": leaves}
    tokenizers = model.tokenizers._replace(clip_g=model.tokenizers.clip_l)
    weights.save(path, model._replace(config=config, params=params, tokenizers=tokenizers))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder of four images."""
    path = tmp_path_factory.mktemp("images")
    for index in range(4):
        Image.new("RGB", (16, 16), (60 * index, 90, 200)).save(path / f"{index}.png")
    return path


RUNS = {
    "lora": ["--lora", "2", "--block-swap", "1", "--remat", "--sample-every", "2"],
    "int8": ["--lora", "2", "--base", "int8", "--text-encoders", "train"],
    "control": ["--control", "canny", "--sample-every", "2", "--remat"],
    "inversion": ["--inversion", "<hue>", "--initial-word", "red", "--caption", "a <hue> circle", "--data", "IMAGES"],
    "vae": ["--part", "vae", "--sample-every", "2"],
}


@pytest.mark.parametrize("name", RUNS)
def test_what_trains_beside_a_divided_model_learns_as_in_one_process(processes, folder, images, tmp_path, name):
    words = [*SHORT, *(images if word == "IMAGES" else word for word in RUNS[name])]
    alone = train(folder, "--out", tmp_path / "alone", *words, "--accumulate", "2")
    assert alone[0] == 0, alone[2]
    results = processes(2, train, folder, "--out", tmp_path / "run", *words, "--mesh", "fsdp=2")
    assert [status for status, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    assert "note: no sample" not in results[0][2] and results[1][2] == ""
    ours, theirs = tensors(tmp_path / "run", 2), tensors(tmp_path / "alone", 2)
    assert error(ours, theirs) < 1e-5
    # It has learned something: momenta of the loss's gradients.
    assert any(leaf.abs().max() > 0 for path, leaf in theirs.items() if ".mean." in path)
    drawn = list((tmp_path / "alone" / "samples").glob("*.png"))
    assert len(drawn) == RUNS[name].count("--sample-every")
    for path in drawn:
        # A LoRA stands beside weights that are gathered, and is added to those that are whole.
        image, own = (decoded(folder / path.name) for folder in (path.parent, tmp_path / "run" / "samples"))
        assert (image - own).abs().max() <= 2


def decoded(path):
    with Image.open(path) as image:
        return torch.from_numpy(numpy.array(image)).int()


MESHES = [
    (4, "fsdp=2,tensor=2", "train", ["--text-encoders", "train"]),
    (4, "data=2,tensor=2", "train", ["--lora", "2", "--base", "int8", "--sample-every", "2"]),
    (4, "data=2,fsdp=2", "train", ["--optimizer", "muon", "--accumulate", "2"]),
    (4, "data=2,fsdp=2", "train", ["--lora", "2", "--accumulate", "2"]),
    (2, "fsdp=2", "train", ["--optimizer", "adamw8bit", "--fused-update"]),
    (2, "tensor=2", "train", ["--inversion", "<hue>", "--initial-word", "red", "--caption", "a <hue> circle",
                              "--lora", "2", "--word-lr", "1e-3"]),
    (2, "tensor=2", "distill", ["--to", "2", "--method", "meanflow", "--remat"]),
    (2, "sequence=2", "reward", ["--reward", "colours", "--method", "grpo", "--remat"]),
]  # fmt: skip


@pytest.mark.parametrize(("count", "mesh", "command", "words"), MESHES, ids=[f"{each[1]} {each[2]}" for each in MESHES])
def test_training_with_divided_heads_or_tokens_or_on_several_machines_is_that_of_one_process(
    processes, folder, images, tmp_path, count, mesh, command, words
):
    words = [*(SHORT if command == "train" else SHORT[:4]), "--batch-size", "8", *words]
    words += ["--data", images] if "--caption" in words else []
    alone = (
        []
        if command == "reward" or "--fused-update" in words
        else ["--accumulate", 2 * count if "--accumulate" in words else count]
    )
    status, _, err = train(folder, "--out", tmp_path / "alone", *words, *alone, command=command)
    assert status == 0, err
    results = processes(count, train, folder, "--out", tmp_path / "run", *words, "--mesh", mesh, command=command)
    assert [status for status, _, _ in results] == [0] * count, results[0][2] + results[1][2]
    assert "note: no sample" not in results[0][2] and results[1][2] == ""
    ours, theirs = tensors(tmp_path / "run", 2), tensors(tmp_path / "alone", 2)
    # The moments: AdamW makes a step of the rounding of a gradient that is zero, as that of CLIP's keys' biases is.
    assert error(ours, theirs, ".mean." if "muon" not in words else ".momentum.") < 1e-5
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == words.count("--sample-every")


DISTIL = ["--to", "2", "--sample-every", "2"]
OTHERS = {
    "lora of a mean flow": ("distill", [*DISTIL, "--method", "meanflow", "--lora", "2"]),
    "fake score": ("distill", [*DISTIL, "--method", "rcm"]),
    "pairs": ("distill", [*DISTIL, "--method", "reflow"]),
    "nft": ("reward", ["--reward", "colours", "--sample-every", "2"]),
    "lora of grpo": ("reward", ["--reward", "colours", "--method", "grpo", "--lora", "2"]),
    "draft": ("reward", ["--reward", "psnr:IMAGE", "--prompts", "PROMPTS", "--method", "draft", "--kl", "0.1"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_teachers_and_references_are_divided_as_students_and_policies_are(processes, folder, images, tmp_path, name):
    command, words = OTHERS[name]
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\na green ring\n")
    replaced = {"PROMPTS": tmp_path / "prompts.txt", "psnr:IMAGE": f"psnr:{images / '1.png'}"}
    words = ["--steps", "2", "--save-every", "2", "--warmup", "0", *(replaced.get(word, word) for word in words)]
    parts = ["--accumulate", "2"] if command == "distill" else []
    alone = train(folder, "--out", tmp_path / "alone", *words, *parts, command=command)
    assert alone[0] == 0, alone[2]
    results = processes(2, train, folder, "--out", tmp_path / "run", *words, "--mesh", "fsdp=2", command=command)
    assert [status for status, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    assert "note: no sample" not in results[0][2] and results[1][2] == ""
    ours, theirs = tensors(tmp_path / "run", 2), tensors(tmp_path / "alone", 2)
    assert error(ours, theirs) < 1e-5
    assert any(leaf.abs().max() > 0 for path, leaf in theirs.items() if ".mean." in path)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == words.count("--sample-every")


@pytest.mark.parametrize("command", ["distill", "reward"])
def test_parts_in_bfloat16_learn_as_the_whole_does(processes, folder, tmp_path, command):
    """But for gradients that are rounded once, or in each part of the batch, and so for last places of weights."""
    own = {"distill": ["--to", "2"], "reward": ["--reward", "colours"]}[command]
    words = ["--steps", "2", "--save-every", "2", "--warmup", "0", "--weights", "bfloat16", *own]
    parts = ["--accumulate", "2"] if command != "reward" else []
    assert train(folder, "--out", tmp_path / "alone", *words, *parts, command=command)[0] == 0
    results = processes(2, train, folder, "--out", tmp_path / "run", *words, "--mesh", "fsdp=2", command=command)
    assert [status for status, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    ours, theirs = tensors(tmp_path / "run", 2), tensors(tmp_path / "alone", 2)
    # Images that are drawn in bfloat16 have other rewards, whose signs are AdamW's first steps.
    assert error(ours, theirs) < (0.1 if command == "reward" else 2e-3)
    assert command == "reward" or error(ours, theirs, ".mean.") < 0.1
    assert all(leaf.dtype == torch.bfloat16 for path, leaf in ours.items() if "params.transformer" in path)


def loaded(folder, *words):
    """Bytes in memory of the transformer's parameters in this process, and of its largest block once it is gathered."""
    from functional_sd3.cli import train as command
    from functional_sd3.cli import train_model
    from functional_sd3.core import computation
    from functional_sd3.parallel import mesh as meshes
    from functional_sd3.training import division

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(["--params", str(folder), "--data", "shapes", "--out", "out", *words])
    mesh = meshes.init({"fsdp": 2}) if "--mesh" in words else meshes.ONE_PROCESS
    _, model, _ = train_model.load(arguments, [folder], mesh=mesh)
    params = model.params["transformer"]
    config = division.with_parts(model.config, train_model.divided(arguments, model), mesh)
    gather = computation.of(config, "transformer").materialize or (lambda block: block)
    block = max(tree.nbytes(gather(block)) for block in params["blocks"])
    return sum(leaf.untyped_storage().nbytes() for leaf in tree.leaves(params)), block


@pytest.mark.parametrize("words", [["--lora", "2", "--dtype", "float32"], ["--lora", "2", "--base", "int8"], []])
def test_a_process_has_its_part_of_a_base_and_gathers_a_block(processes, folder, words):
    whole, block = loaded(folder, *words)
    for own, gathered in processes(2, loaded, folder, *words, "--mesh", "fsdp=2"):
        # The scales of weights in int8 are whole on every process.
        assert own < 0.6 * whole and gathered == block < 0.5 * whole
