"""ControlNets on the command line: which one reads which image, and messages for words that make no sense."""

import dataclasses
import json
import shlex

import pytest
import torch
from PIL import Image, ImageChops

from functional_sd3 import cli, weights
from functional_sd3.cli import image_settings
from functional_sd3.core import spec as specs
from functional_sd3.text import textual_inversion
from functional_sd3.transformer import controlnet
from functional_sd3.weights.controlnets import ControlNet
from tests import models

PROMPT = "a large red circle on a white background"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("control")
    model = models.random_model()
    weights.save(root / "model", model)
    sizes = {name: getattr(model.config.transformer, name) for name in ("heads", "head_dim", "pooled_width")}
    config = controlnet.Config(
        depth=2, **sizes, context_width=None, has_patch_embedding=False, position_size=None, zero_pooled=False
    )
    generator = torch.Generator().manual_seed(0)
    leaf = lambda path, param: 0.3 * torch.randn(param.shape, generator=generator)  # noqa: E731
    net = ControlNet(specs.map_params(leaf, controlnet.spec(config)), config)
    weights.save_controlnet(root / "any", net)
    canny = net._replace(config=dataclasses.replace(config, kind="canny"))
    weights.save_controlnet(root / "canny.safetensors", canny, layout="stability")
    masked = dataclasses.replace(config, extra_channels=1)
    net = ControlNet(specs.map_params(leaf, controlnet.spec(masked)), masked)
    weights.save_controlnet(root / "inpaint", net)
    other = dataclasses.replace(config, heads=3)
    other_params = specs.map_params(leaf, controlnet.spec(other))
    weights.save_controlnet(root / "other", ControlNet(other_params, other))
    generator.manual_seed(1)
    pixels = (torch.rand(64, 64, 4, generator=generator) * 255).byte().numpy()
    Image.fromarray(pixels).save(root / "transparent.png")
    Image.fromarray(pixels[..., :3].copy()).save(root / "edges.png")
    Image.fromarray(pixels[:32, :, :3].copy()).save(root / "wide.png")
    Image.fromarray(pixels[:32, :32, :3].copy()).save(root / "small.png")
    return root


def draw(files, *words) -> torch.Tensor:
    out = files / "out.png"
    common = ["generate", PROMPT, "--params", files / "model", "--steps", 2, "--out", out]
    assert cli.main([str(word) for word in (*common, *words)]) == 0
    with Image.open(out) as image:
        return torch.tensor(list(image.tobytes()))


def test_an_image_is_followed_as_strongly_as_its_scale_says(files):
    plain = draw(files)
    net = ("--controlnet", files / "any")
    assert torch.equal(draw(files, *net, "--control", f"depth={files}/edges.png:0"), plain)
    full = draw(files, *net, "--control", f"depth={files}/edges.png")
    assert not torch.equal(full, plain)
    assert torch.equal(draw(files, *net, "--control", f"depth={files}/edges.png:1:0-1"), full)
    assert not torch.equal(draw(files, *net, "--control", f"depth={files}/edges.png:1:0-0.5"), full)
    assert not torch.equal(draw(files, *net, "--control", f"depth={files}/edges.png", "--control-after-last"), full)
    assert draw(files, *net, "--control", f"depth={files}/small.png").shape == full.shape


def test_several_images_find_their_readers_by_kind_and_the_settings_say_them_again(files):
    words = ["--controlnet", files / "any", "--controlnet", files / "canny.safetensors"]
    words += ["--control", f"canny={files}/edges.png:0.5", "--control", f"blur={files}/edges.png:2"]
    first = draw(files, *words, "--control-after-last")
    with Image.open(files / "out.png") as image:
        settings = json.loads(image.info[image_settings.METADATA])["command"]
    said = image_settings.command(settings)
    assert f"--control canny={files}/edges.png:0.5" in said and said.endswith("--control-after-last")
    again = shlex.split(said)
    assert torch.equal(draw(files, *again[again.index("--control") :]), first)


def test_what_is_transparent_is_painted_anew(files):
    net = ("--controlnet", f"inpaint={files}/inpaint")
    masked = draw(files, *net, "--control", f"inpaint={files}/transparent.png")
    assert not torch.equal(masked, draw(files, *net, "--control", f"inpaint={files}/edges.png"))


def test_words_of_ones_own_are_typed_like_any_other(files, capsys):
    width = weights.load(files / "model", only="clip_l").config.clip_l.width
    word = textual_inversion.Word("<thing>", {"clip_l": 3 * torch.ones(2, width)})
    weights.save_inversion(files / "thing.safetensors", word)
    weights.save_inversion(files / "renamed.safetensors", word)
    common = ["generate", "a <thing> on a <dog>", "--params", files / "model", "--steps", 1, "--out"]
    drawn = []
    for number, words in enumerate(([], ["thing.safetensors"], ["<dog>=thing.safetensors"])):
        told = [word for text in words for word in ("--embedding", text.replace("thing.s", f"{files}/thing.s"))]
        assert cli.main([str(word) for word in (*common, files / f"{number}.png", *told)]) == 0
        with Image.open(files / f"{number}.png") as image:
            drawn.append(image.tobytes())
    assert len(set(drawn)) == 3
    assert "no prompt has" not in capsys.readouterr().err
    renamed = ["generate", "a <renamed>", *common[2:], files / "x.png", "--embedding", files / "renamed.safetensors"]
    assert cli.main([str(word) for word in renamed]) == 0
    assert "no prompt has <thing>, the word that --embedding adds" in capsys.readouterr().err
    assert f"--embedding {files}/thing.safetensors" in image_settings.command(
        image_settings.read_record(files / "1.png")["command"]
    )


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_emphasis_and_long_prompts_are_settings_of_a_image(files, monkeypatch):
    # oneDNN sums products of other sizes in another order: what is alone in its batch would be a rounding apart.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    prompts = ["a (red:1.9) circle " + "on white " * 40, "a blue star"]
    common = ["--params", files / "model", "--steps", 1, "--out"]
    drawn = {}
    for words in ((), ("--weighted",), ("--long",), ("--weighted", "--long")):
        out = files / "prompts.png"
        assert cli.main([str(word) for word in ("generate", *prompts, *common, out, *words)]) == 0
        assert image_settings.command(image_settings.read_record(out)["command"]).endswith(" ".join(words))
        assert cli.main([str(word) for word in ("generate", prompts[1], *common, files / "alone.png", *words)]) == 0
        with Image.open(out) as both, Image.open(files / "alone.png") as alone:
            drawn[words] = both.tobytes()
            again = both.crop((66, 0, 130, 64))
            # A batch of another size may be summed in another order.
            assert max(high for _, high in ImageChops.difference(alone, again).getextrema()) <= 1
    assert len(set(drawn.values())) == 4


@pytest.mark.parametrize(
    "words, message",
    [
        (["--control", "edges.png"], "--control 'edges.png' must be KIND=IMAGE"),
        (["--control", "edge=edges.png"], "kind 'edge' must be one of blur, canny, depth"),
        (["--control", "canny={}/edges.png"], "needs --controlnet canny=PATH"),
        (["--controlnet", "{}/any"], "1 --controlnet for 0 images"),
        (["--control", "canny={}/edges.png:11", "--controlnet", "{}/any"], "scale 11.0 of a ControlNet must be in"),
        (["--control", "canny={}/edges.png:1:0.6-0.4", "--controlnet", "{}/any"], "start 0.6 and end 0.4"),
        (["--control", "canny={}/edges.png:1.2.3", "--controlnet", "{}/any"], "its scale '1.2.3' must be a number"),
        (["--control", "canny={}/no.png", "--controlnet", "{}/any"], "{}/no.png: the file is missing"),
        (["--control", "canny={}/model/model_index.json", "--controlnet", "{}/any"], "not a readable image"),
        (["--control", "canny={}/wide.png", "--controlnet", "{}/any"], "wide.png is 64x32, but what is drawn is 64x64"),
        (["--control", "canny={}/edges.png", "--controlnet", "{}/other"], "made for another model: its width is 48"),
        (["--control", "blur={}/edges.png", "--controlnet", "blur={}/canny.safetensors"], "reads images of canny"),
        (
            ["--control", "canny={}/edges.png", "--controlnet", "{}/model"],
            "config.json of a ControlNet: it holds a whole model",
        ),
    ],
)
def test_words_that_make_no_sense_end_in_a_line(files, words, message, capsys):
    words = [word.format(files) for word in words]
    common = ["generate", PROMPT, "--params", str(files / "model"), "--steps", "1", "--out", str(files / "x.png")]
    assert cli.main([*common, *words]) == 1
    error = capsys.readouterr().err
    assert message.format(files) in error and "Traceback" not in error


def test_a_depth_map_of_sixteen_bits_is_the_one_of_eight_and_finer(files):
    import numpy

    from functional_sd3.cli import controls

    ramp = numpy.arange(64 * 64, dtype=numpy.uint16).reshape(64, 64) * 16
    Image.fromarray(ramp).save(files / "depth.png")
    Image.fromarray(ramp // 256).convert("L").save(files / "coarse.png")
    deep, _ = controls._image(files / "depth.png", (64, 64), False)
    coarse, _ = controls._image(files / "coarse.png", (64, 64), False)
    torch.testing.assert_close(deep[0, 0], torch.from_numpy(ramp.astype(numpy.float32)) / 65535)
    torch.testing.assert_close(deep, coarse, atol=1 / 255, rtol=0)
    assert len(deep.unique()) == 4096
    # Resized before it is rounded.
    half, _ = controls._image(files / "depth.png", (32, 32), False)
    assert half.shape == (1, 3, 32, 32) and len(half.unique()) > 512 and 0 <= half.min() and half.max() <= 1
