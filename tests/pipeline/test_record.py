"""A request as plain data: nothing that influences an image is missing, and what is read back draws the same image."""

import dataclasses
import json
from typing import get_args

import pytest
import torch

from functional_sd3 import lora, pipeline
from functional_sd3.core import attention_variants, prng, transform, tree
from functional_sd3.flow import caches, guidance, ode
from functional_sd3.flow.ode import fixed_point
from functional_sd3.pipeline import (
    FlowEdit,
    Frames,
    InversionEdit,
    Region,
    Request,
    SamplingOptions,
    StartImages,
    TextOptions,
    Tiling,
    Variation,
    record,
)
from functional_sd3.pipeline import request as requests
from functional_sd3.text import textual_inversion
from functional_sd3.transformer import controlnet, ip_adapter
from functional_sd3.transformer.control import Control
from tests.models import parts

KEY = prng.key(3)[None]
IMAGES = torch.nn.functional.interpolate(prng.uniform(prng.key(9), (1, 3, 6, 6)), (64, 64), mode="bicubic").clamp(0, 1)
MASK = (torch.arange(64) < 32).float().expand(1, 1, 64, 64)
GUIDANCES = {
    "cfg": guidance.cfg(4.0),
    "zero_star": guidance.zero_star(torch.tensor([2.0])),
    "tangential": guidance.tangential(3.0),
    "magnitude_aware": guidance.magnitude_aware(3.0, 7.0),
    "apg": guidance.apg(3.0, momentum=0.0, longest=None),
    "mixed_apg": guidance.mixed_apg(3.0, first=1),
    "skip_layer": guidance.skip_layer(guidance.rescaled(guidance.cfg(3.0), 0.5), [1], stop=1.0),
    "perturbed": guidance.perturbed(guidance.cfg(3.0), [1], 2.0, 0.0, 0.5),
    "smoothed": guidance.smoothed(guidance.cfg(3.0), (1,)),
    "interval": guidance.interval(guidance.cfg(3.0), 0.0, 0.5),
    "zero_init": guidance.zero_init(guidance.zero_star(3.0), 1),
    "none": guidance.cfg(1.0),
}


def draw(model, request):
    return pipeline.draw(model.params, model.config, pipeline.prepare(*parts(model), request))


def written(request):
    """What a file would hold."""
    return json.loads(json.dumps(pipeline.describe(request), allow_nan=False))


def small_lora(config):
    return lora.init(prng.key(5), config, 2, "transformer.blocks.0.*")


def changes(model) -> dict[type, dict[str, object]]:
    """A value of every field of a request's parts, other than its usual one."""
    width = model.config.clip_l.width
    net = controlnet.Config(depth=1, heads=2, head_dim=16, pooled_width=8)
    control = Control({"weight": torch.ones(1)}, net, torch.zeros(1, 16, 8, 8))
    image_prompt = ip_adapter.ImagePrompt({"weight": torch.ones(1)}, ip_adapter.Config(1, 32), torch.ones(1, 2, 4))
    return {
        Request: {
            "prompts": ["other"], "key": prng.key(4)[None], "text": TextOptions("ring"), "height": 32, "width": 32,
            "sampling": SamplingOptions(3), "noise": prng.normal(prng.key(1), (1, 16, 8, 8)),
            "variation": Variation(KEY), "start": StartImages(IMAGES), "regions": [Region("a", MASK)],
            "tiling": Tiling(), "frames": Frames(), "field": pipeline.velocity, "words": [
                textual_inversion.Word("<a>", {"clip_l": torch.ones(1, width)})],
            "loras": [(small_lora(model.config), 0.5)], "edit": FlowEdit(["a"]),
            "show": pipeline.states,
        },
        TextOptions: {"negative": "ring", "t5_length": 8, "weighted": True, "long_prompts": True},
        SamplingOptions: {
            "steps": 2, "cfg": torch.tensor([2.0]), "guidance": guidance.cfg(2.0), "method": "heun",
            "skip_layers": [1], "control": [control], "image_prompt": image_prompt,
            "block_transform": transform.compile, "implementation": "math", "on_step": print,
            "attend": attention_variants.windowed((4, 4), 1), "cache": "hold",
        },
        caches.Extrapolate: {"every": 3, "order": 2, "warmup": 0.25, "final": 2, "fitted": True},
        caches.Tolerance: {"tolerance": 0.1, "order": 0, "longest": 2, "warmup": 5, "final": 2},
        caches.FirstBlock: {"threshold": 0.2, "warmup": 5, "final": 2},
        caches.TeaCache: {"threshold": 0.2, "polynomial": (2.0, 0.0), "warmup": 5, "final": 2},
        StartImages: {"images": IMAGES * 0.5, "strength": 0.5, "mask": MASK, "soften": 1.0, "restore": True,
                      "posterior_key": KEY},
        Variation: {"key": prng.key(1), "amount": 0.3},
        Tiling: {"side": 64, "overlap": 16},
        InversionEdit: {"source": ["b"], "cfg": 2.0, "eta": 0.5, "window": (0.0, 0.5),
                        "inversion": fixed_point.inverse},
        FlowEdit: {"source": ["b"], "cfg": 2.0, "averages": 2},
        Frames: {"count": 3, "mix": pipeline.slerp},
    }  # fmt: skip


USUAL = {
    Request: lambda **told: Request(**{"prompts": ["a", "b"] if "frames" in told else "a", "key": KEY,
                                       **({"start": StartImages(IMAGES)} if "edit" in told else {}), **told}),
    StartImages: lambda **told: StartImages(**{"images": IMAGES, **told}),
    Variation: lambda **told: Variation(**{"key": KEY, **told}),
    InversionEdit: lambda **told: InversionEdit(**{"source": ["a"], **told}),
    FlowEdit: lambda **told: FlowEdit(**{"source": ["a"], **told}),
}  # fmt: skip


def test_every_field_of_every_part_of_a_request_is_recorded(model):
    """So that a field added later cannot be forgotten: without a value of it in `changes` this fails."""
    ours = {kind for kind in vars(requests).values() if dataclasses.is_dataclass(kind) and isinstance(kind, type)}
    ours |= set(get_args(caches.Cache))
    assert set(changes(model)) == ours == {kind for kind in record._PARTS.values() if dataclasses.is_dataclass(kind)}
    for kind, others in changes(model).items():
        names = {field.name for field in dataclasses.fields(kind)}
        assert set(others) == names
        make = USUAL.get(kind, kind)
        plain = written(make())
        assert set(plain) == {"kind"} | (names - record.UNRECORDED)
        for name, value in others.items():
            changed = written(make(**{name: value}))
            if name not in record.UNRECORDED:
                assert changed[name] != plain[name], f"{kind.__name__}.{name}"
    assert record.UNRECORDED == {"on_step"}


@pytest.mark.parametrize("name", GUIDANCES)
def test_a_guidance_is_recorded_with_its_parameters_and_read_back(model, name):
    request = Request("a red circle", KEY, sampling=SamplingOptions(2, guidance=GUIDANCES[name]))
    again = pipeline.read_description(written(request))
    assert written(again) == written(request)
    assert torch.equal(draw(model, again), draw(model, request))


def test_every_guidance_of_the_package_says_how_it_was_made():
    made = {name for name in guidance.__all__ if hasattr(getattr(guidance, name), "__wrapped__")}
    assert made == set(GUIDANCES) - {"none"} | {"rescaled", "auto", "composed"}
    assert pipeline.describe(GUIDANCES["skip_layer"]) == {
        "kind": "guidance.skip_layer", "layers": [1], "scale": 2.5, "start": 0.01, "stop": 1.0,
        "guidance": {"kind": "guidance.rescaled", "factor": 0.5, "guidance": {"kind": "guidance.cfg", "scale": 3.0}},
    }  # fmt: skip


@pytest.mark.parametrize("method", [None, "euler_ancestral", ode.HEUN, ode.BOSH3._replace(rtol=1.0, atol=1.0)])
def test_what_is_read_back_draws_the_same_image(model, method):
    options = SamplingOptions(2, 3.0, method=method, skip_layers=(2,))
    for request in (
        Request("a red circle", KEY, TextOptions("a ring", 24, True), options, height=32, width=48),
        Request("a red circle", noise=prng.normal(prng.key(1), (1, 16, 8, 4)), sampling=options, key=KEY),
        Request("a red circle", KEY, sampling=options, tiling=Tiling(64, 16), height=64, width=80),
    ):
        again = pipeline.read_description(written(request))
        assert torch.equal(draw(model, again), draw(model, request))
    frames = Request(["a", "b"], KEY, sampling=options, frames=Frames(3, pipeline.slerp))
    assert torch.equal(draw(model, pipeline.read_description(written(frames))), draw(model, frames))


def test_large_tensors_and_parameters_are_described_and_must_be_given_anew(model):
    sampling = SamplingOptions(2, control=())
    start = StartImages(IMAGES, 0.5, MASK)
    request = Request("a", KEY, sampling=sampling, start=start, loras=[(small_lora(model.config), 0.5)])
    description = written(request)
    assert description["start"]["images"]["shape"] == [1, 3, 64, 64]
    assert description["start"]["images"]["sha256"] != written(StartImages(IMAGES + 1e-3))["images"]["sha256"]
    assert description["loras"][0]["lora"]["kind"] == "parameters" and description["loras"][0]["scale"] == 0.5
    for path in ("start.images", "start.mask", "loras.0.lora"):
        given = {"start.images": IMAGES, "start.mask": MASK, "loras.0.lora": request.loras[0].lora}
        del given[path]
        with pytest.raises(ValueError, match=f"{path}: a description does not hold .*; give it by this path"):
            pipeline.read_description(description, given)
    again = pipeline.read_description(description, {**given, "loras.0.lora": request.loras[0].lora})
    assert torch.equal(draw(model, again), draw(model, request))


def test_a_given_part_that_the_description_lacks_is_named():
    description = written(Request("a", KEY))
    assert pipeline.read_description(description, {"sampling.steps": 5}).sampling.steps == 5
    with pytest.raises(ValueError, match=r"has no part sampling\.step, which is given"):
        pipeline.read_description(description, {"sampling.step": 5})


def test_a_description_nested_beyond_any_request_is_refused():
    nested = {"kind": "TextOptions"}
    for _ in range(2000):
        nested = {"kind": "AppliedLora", "lora": nested}
    with pytest.raises(ValueError, match="too deep in one another"):
        pipeline.read_description(nested)


def test_what_cannot_be_written_is_said(model):
    own = guidance.cfg(2.0)._replace(made_by=None)
    options = SamplingOptions(guidance=own, method=ode.EULER._replace(order=7), block_transform=lambda f: f)
    described = written(Request("a", KEY, sampling=options, field=lambda *parts: None))["sampling"]
    assert {described[name]["kind"] for name in ("guidance", "method", "block_transform")} == {"unwritten"}
    assert "no function of flow.guidance" in described["guidance"]["name"]
    assert "euler" in described["method"]["name"] and "<lambda>" in described["block_transform"]["name"]
    assert written(SamplingOptions(cfg=torch.tensor([1.5, 2.0])))["cfg"]["values"] == [1.5, 2.0]
    assert written(guidance.smoothed(own, [1]))["sigma"] == {"kind": "float", "value": "inf"}
    stochastic = ode.named("euler_ancestral", key=KEY)
    assert written(SamplingOptions(method=stochastic))["method"]["kind"] == "unwritten"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("k", "cfg"), ({}, "kind"), ({"kind": ["cfg"]}, "by this path"), ({"kind": "os.system"}, "by this path"),
        ({"kind": "function", "name": "weights.save"}, "weights.save"), ({"kind": "guidance.together"}, "together"),
        ({"kind": "guidance.__name__"}, "__name__"), ({"kind": "guidance.cfg", "scale": "x"}, "scale"),
        ({"kind": "guidance.cfg"}, "cfg is no .*there is no 'scale'"),
        ({"kind": "guidance.cfg", "scale": 1, "more": 2}, "more"),
        ({"kind": "ode.nothing"}, "nothing"), ({"kind": "ode.dopri5", "steps": 1}, "steps"),
        ({"kind": "tensor", "values": [[1], []], "dtype": "float32"}, "cfg is no"),
        ({"kind": "float", "value": "x"}, "cfg is no"), ({"kind": "float"}, "cfg is no .*there is no 'value'"),
        ({"kind": "tensor", "dtype": "float32"}, "cfg is no .*there is no 'values'"),
        ({"kind": "tensor", "shape": [2, 3], "sha256": "ab"}, "this tensor of 2 x 3 numbers .*ab"),
        ({"kind": "tensor", "values": [1], "dtype": "load"}, "load is no dtype"),
        ({"kind": "tensor", "values": [10**400], "dtype": "int64"}, "cfg is no"),
        ({"kind": "TextOptions", "steps": 3}, "steps"),
    ],
)  # fmt: skip
def test_a_description_of_others_is_refused_where_it_is_none(part, message):
    """Files come from anywhere: no other function is looked up, and the error is a ValueError."""
    request = {**written(Request("a", KEY)), "sampling": {**written(SamplingOptions()), "cfg": part}}
    with pytest.raises(ValueError, match=message):
        pipeline.read_description(request)
    with pytest.raises(ValueError):
        pipeline.read_description(part if isinstance(part, dict) else {"kind": part})


def test_loras_and_words_of_a_request_are_those_added_to_the_model(model):
    added = lora.init(prng.key(5), model.config, 2, lambda path, _: path.startswith(("transformer.", "clip_l.", "t5.")))
    # `init` starts `up` at zero, which changes nothing.
    added = tree.map_with_path(lambda path, leaf: leaf + 0.05 if path.endswith("up") else leaf, added)
    word = textual_inversion.Word("<thing>", {"clip_l": 3 * torch.ones(2, model.config.clip_l.width)})
    learned = textual_inversion.add(*parts(model), word)
    options = {"steps": 2, "t5_length": 24}
    expected = pipeline.generate(
        lora.apply(learned.params, added, 0.5, lazy=True), *learned[1:], "a <thing>", KEY, **options
    )
    text = TextOptions(t5_length=24)
    request = Request("a <thing>", KEY, text, SamplingOptions(2), loras=[(added, 0.5)], words=[word])
    assert torch.equal(draw(model, request), expected)
    # One component at a time.
    fetch, read = model.params.__getitem__, []
    components = lambda name: (read.append(name), fetch(name))[1]  # noqa: E731
    prepared = pipeline.prepare(components, *parts(model)[1:], request)
    assert torch.equal(pipeline.draw(components, model.config, prepared), expected)
    assert sorted(read) == sorted(["clip_l", "clip_g", "t5", "transformer", "vae"])
    plain = draw(model, dataclasses.replace(request, loras=(), words=()))
    assert not torch.equal(plain, expected)
    without = model._replace(params={name: part for name, part in model.params.items() if name != "t5"})
    with pytest.raises(ValueError, match="a LoRA adapts t5, which this model lacks"):
        pipeline.prepare(*parts(without), request)


@pytest.mark.parametrize(
    "name", ["generate", "image_to_image", "outpaint", "tiled", "interpolate", "trajectory", "edit"]
)
def test_every_function_that_draws_takes_loras(model, name):
    style = small_lora(model.config)
    style = tree.map_with_path(lambda path, leaf: leaf + 0.2 if path.endswith("up") else leaf, style)
    calls = {
        "image_to_image": ("a", IMAGES, KEY),
        "outpaint": ("a", IMAGES, KEY),
        "edit": ("a", "b", IMAGES),
        "interpolate": (["a", "b"], KEY),
    }
    more = {"tiled": {"height": 64, "width": 80}, "outpaint": {"right": 16}, "interpolate": {"frames": 2}}.get(name, {})
    function, words = getattr(pipeline, name), calls.get(name, ("a", KEY))
    merged = model._replace(params=lora.apply(model.params, style, 0.5, lazy=True))
    expected = function(*parts(merged), *words, steps=2, **more)
    assert torch.equal(function(*parts(model), *words, steps=2, loras=[(style, 0.5)], **more), expected)
    assert not torch.equal(function(*parts(model), *words, steps=2, **more), expected)
