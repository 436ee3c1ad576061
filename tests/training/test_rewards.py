"""Rewards, group advantages, rollouts and the slow copy: against closed forms, and what is refused."""

import sys

import pytest
import torch

from functional_sd3.core import prng, tree
from functional_sd3.image import pixels
from functional_sd3.recipes import shapes
from functional_sd3.recipes.shapes import rewards as shapes_rewards
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import copies, optim, rewards, rollouts, step
from functional_sd3.training.rewards import RewardError

PROMPTS = ["a", "b", "c"]


def test_advantages_are_centred_in_the_group_and_scaled_by_the_batch():
    given = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5], [2.0, 0.0, 0.0, 0.0]])
    advantages = rewards.group_advantages(given)
    expected = (given - given.mean(1, keepdim=True)) / (given.std() + 1e-4)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(
        rewards.group_advantages(given, scale="group")[0], (given[0] - 0.5) / (given[0].std() + 1e-4)
    )
    torch.testing.assert_close(
        rewards.group_advantages(given, scale="none", clip=0.6)[2], torch.tensor([0.6, *[-0.5] * 3])
    )
    assert rewards.has_spread(given).tolist() == [True, False, True]
    # A mean of equal numbers may be rounded to another one.
    assert (rewards.group_advantages(torch.full((3, 7), 0.1), scale="group") == 0).all()
    with pytest.raises(ValueError, match="size at least 2"):
        rewards.group_advantages(torch.ones(3, 1))
    with pytest.raises(ValueError, match="scale 'all' must be"):
        rewards.group_advantages(given, scale="all")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0, 2.0, 3.0], "reward r returned list; it must return {name: tensor (3,)}"),
        ({}, "reward r returned dict"),
        (None, "reward r returned NoneType"),
        ({"s": 1.0}, "score 's' is float; it must be a tensor (3,)"),
        ({"s": torch.ones(2)}, "score 's' has shape [2]; it must be (3,), one number an image"),
        ({"s": torch.ones(3, 1)}, "score 's' has shape [3, 1]"),
        ({"s": torch.ones(())}, r"score 's' has shape []"),
        ({"s": torch.ones(3, dtype=torch.complex64)}, "score 's' is torch.complex64"),
        (
            {"s": torch.tensor([0.0, float("nan"), 1.0])},
            "score 's' is nan for 1 of 3 images, the first of the prompt 'b'",
        ),
        ({"s": torch.tensor([0.0, 1.0, float("-inf")])}, "score 's' is -inf for 1 of 3 images"),
        ({"s": torch.tensor([1e300, 0, 0], dtype=torch.float64)}, "score 's' is inf for 1 of 3 images"),
        ({3: torch.ones(3)}, "score 3 must have a text as its name"),
    ],
)
def test_what_is_no_score_of_each_image_is_named(returned, said):
    with pytest.raises(RewardError) as caught:
        rewards.combined({"r": lambda images, prompts, facts: returned})(torch.zeros(3, 3, 8, 8), PROMPTS, [None] * 3)
    assert said in str(caught.value)


def test_several_rewards_are_one_and_an_error_names_its_reward():
    def broken(images, prompts, facts):
        raise KeyError("oops")

    images = torch.zeros(3, 3, 8, 8)
    one = lambda images, prompts, facts: torch.arange(3)  # noqa: E731
    two = lambda images, prompts, facts: {"x": torch.ones(3, dtype=torch.bool), "y": torch.full((3,), 2.0)}  # noqa: E731
    scores = rewards.combined({"one": one, "two": two})(images, PROMPTS, [None] * 3)
    assert {name: score.tolist() for name, score in scores.items()} == {"one": [0, 1, 2], "x": [1] * 3, "y": [2] * 3}
    assert all(score.dtype == torch.float32 for score in scores.values())
    assert rewards.total(scores, {"one": 2.0, "y": -1.0}).tolist() == [-2, 0, 2]
    assert rewards.total(scores, {"y": 0.0}, 1.0).tolist() == [1, 2, 3]
    with pytest.raises(RewardError, match="no reward gives the score z, which has a weight; there are: one, x, y"):
        rewards.total(scores, {"z": 1.0})
    with pytest.raises(RewardError, match="one of them not 0"):
        rewards.total(scores, {"y": 0.0})
    with pytest.raises(RewardError, match="reward bad raised KeyError: 'oops'"):
        rewards.combined({"bad": broken})(images, PROMPTS, [None] * 3)
    with pytest.raises(RewardError, match="reward bad raised SystemExit: 3"):
        rewards.combined({"bad": lambda *_: sys.exit(3)})(images, PROMPTS, [None] * 3)
    with pytest.raises(RewardError, match="two rewards give the score a;"):
        rewards.combined({"a": one, "b": lambda *_: {"one": torch.ones(3), "a": torch.ones(3)}, "one": one})(
            images, PROMPTS, [None] * 3
        )


def test_a_reward_may_change_what_it_gets():
    def destructive(images, prompts, facts):
        brightness = images.mean((1, 2, 3))
        images.zero_()
        prompts.clear()
        facts.append(None)
        return {"first": brightness}

    images = torch.ones(3, 3, 8, 8)
    after = lambda images, prompts, facts: {"second": images.mean((1, 2, 3)) + len(prompts) + len(facts)}  # noqa: E731
    both = rewards.combined({"first": destructive, "second": after})
    scores = both(images, PROMPTS, [None] * 3)
    assert scores["first"].tolist() == [1] * 3 and scores["second"].tolist() == [7] * 3
    assert images.all() and PROMPTS == ["a", "b", "c"]
    # The images of draft have a gradient, which passes through the copy.
    gradient = torch.func.grad(lambda x: both(x, PROMPTS, [None] * 3)["second"].sum())(images)
    torch.testing.assert_close(gradient, torch.full_like(images, 1 / 192))


def test_a_sum_of_scores_beyond_float32_is_an_error():
    scores = {"x": torch.full((3,), 3e38), "y": torch.full((3,), 3e38)}
    with pytest.raises(RewardError, match="too large for float32"):
        rewards.total(scores, {"x": 1.0, "y": 1.0})


def test_a_reward_is_named_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_here.py").write_text(
        "import torch\ndef one(i, p, f): return torch.ones(len(p))\nthing = 3\n"
    )
    (tmp_path / "my_broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "my_exiting_rewards.py").write_text("raise SystemExit(4)\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    try:
        assert rewards.from_name("my_rewards_here:one")(None, PROMPTS, None).tolist() == [1, 1, 1]
        for name, said in [
            ("my_rewards_here", "must be module:function"),
            ("my_rewards_here:two", "the module my_rewards_here has no two"),
            ("my_rewards_here:thing", "is int, not a function"),
            ("my_exiting_rewards:x", "cannot be imported: 4"),
            ("my_broken_rewards:x", "cannot be imported: division by zero"),
            ("nowhere_at_all:x", "cannot be imported: No module named"),
        ]:
            with pytest.raises(ValueError, match=said):
                rewards.from_name(name)
    finally:
        sys.modules.pop("my_rewards_here", None)
    assert sys.path == before


def test_psnr_to_a_target_is_finite_and_has_a_gradient():
    target = torch.full((3, 4, 4), 0.5)
    images = torch.stack([target, target + 0.1]).requires_grad_()
    score = rewards.psnr(target)(images, ["a", "b"], [None] * 2)["psnr"]
    torch.testing.assert_close(score.detach(), torch.tensor([60.0, 20.0]))
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert torch.isfinite(gradient).all() and (gradient[1] < 0).all()
    with pytest.raises(ValueError, match="the target is"):
        rewards.psnr(target)(torch.zeros(1, 3, 8, 8), ["a"], [None])


def test_the_rewards_of_the_shapes_know_right_from_wrong():
    texts, scenes = shapes_rewards.source()(prng.key(5), 12)
    again, others = shapes_rewards.source()(prng.key(5), 12)
    assert texts == again and scenes == others and not any(map(shapes.is_held_out, scenes))
    images = pixels.from_pil([shapes.draw(scene) for scene in scenes])
    right = shapes_rewards.shapes(images, texts, scenes)
    assert right["right"].tolist() == [1.0] * 12 and right["partial"].tolist() == [1.0] * 12
    assert (shapes_rewards.colours(images, texts, scenes)["colours"] > 0.999).all()
    wrong = shapes_rewards.shapes(images.roll(1, 0), texts, scenes)
    assert not any(wrong["right"]) and (wrong["partial"] < 1).all()
    # Turned upside down, with the same colours: the proxy is content and the reader is not.
    two = [scene for scene in shapes_rewards.source(2)(prng.key(6), 20)[1] if scene.relation in ("above", "below")]
    turned = pixels.from_pil([shapes.draw(scene) for scene in two]).flip(-2)
    assert len(two) > 3 and (shapes_rewards.colours(turned, [""] * len(two), two)["colours"] > 0.999).all()
    assert not any(shapes_rewards.shapes(turned, [""] * len(two), two)["right"])
    assert {len(scene.things) for scene in shapes_rewards.source(1)(prng.key(0), 9)[1]} == {1}


def groups(scores):
    """A drawn batch whose images have these rewards and hold their number."""
    given = torch.tensor(scores)
    count = given.numel()
    return rollouts.Groups({"latents": torch.arange(float(count))[:, None]}, given, {"s": given}, 1.0)


def test_groups_are_gathered_until_the_batch_is_full():
    parts = [groups([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]), groups([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])]
    calls = []

    def draw(attempt):
        calls.append(attempt)
        return parts[attempt]

    rows, metrics = rollouts.gather(draw, 2, 4)
    assert calls == [0, 1]
    together = torch.cat([part.rewards for part in parts])
    expected = rewards.group_advantages(together)[[2, 3]].flatten()
    torch.testing.assert_close(rows["advantage"], expected)
    assert rows["latents"].flatten().tolist() == [4, 5, 0, 1] and rows["reward"].tolist() == [0, 1, 1, 0]
    wanted = {"reward": 5 / 12, "s": 5 / 12, "spread": 0.5, "all_right": 1 / 6, "all_wrong": 1 / 3, "draws": 2}
    assert {name: pytest.approx(float(metrics[name])) for name in wanted} == wanted
    assert float(metrics["diversity"]) == pytest.approx(0.5**0.5)
    assert rollouts.gather(lambda attempt: parts[0], 2, 1).rows["latents"].flatten().tolist() == [4, 5]
    none = rollouts.gather(lambda attempt: groups([[1.0, 1.0], [0.0, 0.0]]), 2, 3)
    assert none.rows is None and float(none.metrics["draws"]) == 3 and float(none.metrics["all_right"]) == 0.5
    other = [parts[0], parts[1]._replace(scores={"s": parts[1].rewards, "more": parts[1].rewards})]
    with pytest.raises(RewardError, match="gave the scores s, and then s, more: give the same each time"):
        rollouts.gather(lambda attempt: other[attempt], 2, 4)
    with pytest.raises(RewardError, match="a reward gives the score spread, which the log has of its own"):
        rollouts.gather(lambda attempt: parts[0]._replace(scores={"spread": parts[0].rewards}), 2, 4)


def test_an_image_of_a_rollout_depends_on_its_own_key():
    seen = []

    def reward(images, prompts, facts):
        seen.append((list(prompts), list(facts)))
        return {"mean": images.mean((1, 2, 3))}

    def draw(params, conditioning, noise, keys):
        return {"latents": noise + prng.normal(prng.fold_in(keys, 1), (2,)) + conditioning.pooled, "noise": noise}

    options = {
        "source": lambda key, count: ([str(i) for i in range(count)], list(range(count))),
        "encode": lambda texts: Conditioning(
            torch.zeros(len(texts), 1, 1), torch.tensor([[100.0 * int(t)] for t in texts])
        ),
        "noise": lambda keys: prng.normal(keys, (2,)),
        "draw": draw,
        "decode": lambda params, latents: latents[:, :, None, None].expand(-1, -1, 2, 2).mean(1, True),
        "reward": reward,
        "weights": {"mean": 2.0},
    }  # fmt: skip
    whole = rollouts.draw_groups({}, prng.key(0), 3, 2, **options)
    parts = rollouts.draw_groups({}, prng.key(0), 3, 2, **options, at_once=4)
    assert torch.equal(whole.rows["latents"], parts.rows["latents"]) and whole.rewards.shape == (3, 2)
    assert seen[0] == (["0", "0", "1", "1", "2", "2"], [0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(whole.rewards.flatten(), 2 * whole.rows["latents"].mean(1))
    assert whole.highest == 2.0 and len(set(whole.rows["latents"].flatten().tolist())) == 12
    same = rollouts.draw_groups({}, prng.key(0), 3, 2, **options, same_noise=True)
    assert torch.equal(same.rows["noise"], whole.rows["noise"][::2].repeat_interleave(2, 0))
    # A function that `combined` has not seen is checked too.
    for wrong, said in (
        (lambda images, *_: images.mean((1, 2, 3)) * torch.nan, "<lambda>: its score .* is nan for 6 of 6 images"),
        (lambda images, *_: images.mean((2, 3)), r"<lambda>: its score .* has shape \[6, 1\]"),
        (lambda images, *_: 1 / 0, "<lambda> raised ZeroDivisionError"),
        (lambda images, *_: {}, "<lambda> returned dict; it must return"),
    ):
        with pytest.raises(RewardError, match=said):
            rollouts.draw_groups({}, prng.key(0), 3, 2, **{**options, "reward": wrong})
    assert len(set(same.rows["latents"].flatten().tolist())) == 12


def test_the_slow_copy_follows_by_its_schedule():
    n = lambda number: torch.tensor(number)  # noqa: E731
    nft, ocr, renewed = copies.linear(0.001, 0.5), copies.linear(0.0075, 0.999, start=75), copies.renewed(40)
    assert [float(nft(n(i))) for i in (0, 100, 900)] == pytest.approx([0.0, 0.1, 0.5])
    assert [float(ocr(n(i))) for i in (10, 75, 175, 900)] == pytest.approx([0.0, 0.0, 0.75, 0.999])
    assert [float(renewed(n(i))) for i in (1, 39, 40, 41, 80)] == [1, 1, 0, 1, 0]
    old, new = {"a": [torch.tensor([1.0, 3.0])]}, {"a": [torch.tensor([2.0, 7.0])]}
    torch.testing.assert_close(copies.soft_update(old, new, torch.tensor(0.25))["a"][0], torch.tensor([1.75, 6.0]))


def test_a_round_without_a_batch_changes_nothing_but_the_count():
    def loss(params, batch, keys):
        return (params["a"] - batch["x"]).square().mean(), {"kl": params["a"].detach()}

    optimizer = optim.adamw(0.1, decay=0.0)
    update = step.make_train_step(loss, optimizer, donate=True)
    round_step = copies.make_round_step(update, copies.renewed(2), updates=3, names=("kl",))
    state = copies.init(step.init(prng.key(0), {"a": torch.tensor(1.0)}, optimizer))
    batch = {"x": torch.zeros(4)}
    state, metrics = round_step(state, copies.Round(batch, {"reward": torch.tensor(0.5)}))
    assert int(state.step) == 1 and int(state.train.step) == 3 and float(state.old["a"]) == 1.0
    assert set(metrics) == {"loss", "grad_norm", "kl", "reward"}
    before = tree.map(torch.clone, state)
    state, metrics = round_step(state, copies.Round(None, {"reward": torch.tensor(0.0)}))
    assert not tree.diff(before.train, state.train) and not tree.diff(before.old, state.old) and int(state.step) == 2
    assert metrics["kl"] != metrics["kl"] and float(metrics["loss"]) == 0
    state, _ = round_step(state._replace(step=torch.tensor(3)), copies.Round(batch, {}))
    assert torch.equal(state.old["a"], state.params["a"])


def test_a_batch_in_parts_of_unequal_sizes_gives_the_gradient_of_the_whole():
    def loss(params, batch, keys):
        values = (params["a"] * batch["x"] + prng.normal(keys)).square()
        return values.mean(), {"mean": values.mean().detach()}

    def advanced(**options):
        optimizer = optim.scale_by_learning_rate(1.0)
        train_step = step.make_train_step(loss, optimizer, **options)
        state = step.init(prng.key(0), {"a": torch.tensor(1.0)}, optimizer)
        return train_step(state, {"x": torch.arange(7.0)})

    whole, parts = advanced(), advanced(rows=3)
    torch.testing.assert_close(parts[0].params, whole[0].params)
    torch.testing.assert_close(parts[1], whole[1])
    assert torch.equal(advanced(rows=7)[0].params["a"], whole[0].params["a"])
    with pytest.raises(ValueError, match="rows 0 must be at least 1"):
        step.make_train_step(loss, optim.adamw(0.1), rows=0)
