"""A request is one frozen value: every function that draws makes one, and its stages can be taken apart."""

import dataclasses
import inspect
import typing

import pytest
import torch

from functional_sd3 import look, pipeline
from functional_sd3.core import prng
from functional_sd3.flow import caches, guidance, ode
from functional_sd3.pipeline import FlowEdit, Frames, InversionEdit, Request, SamplingOptions, StartImages, TextOptions
from tests.models import parts

PROMPTS = ["a red circle", "a blue star", "a red circle"]
KEYS = prng.split(prng.key(8), 3)
FAST = SamplingOptions(steps=2, cfg=2.0)
DRAWING = (
    "generate", "generate_from", "image_to_image", "inpaint", "outpaint", "regional", "tiled", "variations",
    "interpolate", "trajectory", "edit", "flow_edit", "look.trace",
)  # fmt: skip


def function_of(name):
    return look.trace if name == "look.trace" else getattr(pipeline, name)


def draw(model, request, **options):
    prepared = pipeline.prepare(*parts(model), request)
    return pipeline.draw(model.params, model.config, prepared, **options)


def images(count=1):
    small = prng.uniform(prng.key(9), (count, 3, 6, 6))
    return torch.nn.functional.interpolate(small, (64, 64), mode="bicubic").clamp(0, 1)


def right_half():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    return mask


REQUESTS = {
    "prompts": lambda: Request(PROMPTS, KEYS, TextOptions("a ring"), FAST),
    "one key": lambda: Request(PROMPTS, prng.key(1), sampling=FAST),
    "noise": lambda: Request(PROMPTS, noise=prng.normal(prng.key(1), (3, 16, 8, 8)), sampling=FAST),
    "a method that draws": lambda: Request(PROMPTS, KEYS, sampling=dataclasses.replace(FAST, method="euler_ancestral")),
    "variation": lambda: Request(
        PROMPTS, KEYS, sampling=FAST, variation=pipeline.Variation(prng.key(4), torch.tensor([0.1, 0.5, 0.9]))
    ),
    "mask": lambda: Request(
        PROMPTS, KEYS, sampling=FAST, start=StartImages(images(), 0.9, right_half(), 2.0, restore=True)
    ),
    "image each": lambda: Request(
        PROMPTS, KEYS, sampling=FAST, start=StartImages(images(3), 0.5, posterior_key=prng.key(2))
    ),
    "regions in tiles": lambda: Request(
        PROMPTS, KEYS, sampling=FAST, width=96, regions=(pipeline.Region("a ring", right_half()[..., :32, :]),),
        height=48, tiling=pipeline.Tiling(48, 16),
    ),
    "edit": lambda: Request(
        PROMPTS, sampling=dataclasses.replace(FAST, method=ode.EULER), start=StartImages(images()),
        edit=InversionEdit(["a ring"] * 3),
    ),
    "flow edit": lambda: Request(
        PROMPTS, KEYS, sampling=FAST, start=StartImages(images(), 0.8), edit=FlowEdit(["a ring"] * 3)
    ),
    "frames": lambda: Request(PROMPTS, KEYS, sampling=FAST, frames=Frames(4, pipeline.slerp)),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_images_do_not_depend_on_how_a_request_is_divided_into_batches(model, name):
    whole = draw(model, REQUESTS[name]())
    torch.testing.assert_close(draw(model, REQUESTS[name](), batch=2), whole, atol=1e-4, rtol=0)
    prepared = pipeline.prepare(*parts(model), REQUESTS[name]())
    last = pipeline.slice_samples(prepared, slice(prepared.samples - 1, None))
    assert last.samples == 1
    drawn = pipeline.draw(model.params, model.config, last)
    torch.testing.assert_close(drawn, whole[-1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", REQUESTS)
def test_each_component_is_read_once_by_each_stage(model, name):
    read = []

    def fetch(component):
        read.append(component)
        return model.params[component]

    prepared = pipeline.prepare(fetch, model.config, model.tokenizers, REQUESTS[name]())
    from_images = prepared.request.start is not None
    assert read == ["vae"] * from_images + ["clip_l", "clip_g", "t5"]
    read.clear()
    drawn = pipeline.draw(fetch, model.config, prepared, batch=2)
    assert read == ["transformer", "vae"]
    torch.testing.assert_close(drawn, draw(model, REQUESTS[name]()), atol=1e-4, rtol=0)


def test_what_has_a_row_for_each_image_is_divided_too(model):
    scales = torch.tensor([1.0, 2.0, 4.0])
    options = dataclasses.replace(FAST, cfg=scales)
    request = Request(PROMPTS, KEYS, TextOptions(["a ring", "", "a star"]), options)
    torch.testing.assert_close(draw(model, request, batch=2), draw(model, request), atol=1e-4, rtol=0)
    options = dataclasses.replace(options, method=ode.EULER)
    edit = InversionEdit(["a ring", "", "a star"], scales.flip(0), torch.tensor([0.0, 0.5, 1.0]), (0.0, 1.0))
    request = Request(PROMPTS, sampling=options, start=StartImages(images(3)), edit=edit)
    torch.testing.assert_close(draw(model, request, batch=2), draw(model, request), atol=1e-4, rtol=0)


def test_a_text_is_encoded_once_however_often_it_is_given(model, monkeypatch):
    from functional_sd3.text import conditioning

    seen, encode = [], conditioning.encode

    def counted(params, config, ids, **options):
        seen.append(len(ids.t5))
        return encode(params, config, ids, **options)

    monkeypatch.setattr(conditioning, "encode", counted)
    pipeline.prepare(*parts(model), Request(PROMPTS, KEYS, TextOptions("a ring"), FAST))
    assert seen == [3, 3, 3]


@pytest.mark.parametrize("name", DRAWING)
def test_every_function_that_draws_names_and_types_all_its_arguments(name):
    parameters = inspect.signature(function_of(name)).parameters.values()
    assert all(each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL) for each in parameters)
    assert all(each.annotation is not each.empty for each in parameters)
    options = {each.name for each in parameters} & {each.name for each in dataclasses.fields(SamplingOptions)}
    assert options == {each.name for each in dataclasses.fields(SamplingOptions)}


@pytest.mark.parametrize("name", DRAWING)
def test_defaults_are_those_of_the_request(name):
    own = {"edit": {"method": ode.EULER}, "flow_edit": {"method": ode.EULER, "steps": 50, "cfg": 13.5}}
    parameters = inspect.signature(function_of(name)).parameters
    for options in (SamplingOptions, TextOptions):
        for each in dataclasses.fields(options):
            assert parameters[each.name].default == own.get(name, {}).get(each.name, each.default), each.name


@pytest.mark.parametrize("name", DRAWING)
def test_types_are_those_of_the_request(name):
    hints = typing.get_type_hints(function_of(name))
    for options in (SamplingOptions, TextOptions):
        expected = typing.get_type_hints(options)
        # Of one prompt alone.
        expected |= {"negative": str | None} if name == "look.trace" and options is TextOptions else {}
        assert {each: hints[each] for each in expected} == expected


class Made(Exception):
    """The request that a function would draw."""


@pytest.mark.parametrize("name", DRAWING)
def test_every_argument_becomes_the_field_of_its_name(name, monkeypatch):
    """The functions write out one list of arguments, and pass twelve of them by position."""
    function, key = function_of(name), prng.key(1)
    required = {
        "params": {}, "config": None, "tokenizers": None, "path": "x", "prompts": ["a"], "prompt": "a", "source": "a",
        "target": "b", "images": images(), "mask": right_half(), "key": key, "keys": prng.split(key, 2),
        "towards": prng.key(2), "regions": (), "height": 64, "width": 64, "padding": (8, 8, 8, 8),
    }  # fmt: skip
    text = {"negative": "none", "t5_length": 7, "weighted": True, "long_prompts": True}
    sampling = {
        "steps": 3, "cfg": 2.5, "guidance": guidance.cfg(3.5), "method": object(), "on_step": object(),
        "skip_layers": (7,), "control": (object(),), "image_prompt": object(), "block_transform": object(),
        "attend": object(), "implementation": "math", "cache": caches.parse("hold:every=3"),
    }  # fmt: skip
    if name in ("edit", "flow_edit"):
        sampling["cache"] = None
    others = {"noise": prng.normal(key, (1, 16, 8, 8)), "height": 48, "width": 56, "loras": ((object(), 0.5),)}
    parameters = inspect.signature(function).parameters
    given = {each: value for each, value in required.items() if each in parameters}
    given |= text | sampling | {each: value for each, value in others.items() if each in parameters}

    def made(*arguments, **options):
        raise Made(Request(*arguments, **options))

    monkeypatch.setitem(inspect.unwrap(function).__globals__, "Request", made)
    with pytest.raises(Made) as raised:
        function(**given)
    request = raised.value.args[0]
    for value, expected in ((request.text, text), (request.sampling, sampling)):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        assert fields == expected
    for each in others.keys() & parameters.keys() - {"noise"}:
        assert getattr(request, each) == others[each]
    assert "noise" not in parameters or request.noise is others["noise"]


def test_a_request_is_frozen_and_its_prompts_are_a_list():
    request = Request("a ring", prng.key(0))
    assert request.prompts == ["a ring"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.prompts = ["a star"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request("a"), "needs a key"),
        (lambda: Request(["a"] * 3, KEYS, start=StartImages(images(2))), "2 images for 3 prompts"),
        (lambda: Request("a", prng.key(0), start=StartImages(images()[0])), "must be .batch, 3, height, width"),
        (lambda: StartImages(images(), -0.1), "strength -0.1 must be"),
        (lambda: StartImages(images(), float("nan")), "strength nan must be"),
        (lambda: StartImages(images(), soften=float("inf")), "a blur of inf"),
        (lambda: Request("a", prng.key(0), start=StartImages(images(), mask=right_half()[..., 1:])), "mask of 63 x 64"),
        (lambda: Request("a", prng.key(0), edit=FlowEdit(["b"])), "an edit needs start images"),
        (lambda: Request("a", start=StartImages(images()), edit=InversionEdit(["b", "c"])), "2 source prompts for 1"),
        (lambda: Request("a", noise=images(), start=StartImages(images()), edit=FlowEdit(["b"])), "needs a key"),
        (lambda: Request(["a", "b"], frames=Frames(3)), "frames need the keys"),
        (lambda: Request(["a", "b"], KEYS, frames=Frames(3)), "3 keys for 2 prompts"),
        (lambda: Request(["a", "b"], prng.key(0), frames=Frames(3), start=StartImages(images())), "between prompts"),
        (lambda: SamplingOptions(cfg=float("inf")), "cfg"),
        (lambda: InversionEdit(["b"], cfg=float("nan")), "source_cfg"),
        (lambda: InversionEdit(["b"], eta=1.1), "eta 1.1"),
        (lambda: InversionEdit(["b"], window=(0.5, 1.1)), "window 0.5 to 1.1"),
        (lambda: FlowEdit(["b"], averages=0), "averages 0"),
        (lambda: pipeline.Variation(KEYS, 2.0), "amount 2.0 must be between 0"),
        (lambda: pipeline.Variation(KEYS, float("nan")), "amount nan must be between 0"),
        (lambda: Request("a", noise=torch.zeros(16, 8, 8)), r"noise \[16, 8, 8\] must be \(1, channels"),
        (lambda: Request("a", noise=torch.zeros(2, 16, 8, 8)), r"noise .* must be \(1, channels"),
        (lambda: Request("a", prng.key(0), start=StartImages(images(), soften=2.0)), "soften and restore are of"),
        (lambda: Request("a", prng.key(0), start=StartImages(images(), restore=True)), "and restore are of a mask"),
        (lambda: edit_of(InversionEdit, noise=torch.zeros(1, 16, 8, 8)), "noise would have no effect on an edit"),
        (lambda: edit_of(FlowEdit, variation=pipeline.Variation(KEYS)), "variation would have no effect"),
        (lambda: edit_of(FlowEdit, field=pipeline.velocity), "field would have no effect"),
        (lambda: edit_of(FlowEdit, start=StartImages(images(), mask=right_half())), "mask would have no effect"),
        (lambda: edit_of(InversionEdit, start=StartImages(images(), 0.5)), "strength 0.5 would have no effect"),
        (
            lambda: Request(["a", "b"], prng.key(0), frames=Frames(3), variation=pipeline.Variation(prng.key(1))),
            "variation would have no effect on frames",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_together_are_named_before_anything_is_read(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def edit_of(kind, **parts):
    return Request("a", prng.key(0), **{"start": StartImages(images()), "edit": kind(["b"]), **parts})


@pytest.mark.parametrize(
    ("parts", "batch", "message"),
    [
        ({}, 0, "batch 0 must be at least 1"),
        ({}, -1, "batch -1 must be at least 1"),
        ({"height": 64.0}, None, "height 64.0 must be a whole number of pixels"),
        ({"tiling": pipeline.Tiling(60)}, None, "tile 60 is not a multiple of 16; nearest are 48 and 64"),
        ({"tiling": pipeline.Tiling(0)}, None, "tile 0 is not a multiple of 16; the least is 16"),
        ({"tiling": pipeline.Tiling(48, 48)}, None, "overlap 48 must be at least 0 and below the tile's 48 pixels"),
        ({"height": 32, "start": 0.5}, None, "height 32 and width None are not those of the start images, 64 x 64"),
        ({"width": 32, "noise": torch.zeros(1, 16, 8, 8)}, None, "width 32 are not those of the noise, 64 x 64"),
        ({"noise": torch.zeros(1, 16, 4, 4), "start": 0.5}, None, "64 are not those of the noise, 32 x 32"),
        ({"show": pipeline.states, "start": 0.0}, None, "no step to show: strength 0.0 takes none of 2 steps"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(model, parts, batch, message):
    if "start" in parts:
        parts = {**parts, "start": StartImages(images(1), parts["start"])}
    with pytest.raises(ValueError, match=message):
        draw(model, Request("a", prng.key(0), sampling=FAST, **parts), batch=batch)


def test_only_generate_moves_components():
    with pytest.raises(TypeError, match="offload"):
        pipeline.image_to_image(None, None, None, "a", images(), prng.key(0), offload=True)
