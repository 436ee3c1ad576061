"""Trees: mapping, paths, choosing and comparing."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.core import prng, tree


class State(NamedTuple):
    step: torch.Tensor
    moments: dict


NAMES = st.text(st.characters(exclude_characters=".", codec="utf-8"), min_size=1, max_size=4).filter(
    lambda name: not name.isdecimal()
)
LEAVES = st.integers(0, 99).map(lambda seed: prng.normal(prng.key(seed), (seed % 3, 2)))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(NAMES, inner, min_size=1, max_size=3),
    max_leaves=8,
)
ROOTED = st.dictionaries(NAMES, TREES, max_size=4) | st.lists(TREES, max_size=3).filter(bool)


def identical(first, second):
    """The same containers, in the same order, around the very same leaves."""
    if isinstance(first, dict):
        return (
            type(first) is type(second)
            and list(first) == list(second)
            and all(identical(first[name], second[name]) for name in first)
        )
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(identical, first, second))
    return first is second


@pytest.fixture
def params():
    return {
        "blocks": [
            {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)},
            {"weight": torch.ones(2, 3), "bias": torch.ones(2)},
        ],
        "norm": {"weight": torch.full((3,), 2.0)},
    }


@given(ROOTED)
def test_unflatten_paths_undoes_flatten_paths(nested):
    assert identical(tree.unflatten_paths(tree.flatten_paths(nested)), nested)


@given(ROOTED, st.randoms(use_true_random=False))
def test_combine_undoes_partition(nested, random):
    chosen, rest = tree.partition(nested, lambda path, leaf: random.random() < 0.5)
    assert identical(tree.combine(chosen, rest), nested)
    assert identical(tree.combine(rest, chosen), nested)
    assert len(tree.leaves(chosen)) + len(tree.leaves(rest)) == len(tree.leaves(nested))


@given(ROOTED)
def test_leaves_and_paths_come_in_the_order_in_which_map_meets_them(nested):
    met, named = [], []
    tree.map(met.append, nested)
    tree.map_with_path(lambda path, leaf: named.append((path, leaf)), nested)
    assert identical(met, tree.leaves(nested))
    assert identical([leaf for _, leaf in named], tree.leaves(nested))
    assert [path for path, _ in named] == list(tree.flatten_paths(nested))


def test_paths_join_names_and_positions_by_dots(params):
    assert list(tree.flatten_paths(params)) == [
        "blocks.0.weight",
        "blocks.0.bias",
        "blocks.1.weight",
        "blocks.1.bias",
        "norm.weight",
    ]


def test_map_matches_dicts_by_name_and_keeps_the_order_of_the_first(params):
    turned = {"norm": params["norm"], "blocks": params["blocks"]}
    total = tree.map(torch.add, params, turned)
    assert list(total) == ["blocks", "norm"]
    assert torch.equal(total["norm"]["weight"], torch.full((3,), 4.0))


def test_map_goes_through_tuples_and_named_tuples(params):
    state = (State(torch.tensor(3), params), [params["norm"]])
    doubled = tree.map(lambda leaf: 2 * leaf, state)
    assert type(doubled) is tuple and type(doubled[0]) is State
    assert doubled[0].step == 6
    assert "0.moments.blocks.1.bias" in tree.flatten_paths(state)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"a": [1, 2]}, "trees differ at the root: a dict of .'a', 'b'. against a dict of .'a'."),
        ({"a": [1], "b": {"c": 1}}, "trees differ at a: a sequence of 2 against a sequence of 1"),
        ({"a": [1, 2], "b": 1}, "trees differ at b: a dict of .'c'. against a leaf"),
        ({"a": [1, {"d": 1}], "b": {"c": 1}}, "trees differ at a.1: a leaf against a dict of .'d'."),
    ],
)
def test_map_names_the_path_where_trees_differ(other, message):
    ours = {"a": [1, 2], "b": {"c": 3}}
    with pytest.raises(ValueError, match=message):
        tree.map(lambda *leaves: leaves, ours, ours, other)


def test_errors_of_the_mapped_function_pass_through():
    with pytest.raises(ValueError, match="from within"):
        tree.map(lambda leaf: (_ for _ in ()).throw(ValueError("from within")), {"a": 1})


@pytest.mark.parametrize(
    "paths, message",
    [
        (["blocks.0.w", "blocks.2.w"], r"blocks.1 is missing: blocks goes up to 2"),
        (["blocks.1"], r"blocks.0 is missing"),
        (["blocks.0", "blocks.weight"], "blocks mixes positions with the name 'weight'"),
        (["a", "a.b"], "a is both a leaf and the parent of a.b"),
        (["a.b.c", "a.b"], "a.b is both a leaf and the parent of other leaves"),
        (["a..b"], "path 'a..b' has an empty name"),
    ],
)
def test_unflatten_paths_names_the_faulty_path(paths, message):
    with pytest.raises(ValueError, match=message):
        tree.unflatten_paths(dict.fromkeys(paths, torch.zeros(1)))


def test_unflatten_paths_orders_lists_by_number():
    flat = {f"blocks.{index}": index for index in reversed(range(12))}
    assert tree.unflatten_paths(flat) == {"blocks": list(range(12))}


@pytest.mark.parametrize("name", ["a.b", "", 3])
def test_flatten_paths_refuses_names_that_would_be_ambiguous(name):
    with pytest.raises(ValueError, match="must be a non-empty string without dots"):
        tree.flatten_paths({"outer": {name: torch.zeros(1)}})


def test_select_takes_a_glob_several_globs_or_a_predicate(params):
    assert list(tree.select(params, "*.bias")) == ["blocks.0.bias", "blocks.1.bias"]
    assert list(tree.select(params, ["norm.*", "blocks.1.*"])) == ["blocks.1.weight", "blocks.1.bias", "norm.weight"]
    assert list(tree.select(params, lambda path, leaf: leaf.ndim == 2)) == ["blocks.0.weight", "blocks.1.weight"]
    assert tree.select(params, "blocks") == {}


def test_the_chosen_half_of_a_partition_can_be_differentiated_and_updated_alone(params):
    chosen, rest = tree.partition(params, "blocks.1.*")

    def loss(chosen):
        return sum(leaf.square().sum() for leaf in tree.leaves(tree.combine(chosen, rest)))

    grads = torch.func.grad(loss)(chosen)
    assert list(tree.flatten_paths(grads)) == ["blocks.1.weight", "blocks.1.bias"]
    updated = tree.combine(tree.map(lambda leaf, grad: leaf - grad / 2, chosen, grads), rest)
    assert [difference.path for difference in tree.diff(updated, params)] == ["blocks.1.bias", "blocks.1.weight"]
    assert not updated["blocks"][1]["weight"].any()


def test_combine_joins_three_parts_and_refuses_overlap(params):
    weights, others = tree.partition(params, "*.weight")
    first, second = tree.partition(weights, "blocks.0.*")
    assert identical(tree.combine(tree.combine(others, second), first), params)
    with pytest.raises(ValueError, match="blocks.0.weight is a leaf of both trees"):
        tree.combine(weights, params)
    with pytest.raises(ValueError, match="trees differ at blocks: a sequence of 2 against a sequence of 1"):
        tree.combine(weights, {"blocks": [{}], "norm": {}})


def test_cast_leaves_integers_alone(params):
    state = State(torch.tensor(3), params)
    cast = tree.cast(state, torch.bfloat16)
    assert cast.step.dtype == torch.int64
    assert {leaf.dtype for leaf in tree.leaves(cast.moments)} == {torch.bfloat16}
    assert {leaf.dtype for leaf in tree.leaves(params)} == {torch.float32}


def test_to_moves_every_leaf(params):
    assert {leaf.device.type for leaf in tree.leaves(tree.to(params, "meta"))} == {"meta"}


def test_count_and_nbytes_add_up_elements_and_bytes(params):
    assert tree.count(params) == 6 + 2 + 6 + 2 + 3
    assert tree.nbytes(params) == 4 * 19
    assert tree.nbytes(tree.cast(params, torch.bfloat16)) == 2 * 19
    assert (tree.count({}), tree.nbytes([])) == (0, 0)


def test_diff_lists_differences_worst_first():
    nan, inf = math.nan, math.inf
    first = {
        "same": torch.tensor([1.0, nan, inf]),
        "near": torch.tensor([1.0, 2.0]),
        "far": torch.tensor([1.0, 2.0]),
        "lost": torch.tensor(1.0),
        "reshaped": torch.zeros(2, 3),
        "cast": torch.ones(2),
        "broken": torch.tensor([nan]),
        "counter": torch.tensor(2**53),
    }
    second = {
        "same": torch.tensor([1.0, nan, inf]),
        "near": torch.tensor([1.0, 2.5]),
        "far": torch.tensor([-2.0, 2.0]),
        "found": torch.tensor(1.0),
        "reshaped": torch.zeros(3, 2),
        "cast": torch.ones(2, dtype=torch.float16),
        "broken": torch.tensor([0.0]),
        "counter": torch.tensor(2**53),
    }
    seen = [(one.path, one.kind, one.amount) for one in tree.diff(first, second)]
    assert seen == [
        ("found", "presence", inf),
        ("lost", "presence", inf),
        ("reshaped", "shape", inf),
        ("cast", "dtype", inf),
        ("broken", "value", inf),
        ("far", "value", 3.0),
        ("near", "value", 0.5),
    ]
    assert tree.diff(first, second)[-1].detail == "1 of 2 elements differ, by at most 0.5"


def test_allclose_holds_within_the_tolerance_and_nowhere_else(params):
    nudged = tree.map(lambda leaf: leaf + 1e-3, params)
    assert tree.allclose(params, params)
    assert tree.allclose(params, nudged, rtol=0, atol=1.1e-3)
    assert not tree.allclose(params, nudged, rtol=0, atol=0.9e-3)
    assert not tree.allclose(params, tree.cast(params, torch.float64))
    assert not tree.allclose(params, {"norm": params["norm"]})


@given(ROOTED)
def test_nothing_writes_into_its_arguments(nested):
    before = tree.map(torch.clone, nested)
    tree.cast(nested, torch.float64), tree.diff(nested, nested), tree.partition(nested, "*0*")
    assert tree.allclose(nested, before, rtol=0, atol=0) and not tree.diff(nested, before)


def test_float8_leaves_are_compared_by_their_values():
    one = {"a": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)}
    other = {"a": torch.tensor([1.0, 4.0]).to(torch.float8_e4m3fn)}
    assert not tree.diff(one, one)
    assert [(each.kind, each.amount) for each in tree.diff(one, other)] == [("value", 2.0)]
    assert [each.kind for each in tree.diff(one, tree.map(torch.Tensor.float, one))] == ["dtype"]


def test_a_summary_has_a_line_for_each_part_with_its_numbers():
    leaf = torch.zeros(2, 3)
    nested = {"blocks": [{"weight": leaf, "bias": leaf.half()}, {"weight": leaf}], "norm": torch.ones(1000), "none": {}}
    lines = tree.summary(nested, 2).splitlines()
    assert [line.split() for line in lines] == [
        ["tensors", "elements"],
        ["blocks.0", "2", "12", "float32", "cpu,", "float16", "cpu"],
        ["blocks.1", "1", "6", "float32", "cpu"],
        ["norm", "1", "1,000", "float32", "cpu"],
        ["all", "4", "1,018", "float32", "cpu,", "float16", "cpu"],
    ]
    assert [line.split()[0] for line in tree.summary(nested, 1).splitlines()[1:]] == ["blocks", "norm", "all"]
    assert tree.summary({}).split() == ["tensors", "elements", "all", "0", "0"]


@pytest.mark.parametrize(
    ("chooser", "hint"),
    [
        ("attn", "'attn' chooses no parameter; .* such as blocks.0.attention.weight and norm"),
        ("attention", r"'\*attention\*' chooses blocks.0.attention.weight, for one"),
        (("a", "b"), r"\('a', 'b'\) chooses no parameter"),
        (lambda path, leaf: False, "the function chooses no parameter"),
    ],
)
def test_a_choice_of_nothing_is_an_error_with_what_there_is(chooser, hint):
    nested = {"blocks": [{"attention": {"weight": torch.ones(1)}}], "norm": torch.ones(1)}
    tree.check_chosen("trainable", nested, "*weight")
    tree.check_chosen("trainable", {"empty": {}}, chooser)
    with pytest.raises(ValueError, match=f"^trainable .*{hint}"):
        tree.check_chosen("trainable", nested, chooser)
