"""Arithmetic of checkpoints: closed forms, what must not change, and a reference of TIES written out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import tree
from functional_sd3.weights import merge

SEEDS, NUMBERS = st.integers(0, 2**31), st.floats(-2, 2, width=32)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
few = settings(max_examples=20)


def random_tree(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    return {"blocks": [{"weight": draw(3, 4), "bias": draw(3)}, {"weight": draw(2, 3)}], "one": {"scale": draw()}}


def same(first, second):
    return not tree.diff(first, second)


def close(first, second, tolerance=1e-5):
    return tree.allclose(first, second, rtol=tolerance, atol=tolerance)


@few
@given(SEEDS, st.floats(0.1, 3), st.floats(0.1, 3))
def test_the_average_is_weighted_and_normalised(seed, first, second):
    one, other = random_tree(seed), random_tree(seed + 1)
    expected = tree.map(lambda a, b: (first * a + second * b) / (first + second), one, other)
    assert close(merge.average([one, other], [first, second]), expected)
    assert close(merge.average([one, other]), tree.map(lambda a, b: (a + b) / 2, one, other))


@few
@given(SEEDS, DTYPES, NUMBERS)
def test_merging_a_tree_with_itself_is_that_tree_to_the_bit(seed, dtype, number):
    one = random_tree(seed, dtype)
    for merged in (
        merge.average([one, one, one], [0.3, 0.4, abs(number) + 0.1]),
        merge.slerp(one, one, number),
        merge.task_arithmetic(one, [one, one], [number, 1.0]),
        merge.ties(one, [one, one]),
    ):
        assert same(merged, one)


@few
@given(SEEDS, DTYPES)
def test_the_ends_of_every_path_are_the_trees_themselves(seed, dtype):
    one, other = random_tree(seed, dtype), random_tree(seed + 1, dtype)
    for end, merged in (
        (one, merge.average([one, other], [1.0, 0.0])),
        (other, merge.average([one, other], [0.0, 1.0])),
        (one, merge.slerp(one, other, 0.0)),
        (other, merge.slerp(one, other, 1.0)),
        (one, merge.task_arithmetic(one, [other], [0.0])),
        (other, merge.task_arithmetic(one, [other])),
        (other, merge.ties(one, [other], density=1.0)),
    ):
        assert same(merged, end)


@few
@given(SEEDS, st.floats(0, 1))
def test_slerp_turns_at_an_even_pace_and_keeps_the_norm_of_unit_vectors(seed, t):
    unit = lambda whole: tree.map(lambda leaf: leaf / leaf.norm(), whole)  # noqa: E731
    one, other = unit(random_tree(seed)), unit(random_tree(seed + 1))
    middle = merge.slerp(one, other, t)
    for a, b, m in zip(*map(tree.leaves, (one, other, middle)), strict=True):
        if a.ndim:
            angle = torch.acos((a * b).sum().clamp(-1, 1))
            assert float(m.norm()) == pytest.approx(1.0, abs=1e-5)
            assert float((a * m).sum()) == pytest.approx(math.cos(t * float(angle)), abs=1e-4)


def test_slerp_of_parallel_opposite_and_zero_vectors_is_the_chord():
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2), "c": torch.tensor([1.0, 0.0])}
    other = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([0.0, 4.0]), "c": torch.tensor([-1.0, 0.0])}
    expected = {"a": torch.tensor([1.25, 2.5]), "b": torch.tensor([0.0, 1.0]), "c": torch.tensor([0.5, 0.0])}
    assert close(merge.slerp(one, other, 0.25), expected)


@few
@given(SEEDS, NUMBERS, NUMBERS)
def test_task_arithmetic_adds_what_was_learned_and_takes_it_away_again(seed, first, second):
    base, one, other = (random_tree(seed + index) for index in range(3))
    merged = merge.task_arithmetic(base, [one, other], [first, second])
    expected = tree.map(lambda b, x, y: b + first * (x - b) + second * (y - b), base, one, other)
    assert close(merged, expected)
    assert close(merge.task_arithmetic(merged, [expected], [0.0]), merged)


def reference_ties(base, tuned, density, weight):
    """Algorithm 1 of the paper on flat vectors: trim, elect sign, disjoint merge."""
    keep = max(1, math.ceil(density * len(base)))
    trimmed = []
    for one in tuned:
        change = one - base
        least = change.abs().sort(descending=True).values[keep - 1]
        trimmed.append([float(x) if abs(x) >= least else 0.0 for x in change])
    merged = []
    for column, start in zip(zip(*trimmed, strict=True), base.tolist(), strict=True):
        positive, negative = sum(x for x in column if x > 0), -sum(x for x in column if x < 0)
        sign = 1 if positive > negative else -1
        agreeing = [x for x in column if x * sign > 0]
        merged.append(start + weight * (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    return torch.tensor(merged)


@few
@given(SEEDS, st.floats(0.01, 1), st.floats(0.1, 2), st.integers(1, 4))
def test_ties_is_algorithm_1(seed, density, weight, count):
    base, *tuned = (random_tree(seed + index) for index in range(count + 1))
    flat = lambda whole: torch.cat([leaf.flatten() for leaf in tree.leaves(whole)])  # noqa: E731
    merged = merge.ties(base, tuned, density=density, weight=weight)
    expected = reference_ties(flat(base), list(map(flat, tuned)), density, weight)
    torch.testing.assert_close(flat(merged), expected, rtol=1e-5, atol=1e-5)


def test_the_order_of_names_does_not_matter():
    base, one = random_tree(1), random_tree(2)
    turned = {name: one[name] for name in reversed(one)}
    for method in (lambda x: merge.ties(base, [x]), lambda x: merge.average([base, x]), lambda x: merge.diff(base, x)):
        assert method(one) == method(turned) if isinstance(method(one), list) else same(method(one), method(turned))


def test_nothing_writes_into_what_it_is_given_and_the_mixture_can_be_learned():
    trees = [random_tree(seed) for seed in range(3)]
    copies = tree.map(torch.clone, trees)
    merge.average(trees)
    merge.slerp(trees[0], trees[1], 0.3)
    merge.task_arithmetic(trees[0], trees[1:])
    merge.ties(trees[0], trees[1:])
    merge.diff(trees[0], trees[1])
    assert same(trees, copies)
    share = torch.tensor(0.3)
    total = lambda share: sum(leaf.sum() for leaf in tree.leaves(merge.average(trees[:2], [1 - share, share])))  # noqa: E731
    gap = sum(float((b - a).sum()) for a, b in zip(*map(tree.leaves, trees[:2]), strict=True))
    assert float(torch.func.grad(total)(share)) == pytest.approx(gap, rel=1e-4)


def test_diff_tells_the_relative_change_of_every_layer():
    one = random_tree(1)
    other = tree.map_with_path(lambda path, leaf: leaf * 1.5 if path == "blocks.0.weight" else leaf, one)
    rows = {row.path: row for row in merge.diff(one, other)}
    assert list(rows) == ["blocks.0", "blocks.1", "one"]
    weight, bias = one["blocks"][0]["weight"], one["blocks"][0]["bias"]
    expected = 0.5 * float(weight.norm()) / math.hypot(float(weight.norm()), float(bias.norm()))
    assert rows["blocks.0"].relative == pytest.approx(expected, rel=1e-5)
    assert rows["blocks.0"].largest == pytest.approx(0.5 * float(weight.abs().max()))
    assert (rows["blocks.0"].changed, rows["blocks.0"].parameters) == (12, 15)
    assert rows["blocks.1"] == merge.Change("blocks.1", 0.0, 0.0, 0, 6)
    (whole, _) = merge.diff(one, other, group=merge.component)
    assert whole.path == "blocks" and whole.parameters == 21


def test_paths_are_grouped_by_layer():
    assert merge.layer("transformer.blocks.3.image.mlp.in.weight") == "transformer.blocks.3"
    assert merge.layer("transformer.patch.weight") == "transformer.patch"
    assert merge.layer("transformer.position") == "transformer"


def test_mistakes_are_named():
    one, other = random_tree(1), random_tree(2)
    for call, said in (
        (lambda: merge.average([]), "at least one tree"),
        (lambda: merge.average([one, other], [1.0]), "1 weights do not fit 2 trees"),
        (lambda: merge.average([one, other], [1.0, -1.0]), "sum to zero"),
        (lambda: merge.ties(one, [other], density=0.0), "density 0.0 must be above 0"),
        (lambda: merge.slerp(one, {"blocks": []}, 0.5), "trees differ at the root"),
        (lambda: merge.diff(one, {**other, "one": {"scale": torch.ones(2)}}), r"one.scale is \[\] in the first, \[2\]"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
