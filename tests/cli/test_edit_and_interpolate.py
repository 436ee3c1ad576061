"""`edit` and `interpolate`: images edited to other prompts, and images between prompts."""

import inspect
import shlex

import pytest
import torch
from PIL import Image

from functional_sd3 import cli, pipeline, weights
from functional_sd3.cli import edit as words
from functional_sd3.cli import image_settings, parser
from functional_sd3.core import prng
from functional_sd3.image import pixels
from tests import models
from tests.models import parts

PROMPTS = ("a large red circle", "a blue star")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("edited")
    weights.save(root / "model", models.random_model())
    generator = torch.Generator().manual_seed(0)
    small = (torch.rand(8, 8, 3, generator=generator) * 255).byte().numpy()
    Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC).save(root / "in.png")
    (root / "text.png").write_text("hello")
    return root


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def edit(files, *words, out="out.png") -> torch.Tensor:
    told = ("edit", files / "in.png", "--from", PROMPTS[0], "--to", PROMPTS[1], "--params", files / "model")
    assert run(*told, "--steps", 4, "--out", files / out, *words) == 0
    return opened(files / out)


def opened(path) -> torch.Tensor:
    with Image.open(path) as image:
        return pixels.from_pil(image)


def frames(path) -> torch.Tensor:
    with Image.open(path) as image:
        found = []
        for index in range(image.n_frames):
            image.seek(index)
            found.append(pixels.from_pil(image.convert("RGB")))
        return torch.cat(found)


def strip(images: torch.Tensor) -> torch.Tensor:
    return pixels.from_bytes(pixels.to_bytes(pixels.grid(images, columns=len(images))))


def again(path, capsys) -> list[str]:
    capsys.readouterr()
    assert run("inspect", path) == 0
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert words[0] == "functional-sd3"
    return words[1:]


def test_edit_is_the_pipelines(files):
    model = weights.load(files / "model")
    told = {"eta": 0.5, "window": (0.25, 0.75), "source_cfg": 1.5, "steps": 4, "cfg": 3.0}
    expected = pipeline.edit(*parts(model), *PROMPTS, opened(files / "in.png"), **told)
    ours = edit(files, "--eta", 0.5, "--window", "0.25-0.75", "--source-cfg", 1.5, "--cfg", 3, "--offload")
    torch.testing.assert_close(ours, pixels.from_bytes(pixels.to_bytes(expected)), atol=1 / 254, rtol=0)
    told = {"strength": 0.5, "steps": 4}
    keys = prng.key(torch.tensor([3]))
    expected = pipeline.flow_edit(*parts(model), *PROMPTS, opened(files / "in.png"), keys, **told)
    ours = edit(files, "--direct", "--strength", 0.5, "--seed", 3)
    torch.testing.assert_close(ours, pixels.from_bytes(pixels.to_bytes(expected)), atol=1 / 254, rtol=0)


@pytest.mark.parametrize(
    "words",
    [
        ("--window", "0.5-1", "--eta", "0.25", "--method", "heun"),
        ("--exact", "--eta", "0"),
        ("--direct", "--seed", "4", "--cfg", "3"),
    ],
)
def test_inspect_prints_the_command_that_edits_again(files, capsys, words):
    first = edit(files, *words)
    assert run(*again(files / "out.png", capsys), "--out", files / "again.png") == 0
    assert torch.equal(opened(files / "again.png"), first) and not torch.equal(first, edit(files))


def test_an_image_of_before_is_edited_again_with_what_was_usual_then():
    settings = {"subcommand": "edit", "picture": "a.png", "from": "a", "to": "b"}
    settings |= {"direct": True, "steps": 28, "cfg": 5.0}
    image_settings.check(settings)
    words = shlex.split(image_settings.command(settings))
    assert words[2] == "a.png" and {"--source-cfg 2.0", "--strength 0.66", "--steps 28", "--cfg 5.0"} <= {
        f"{name} {value}" for name, value in zip(words, words[1:], strict=False)
    }


def test_defaults_are_those_of_the_pipeline():
    """`parser` knows them without torch."""

    def usual(function):
        return {name: each.default for name, each in inspect.signature(function).parameters.items()}

    for command, function in (("generate", pipeline.generate), ("interpolate", pipeline.interpolate)):
        for name in ("steps", "cfg"):
            assert parser.subparser(command).get_default(name) == usual(function)[name]
    for defaults, function in ((words.DEFAULTS, pipeline.edit), (words.DIRECT_DEFAULTS, pipeline.flow_edit)):
        known = usual(function)
        known["window"] = known.get("window") and "{:g}-{:g}".format(*known["window"])
        assert defaults == {name: known[name] for name in defaults}


def test_a_strip_goes_from_the_first_stop_to_the_last(files, capsys):
    common = ("--params", files / "model", "--steps", 3, "--out")
    assert run("interpolate", *PROMPTS, "--seeds", "3,5", "--frames", 4, *common, files / "strip.png") == 0
    found = opened(files / "strip.png")
    assert found.shape == (1, 3, 64, 4 * 66 - 2)
    ends = []
    for prompt, seed in zip(PROMPTS, (3, 5), strict=True):
        assert run("generate", prompt, "--seed", seed, *common, files / "end.png") == 0
        ends.append(opened(files / "end.png"))
    torch.testing.assert_close(found[..., :64], ends[0], atol=1 / 254, rtol=0)
    torch.testing.assert_close(found[..., -64:], ends[1], atol=1 / 254, rtol=0)
    assert run(*again(files / "strip.png", capsys), "--out", files / "again.png") == 0
    assert torch.equal(opened(files / "again.png"), found)


def test_a_folder_gets_a_strip_and_an_animation_of_the_same_images(files, tmp_path, capsys):
    words = ("interpolate", PROMPTS[0], "--seeds", "1,2,3", "--slerp", "--params", files / "model", "--steps", 2)
    assert run(*words, "--frames", 5, "--out", tmp_path) == 0
    paths = capsys.readouterr().out.split()
    assert [path.rsplit(".", 1)[1] for path in paths] == ["png", "gif"]
    seen = frames(paths[1])
    assert len(seen) == 5
    # A GIF has 256 colours.
    assert (strip(seen) - opened(paths[0])).abs().mean() < 0.03


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_holds_the_command_that_makes_it_again(files, tmp_path, capsys, suffix):
    out = tmp_path / f"x{suffix}"
    words = ("interpolate", PROMPTS[0], "--trajectory", "--denoised", "--seeds", 7, "--steps", 3, "--fps", 4)
    assert run(*words, "--params", files / "model", "--out", out) == 0
    assert len(frames(out)) == 3
    with Image.open(out) as image:
        image.seek(1)
        image.load()
        assert image.info["duration"] == 250
    assert run(*again(out, capsys), "--out", tmp_path / f"y{suffix}") == 0
    assert torch.equal(frames(tmp_path / f"y{suffix}"), frames(out))


def test_the_last_step_of_a_trajectory_is_the_image(files):
    common = (PROMPTS[0], "--params", files / "model", "--steps", 3, "--out")
    assert run("interpolate", "--seeds", 7, "--trajectory", *common, files / "steps.png") == 0
    assert run("generate", "--seed", 7, *common, files / "end.png") == 0
    torch.testing.assert_close(opened(files / "steps.png")[..., -64:], opened(files / "end.png"), atol=1 / 254, rtol=0)


def test_other_images_have_no_settings(tmp_path):
    for suffix in (".gif", ".webp", ".jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"plain{suffix}")
        assert image_settings.read_record(tmp_path / f"plain{suffix}") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("edit", "{}/none.png"), "{}/none.png is no file"),
        (("edit", "{}/text.png"), "{}/text.png: not a readable image"),
        (("edit", "{}/in.png", "--eta", 2), "--eta 2.0 must be between 0 and 1"),
        (("edit", "{}/in.png", "--exact", "--source-cfg", 1e4), "--exact: sample 0 at t = "),
        (("edit", "{}/in.png", "--window", "half"), "--window 'half' must be START-END"),
        (("edit", "{}/in.png", "--window", "0.5-0.25"), "--window 0.5-0.25 must be START <= END <= 1"),
        (("edit", "{}/in.png", "--exact", "--method", "bosh3"), "bosh3 chooses its own steps, which cannot be undone"),
        (("edit", "{}/in.png", "--strength", 0.5), "--strength needs --direct"),
        (("edit", "{}/in.png", "--direct", "--eta", 0.5), "which --direct does not go"),
        (("interpolate", "a"), "1 prompts and 1 --seeds: give two or more"),
        (("interpolate", "a", "b", "--seeds", "1,2,3"), "2 prompts and 3 --seeds"),
        (("interpolate", "a", "b", "--seeds", "one"), "--seeds 'one' must be whole numbers"),
        (("interpolate", "a", "b", "--frames", 1), "--frames 1 must be at least 2"),
        (("interpolate", "a", "b", "--fps", 0), "--fps 0.0 must be above 0"),
        (("interpolate", "a", "b", "--trajectory"), "--trajectory shows one prompt and one seed"),
        (("interpolate", "a", "b", "--denoised"), "--denoised needs --trajectory"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(files, tmp_path, capsys, words, message):
    words = [str(word).format(files) for word in words]
    if words[0] == "edit":
        words += ["--from", "a", "--to", "b"]
    assert run(*words, "--params", files / "model", "--steps", 2, "--out", tmp_path / "x.png") == 1
    error = capsys.readouterr().err
    assert message.format(files) in error and error.count("\n") == 1
    assert "tolerance=" not in error
    assert list(tmp_path.iterdir()) == []
