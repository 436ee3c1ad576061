"""The record inside an image: the request that draws this very image again, and the files of the command."""

import hashlib
import json

import pytest
import torch
from PIL import Image

import functional_sd3
from functional_sd3 import cli, lora, pipeline, weights
from functional_sd3.cli import image_settings
from functional_sd3.core import prng, tree
from functional_sd3.image import pixels
from functional_sd3.weights import shipped
from tests import models

RED, BLUE = "a large red circle on a white background", "a small blue star on a black background"


@pytest.fixture(scope="module")
def tiny():
    return weights.load(shipped.folder(), dtype=torch.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("recorded"), models.random_model()
    weights.save(folder / "model", model)
    style = lora.init(prng.key(1), model.config, 2, "transformer.blocks.*")
    style = tree.map_with_path(lambda path, leaf: leaf + 0.1 if path.endswith("up") else leaf, style)
    lora.save(folder / "style.safetensors", style)
    Image.new("RGB", (64, 64), (200, 40, 40)).save(folder / "in.png")
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    half.save(folder / "mask.png")
    return folder


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def drawn_again(model, path, given=None) -> torch.Tensor:
    """The bytes of the image that the request of a file draws, alone and in Python."""
    request = pipeline.read_description(image_settings.read_record(path)["request"], given)
    images = pipeline.draw(model.params, model.config, pipeline.prepare(*model[:3], request))
    return pixels.to_bytes(images)[0].int()


def bytes_of(path) -> torch.Tensor:
    with Image.open(path) as image:
        return pixels.to_bytes(pixels.from_pil(image))[0].int()


def test_an_image_is_drawn_again_from_its_record(tiny, tmp_path):
    words = ("--steps", 4, "--negative", "a ring", "--guidance", "zero-star:scale=3", "--method", "heun", "--seed", 7)
    assert run("generate", RED, *words, "--out", tmp_path / "one.png") == 0
    assert torch.equal(drawn_again(tiny, tmp_path / "one.png"), bytes_of(tmp_path / "one.png"))
    record = image_settings.read_record(tmp_path / "one.png")
    assert record["program"] == f"functional_sd3 {functional_sd3.__version__}"
    assert record["model"] == {"params": ["tiny"], "dtype": "float32", "device": "cpu"}
    assert record["request"]["sampling"]["guidance"] == {"kind": "guidance.zero_star", "scale": 3.0}


def test_the_steps_of_a_trajectory_are_drawn_again_from_its_record(tiny, tmp_path):
    for name, option in (("states", ()), ("denoised", ("--denoised",))):
        path = tmp_path / f"{name}.png"
        assert run("interpolate", RED, "--trajectory", *option, "--steps", 3, "--out", path) == 0
        request = pipeline.read_description(image_settings.read_record(path)["request"])
        with torch.no_grad():
            images = pipeline.draw(tiny.params, tiny.config, pipeline.prepare(*tiny, request))
        assert images.shape[:2] == (3, 1)
        assert torch.equal(pixels.to_bytes(pixels.grid(images.flatten(0, 1), columns=3))[0].int(), bytes_of(path))
    assert not torch.equal(bytes_of(tmp_path / "states.png"), bytes_of(tmp_path / "denoised.png"))


def test_each_image_of_a_batch_has_its_own_prompt_and_key(tiny, tmp_path):
    words = ("generate", RED, BLUE, "--count", 2, "--seed", 5, "--steps", 2, "--variation", "3:0.2")
    assert run(*words, "--out", f"{tmp_path}/") == 0
    files = sorted(path for path in tmp_path.glob("*.png") if path.name != "grid.png")
    assert len(files) == 4
    for path in files:
        # Within a batch products are summed in another order than alone: a byte may be rounded to its neighbour.
        assert (drawn_again(tiny, path) - bytes_of(path)).abs().max() <= 1
        assert image_settings.read_record(path)["request"]["prompts"] in ([RED], [BLUE])
    grid = image_settings.read_record(tmp_path / "grid.png")["request"]
    assert grid["prompts"] == [RED, RED, BLUE, BLUE] and grid["key"]["values"] == [[0, 5]] * 4
    assert [key[1] for key in grid["variation"]["key"]["values"]] == [3, 4, 3, 4]


def test_a_lora_of_a_folder_is_recorded_by_the_file_that_is_read(place, tmp_path):
    name = "pytorch_lora_weights.safetensors"
    content = (place / "style.safetensors").read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_bytes(content)
    words = (
        "--params",
        place / "model",
        "--steps",
        1,
        "--lora",
        f"{tmp_path / 'run'}=0.5",
        "--out",
        tmp_path / "a.png",
    )
    assert run("generate", "a ring", *words) == 0
    files = image_settings.read_record(tmp_path / "a.png")["files"]
    digest = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert files == {str(tmp_path / "run" / name): digest}


def test_loras_images_and_masks_are_recorded_by_their_files(place, tmp_path):
    words = ("generate", "a ring", "--params", place / "model", "--steps", 2, "--image", place / "in.png")
    words += ("--mask", place / "mask.png", "--lora", f"{place}/style.safetensors=0.5", "--offload")
    assert run(*words, "--out", tmp_path / "a.png") == 0
    record = image_settings.read_record(tmp_path / "a.png")
    for name in ("in.png", "mask.png", "style.safetensors"):
        content = (place / name).read_bytes()
        digest = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert record["files"][str(place / name)] == digest
    request = record["request"]
    assert request["start"]["strength"] == 1.0 and request["start"]["images"]["shape"] == [1, 3, 64, 64]
    assert request["loras"][0]["scale"] == 0.5 and request["loras"][0]["lora"]["kind"] == "parameters"
    model = weights.load(place / "model", dtype=torch.float32)
    given = {
        "start.images": pixels.from_pil(Image.open(place / "in.png")),
        "start.mask": pixels.from_pil(Image.open(place / "mask.png"))[:, :1],
        "loras.0.lora": lora.load(place / "style.safetensors", model.config),
    }
    assert torch.equal(drawn_again(model, tmp_path / "a.png", given), bytes_of(tmp_path / "a.png"))


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_edits_and_frames_are_recorded(place, tmp_path, suffix):
    words = ("--params", place / "model", "--steps", 2)
    assert (
        run("edit", place / "in.png", "--from", "a", "--to", "b", "--direct", *words, "--out", tmp_path / "e.png") == 0
    )
    edit = image_settings.read_record(tmp_path / "e.png")
    assert edit["request"]["edit"] == {"kind": "FlowEdit", "source": ["a"], "cfg": 3.5, "averages": 1}
    assert edit["request"]["start"]["strength"] == 0.66 and str(place / "in.png") in edit["files"]
    out = tmp_path / f"i{suffix}"
    assert run("interpolate", "a", "b", "--frames", 3, "--slerp", *words, "--out", out) == 0
    frames = image_settings.read_record(out)["request"]
    assert frames["frames"]["count"] == 3 and frames["frames"]["mix"]["name"].endswith("slerp")
    assert frames["prompts"] == ["a", "b"]


def test_inspect_prints_the_request_and_the_command_and_reads_images_of_before(tiny, tmp_path, capsys):
    assert run("generate", RED, "--steps", 2, "--cfg", 3, "--out", tmp_path / "x.jpg") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "x.jpg") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "request: Request" in lines and "    cfg: 3.0" in lines and f"program: {_program()}" in lines
    assert "noise" not in "".join(lines) and lines[-1].startswith("functional-sd3 generate")
    image = Image.new("RGB", (8, 8))
    old = {"prompts": ["a red circle"], "seed": 4, "steps": 2, "cfg": 4.5}
    image.save(tmp_path / "old.jpg", comment=f"functional_sd3 {json.dumps(old)}".encode())
    assert image_settings.read_record(tmp_path / "old.jpg") == {"command": old}
    assert run("inspect", tmp_path / "old.jpg") == 0
    assert "--seed 4 --steps 2 --cfg 4.5" in capsys.readouterr().out.splitlines()[-1]


def _program() -> str:
    return f"functional_sd3 {functional_sd3.__version__}"
