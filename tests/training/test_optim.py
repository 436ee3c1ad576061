import pytest
import torch

from functional_sd3.core import prng, tree
from functional_sd3.training import optim


def params():
    return {
        "a": {"weight": prng.normal(prng.key(1), (5, 7)), "bias": prng.normal(prng.key(2), (5,))},
        "b": [prng.normal(prng.key(3), (2, 3, 3, 3)), {}, prng.normal(prng.key(4), (1,))],
    }


def grads(step):
    like = params()
    keys = iter(prng.split(prng.fold_in(prng.key(9), step), len(tree.leaves(like))))
    return tree.map(lambda leaf: prng.normal(next(keys), tuple(leaf.shape)), like)


def descend(optimizer, steps, donate=False):
    current = params()
    state = optimizer.init(current)
    for step in range(steps):
        if donate:
            current, state = optim.donate(optimizer, grads(step), state, current)
        else:
            updates, state = optimizer.update(grads(step), state, current)
            current = optim.apply_updates(current, updates)
    return current, state


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch_over_20_steps(decay):
    theirs = [leaf.clone().requires_grad_() for leaf in tree.leaves(params())]
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=decay)
    for step in range(20):
        for leaf, grad in zip(theirs, tree.leaves(grads(step)), strict=True):
            leaf.grad = grad
        reference.step()
    ours, _ = descend(optim.adamw(1e-2, 0.8, 0.99, 1e-6, decay=decay), 20)
    for one, other in zip(tree.leaves(ours), theirs, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-6, atol=1e-6)


def test_the_first_adam_step_is_the_sign_of_the_gradient():
    updates, _ = optim.scale_by_adam(eps=1e-12).update(grads(0), optim.scale_by_adam().init(params()), params())
    for update, grad in zip(tree.leaves(updates), tree.leaves(grads(0)), strict=True):
        torch.testing.assert_close(update, grad.sign(), rtol=1e-5, atol=0)


def test_a_donated_run_equals_the_pure_one():
    decayed = lambda path, leaf: leaf.ndim >= 2  # noqa: E731
    rate = optim.warmup_cosine(1e-2, 3, 20)
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, decay=0.1, mask=decayed))
    assert optimizer.donate is not None
    (pure, pure_state), (donated, donated_state) = descend(optimizer, 20), descend(optimizer, 20, donate=True)
    assert tree.allclose(pure, donated, rtol=1e-6, atol=1e-6)
    assert tree.allclose(pure_state, donated_state, rtol=1e-5, atol=1e-7)


def test_a_donated_step_reads_gradients_by_index_whatever_their_layout():
    optimizer, weight = optim.adamw(1e-2), {"w": torch.ones(3, 4)}
    grad = torch.arange(12.0).reshape(4, 3).T - 5
    pure, _ = optimizer.update({"w": grad}, optimizer.init(weight), weight)
    donated, _ = optim.donate(optimizer, {"w": grad}, optimizer.init(weight), tree.map(torch.clone, weight))
    torch.testing.assert_close(donated["w"], weight["w"] + pure["w"])


def test_a_rule_without_a_kernel_of_its_own_donates_the_parameters_memory():
    optimizer = optim.scale_by_learning_rate(0.1)
    assert optimizer.donate is None
    given = params()
    before = [leaf.data_ptr() for leaf in tree.leaves(given)]
    changed, _ = optim.donate(optimizer, grads(0), optimizer.init(given), given)
    assert [leaf.data_ptr() for leaf in tree.leaves(changed)] == before
    assert tree.allclose(changed, optim.apply_updates(params(), tree.map(lambda g: -0.1 * g, grads(0))), rtol=1e-6)


def test_pure_updates_change_none_of_their_arguments():
    current, gradients = params(), grads(0)
    optimizer = optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-2))
    state = optimizer.init(current)
    optimizer.update(gradients, state, current)
    assert not tree.diff(current, params()) and not tree.diff(gradients, grads(0))
    assert not tree.diff(state, optimizer.init(current))


def test_sharing_memory_is_refused_before_anything_is_overwritten():
    whole = torch.ones(10)
    with pytest.raises(ValueError, match="params.a and params.b share memory"):
        optim.donate(optim.adamw(1e-2), {}, (), {"a": whole[:6], "b": whole[5:]})
    assert whole.eq(1).all()
    optim.check_donated({"a": whole[:5], "b": whole[5:]})


def test_a_leaf_of_a_graph_is_refused():
    with pytest.raises(ValueError, match="params.a requires grad"):
        optim.check_donated({"params": {"a": torch.ones(2, requires_grad=True)}})


def test_moments_laid_out_differently_are_refused():
    optimizer, weight = optim.adamw(1e-2), {"w": torch.ones(3, 4)}
    transposed = {"w": torch.ones(4, 3).T}
    with pytest.raises(ValueError, match="w has gaps in memory, or another order"):
        optim.donate(optimizer, weight, optimizer.init(weight), transposed)


def test_a_poisoned_tree_lives_on_under_its_new_handles_only():
    old = params()
    new = optim.poison(old)
    assert not tree.diff(new, params())
    with pytest.raises(RuntimeError):
        old["a"]["weight"] @ torch.ones(7)


@pytest.mark.parametrize("count", [1 << 22, (1 << 22) + 1, 100], ids=["in rows", "no rows", "small"])
def test_the_norm_of_many_numbers_keeps_its_digits(count):
    leaves = {"one": prng.normal(prng.key(0), (count,)), "turned": prng.normal(prng.key(1), (300, 200)).t()}
    exact = torch.cat([leaf.flatten() for leaf in leaves.values()]).double().norm()
    # What is not cut into rows is summed by PyTorch, which loses digits of so many.
    assert float(optim.global_norm(leaves)) == pytest.approx(float(exact), rel=3e-7 if count % 2 == 0 else 1e-4)
    assert float(optim.global_norm({})) == 0


def test_clipping_scales_to_the_limit_and_leaves_smaller_gradients_alone():
    norm = float(optim.global_norm(grads(0)))
    assert norm == pytest.approx(float(torch.cat([leaf.flatten() for leaf in tree.leaves(grads(0))]).norm()), rel=1e-6)
    clipped, _ = optim.clip_by_global_norm(0.5).update(grads(0), (), params())
    assert float(optim.global_norm(clipped)) == pytest.approx(0.5, rel=1e-5)
    same, _ = optim.clip_by_global_norm(2 * norm).update(grads(0), (), params())
    assert not tree.diff(same, grads(0))


def test_clipping_does_not_hide_nan():
    poor = grads(0)
    poor["a"]["bias"] = torch.full((5,), float("nan"))
    clipped, _ = optim.clip_by_global_norm(0.5).update(poor, (), params())
    assert torch.isnan(clipped["a"]["weight"]).all()


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_not_positive_is_refused(limit):
    with pytest.raises(ValueError, match="must be positive"):
        optim.clip_by_global_norm(limit)


def test_decay_pulls_the_chosen_leaves_only():
    updates, _ = optim.add_decayed_weights(0.5, "*.weight").update(grads(0), (), params())
    torch.testing.assert_close(updates["a"]["weight"], grads(0)["a"]["weight"] + 0.5 * params()["a"]["weight"])
    assert not tree.diff({**updates, "a": updates["a"]["bias"]}, {**grads(0), "a": grads(0)["a"]["bias"]})


def test_partitioned_leaves_learn_by_their_own_rule():
    rules = {"fast": optim.scale_by_learning_rate(1.0), "slow": optim.adamw(1e-3)}
    optimizer = optim.partitioned(rules, lambda path, leaf: "slow" if leaf.ndim > 1 else "fast")
    updates, _ = optimizer.update(grads(0), optimizer.init(params()), params())
    torch.testing.assert_close(updates["a"]["bias"], -grads(0)["a"]["bias"])
    alone = {"w": params()["a"]["weight"]}
    expected, _ = rules["slow"].update({"w": grads(0)["a"]["weight"]}, rules["slow"].init(alone), alone)
    torch.testing.assert_close(updates["a"]["weight"], expected["w"])


def test_a_label_without_an_optimiser_is_refused_by_path():
    optimizer = optim.partitioned(
        {"adamw": optim.adamw(1e-3)}, lambda path, leaf: "muon" if leaf.ndim == 4 else "adamw"
    )
    with pytest.raises(ValueError, match="b.0 is labelled 'muon'"):
        optimizer.init(params())


def test_masked_updates_pass_unchanged_elsewhere():
    optimizer = optim.masked(optim.scale_by_learning_rate(1.0), "a.*")
    updates, _ = optimizer.update(grads(0), optimizer.init(params()), params())
    assert not tree.diff(updates, {"a": tree.map(torch.neg, grads(0)["a"]), "b": grads(0)["b"]})


def test_updates_are_added_in_the_dtype_of_the_parameters():
    half = tree.cast(params(), torch.bfloat16)
    changed = optim.apply_updates(half, grads(0))
    assert {leaf.dtype for leaf in tree.leaves(changed)} == {torch.bfloat16}


def test_the_average_follows_its_closed_form_and_warms_up():
    step = torch.tensor(3)
    assert float(optim.ema_decay(0.999, step)) == pytest.approx(4 / 13)
    assert float(optim.ema_decay(0.9, torch.tensor(10**6))) == pytest.approx(0.9)
    ema, current = params(), grads(0)
    expected = tree.map(lambda mean, leaf: 4 / 13 * mean + 9 / 13 * leaf, ema, current)
    assert tree.allclose(optim.ema_update(ema, current, 0.999, step), expected, rtol=1e-5, atol=1e-6)
    assert not tree.diff(ema, params())
    moved = optim.ema_update(ema, current, 0.999, step, donate=True)
    assert moved is ema and tree.allclose(moved, expected, rtol=1e-5, atol=1e-6)


def test_a_donated_step_clips_equal_gradients_that_are_one_tensor_once():
    weights = {"a": torch.ones(3), "b": torch.ones(3)}
    shared = torch.tensor([3.0, -4.0, 12.0])
    optimizer = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1, eps=1.0))
    updates, _ = optimizer.update({"a": shared, "b": shared}, optimizer.init(weights), weights)
    expected = optim.apply_updates(weights, updates)
    for alone in (False, True):
        given = {"a": shared.clone(), "b": shared.clone()} if alone else dict.fromkeys("ab", shared.clone())
        own = tree.map(torch.clone, weights)
        moved, _ = optim.donate(optimizer, given, optimizer.init(own), own)
        assert tree.allclose(moved, expected, rtol=1e-6)


@pytest.mark.parametrize("known", [False, True], ids=["norm unknown", "norm known"])
@pytest.mark.parametrize(
    "before",
    [
        (optim.clip_by_global_norm(0.5),),
        (optim.clip_by_global_norm(0.5), optim.clip_by_global_norm(0.2)),
        (optim.clip_by_global_norm(0.5), optim.add_decayed_weights(0.3)),
        (optim.add_decayed_weights(0.3), optim.clip_by_global_norm(0.5)),
        (optim.chain(optim.clip_by_global_norm(0.5), optim.add_decayed_weights(0.3)), optim.clip_by_global_norm(0.1)),
    ],
    ids=["clip", "clip, clip", "clip, decay", "decay, clip", "chain, clip"],
)
def test_transforms_before_a_fused_kernel_are_equal_when_donated(before, known):
    # eps is large, so that the direction depends on the size of the gradient.
    optimizer = optim.chain(*before, optim.adamw(0.1, eps=1.0))
    pure, pure_state = params(), optimizer.init(params())
    own, state = params(), optimizer.init(params())
    for step in range(3):
        updates, pure_state = optimizer.update(grads(step), pure_state, pure)
        pure = optim.apply_updates(pure, updates)
        norm = optim.global_norm(grads(step)) if known else None
        own, state = optim.donate(optimizer, grads(step), state, own, norm=norm)
    assert tree.allclose(own, pure, rtol=1e-5, atol=1e-6)


def test_a_donated_step_of_a_norm_that_is_no_number_is_none_either():
    poor = grads(0)
    poor["a"]["bias"] = torch.full((5,), float("nan"))
    optimizer = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1))
    moved, _ = optim.donate(optimizer, poor, optimizer.init(params()), params())
    assert torch.isnan(moved["a"]["weight"]).all()


def values(schedule, steps):
    return [float(schedule(torch.tensor(step))) for step in range(steps)]


def test_warmup_reaches_its_peak_on_its_last_step():
    assert values(optim.warmup_constant(2.0, 4), 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert values(optim.constant(3.0), 2) == [3.0, 3.0]


def test_cosine_falls_from_the_peak_through_the_middle_to_the_floor():
    actual = values(optim.warmup_cosine(1.0, 2, 12, floor=0.2), 15)
    assert actual[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert actual[7] == pytest.approx(0.6)
    assert actual[12:] == pytest.approx([0.2] * 3)
    assert actual[2:] == sorted(actual[2:], reverse=True)


def test_trapezoid_is_level_between_its_slopes():
    actual = values(optim.trapezoid(1.0, 2, 10, 4, floor=0.2), 12)
    assert actual == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])


@pytest.mark.parametrize("make", [optim.warmup_cosine, optim.trapezoid])
def test_a_warmup_longer_than_the_run_is_refused(make):
    with pytest.raises(ValueError, match="warmup 10 must be at least 0 and below total 10"):
        make(1.0, 10, 10)


def test_a_schedule_sees_the_number_of_steps_done():
    optimizer = optim.scale_by_learning_rate(lambda count: count.float())
    ones = {"w": torch.ones(1)}
    state, seen = optimizer.init(ones), []
    for _ in range(3):
        updates, state = optimizer.update(ones, state, ones)
        seen.append(float(updates["w"]))
    assert seen == [0.0, -1.0, -2.0]
