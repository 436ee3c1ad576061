"""Rules between names: both directions from one table, every transform with its exact inverse."""

import math

import pytest
import torch

from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.formats import sources
from functional_sd3.formats.sources import FUSE, IDENTITY
from functional_sd3.image.vae import SD3_VAE
from functional_sd3.layouts import rules
from functional_sd3.layouts.diffusers_folder import COMPONENTS
from functional_sd3.layouts.rules import FROM_CONV, SWAP_HALVES, TRANSPOSE, Layout, Rule, renamed, then
from functional_sd3.text.clip import CLIP_G, CLIP_L
from functional_sd3.text.t5 import T5_XXL
from functional_sd3.transformer.mmdit import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from functional_sd3.weights import SPECS

TRANSFORMS = {
    "identity": (IDENTITY, 1, (6, 4)),
    "fuse": (FUSE, 3, (6, 4)),
    "swap halves": (SWAP_HALVES, 1, (6, 4)),
    "transpose": (TRANSPOSE, 1, (6, 4)),
    "from conv": (FROM_CONV, 1, (6, 4)),
    "conv, then fuse": (then(FROM_CONV, FUSE), 2, (6, 4)),
    "transpose, then swap": (then(TRANSPOSE, SWAP_HALVES), 1, (6, 4)),
}


def param(*shape: int, trainable: bool = True) -> specs.Param:
    return specs.Param(shape, specs.zeros, (None,) * len(shape), trainable)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_split_then_join_and_join_then_split_change_no_bit(name):
    transform, count, shape = TRANSFORMS[name]
    ours = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    theirs = transform.split(ours, count)
    assert len(theirs) == count
    assert torch.equal(transform.join(theirs), ours)
    again = transform.split(transform.join(theirs), count)
    assert all(torch.equal(one, other) for one, other in zip(again, theirs, strict=True))


def test_the_transforms_are_what_their_names_say():
    q, k, v = torch.rand(3, 2, 4)
    assert torch.equal(FUSE.join([q, k, v]), torch.cat([q, k, v]))
    assert torch.equal(SWAP_HALVES.join([torch.tensor([1.0, 2, 3, 4])]), torch.tensor([3.0, 4, 1, 2]))
    assert FROM_CONV.join([torch.rand(5, 3, 1, 1)]).shape == (5, 3)
    assert torch.equal(TRANSPOSE.join([q]), q.T)
    assert torch.equal(then(FROM_CONV, FUSE).join([q[..., None, None], k[..., None, None]]), torch.cat([q, k]))


def test_placeholders_carry_over_and_the_first_rule_that_matches_counts():
    table = Layout(
        (
            Rule("blocks.1.w", ("last.w",), SWAP_HALVES),
            Rule("blocks.{i}.w", ("layer.{i}.a", "layer.{i}.b"), FUSE),
            *renamed(("{*rest}", "outer.{*rest}")),
        )
    )
    spec = {"blocks": [{"w": param(4, 2)}, {"w": param(4, 2)}], "deep": {"er": param(3)}}
    found = rules.keys(table, spec)
    assert found == {"layer.0.a": (2, 2), "layer.0.b": (2, 2), "last.w": (4, 2), "outer.deep.er": (3,)}
    assert set(rules.keys(rules.prefixed(table, "model."), spec)) == {"model." + name for name in found}


def test_dots_in_patterns_are_dots():
    with pytest.raises(ValueError, match="no rule of the layout says where ab comes from"):
        rules.keys(Layout(renamed(("a.b", "x"), ("a.{i}", "x.{i}"))), {"ab": param(1)})


def test_missing_unexpected_and_misshapen_names_are_all_said_with_the_closest():
    table = Layout(renamed(("{*rest}", "{*rest}")))
    spec = {"weight": param(2, 3), "bias": param(2), "table": param(9, trainable=False)}
    assert sources.check(rules.sources(table, spec), {"weight": (2, 3), "bias": (2,)}) == []
    assert sources.check(rules.sources(table, spec), {"weights": (2, 3), "bias": (3,)}) == [
        "weight is missing (shape [2, 3])",
        "weights is unexpected; is it weight?",
        "bias has shape [3], expected [2]",
    ]


def test_a_file_of_another_model_is_refused_in_a_moment():
    spec = SPECS["transformer"](SD35_LARGE)
    table = COMPONENTS["transformer"].layout
    problems = sources.check(
        rules.sources(table, spec), {name + ".x": shape for name, shape in rules.keys(table, spec).items()}
    )
    assert len(problems) == 2 * 1227 - 1


def test_a_proper_name_counts_before_its_alias_and_ignored_names_are_dropped():
    table = Layout((), aliases=(("old.{*rest}", "new.{*rest}"),), ignored=("{*any}.ids",))
    assert rules.canonical(table, ["old.a", "new.b.c", "old.b.c", "x.ids"]) == {"new.a": "old.a", "new.b.c": "new.b.c"}
    assert rules.canonical(table, ["old.b.c", "new.b.c"]) == {"new.b.c": "new.b.c"}


RELEASED = {
    "SD3 medium": ("transformer", SD3_MEDIUM, 683, 2_028_328_000 + 56_623_104),
    "SD3.5 medium": ("transformer", SD35_MEDIUM, 909, 2_243_171_520 + 226_492_416),
    "SD3.5 large": ("transformer", SD35_LARGE, 1227, 8_056_627_520 + 89_653_248),
    "VAE": ("vae", SD3_VAE, 244, 83_819_683),
    "CLIP-L": ("clip_l", CLIP_L, 197, 123_650_304),
    "CLIP-G": ("clip_g", CLIP_G, 517, 694_659_840),
    "T5-XXL": ("t5", T5_XXL, 219, 4_762_310_656),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_models_have_their_published_numbers_of_tensors_and_parameters(name):
    component, config, tensors, parameters = RELEASED[name]
    found = rules.keys(COMPONENTS[component].layout, SPECS[component](config))
    assert (len(found), sum(map(math.prod, found.values()))) == (tensors, parameters)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_goes_to_their_names_and_back_bit_for_bit(make_model, same, component):
    model = make_model()
    table, spec = COMPONENTS[component].layout, SPECS[component](getattr(model.config, component))
    theirs = rules.to_theirs(table, spec, tree.flatten_paths(model.params[component]))
    assert {name: tuple(value.shape) for name, value in theirs.items()} == rules.keys(table, spec)
    ours = rules.to_ours(table, spec, lambda source, _: source.transform.join([theirs[n] for n in source.names]))
    assert same(ours, model.params[component])
