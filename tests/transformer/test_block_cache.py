"""Blocks whose change is reused: distances, decisions and the state after each evaluation."""

import pytest
import torch

from functional_sd3.core import layers
from functional_sd3.transformer import block_cache, joint_block, mmdit
from functional_sd3.transformer.block_cache import Evaluation
from tests import models

CONFIG = mmdit.Config(
    depth=4, heads=2, head_dim=8, in_channels=3, out_channels=3, context_width=12, pooled_width=10, position_size=10,
    sample_size=16, qk_norm=True, dual_attention_layers=(0, 1),
)  # fmt: skip
close = torch.testing.assert_close


def random_inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, 3, 8, 6), (batch,), (batch, 5, 12), (batch, 10)
    latents, t, context, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    return latents, t.sigmoid(), context, pooled


@pytest.fixture(scope="module")
def params():
    return models.random_leaves(mmdit.spec(CONFIG))


def evaluate(params, inputs, state, threshold, *, after_first=True, is_computed=False, **options):
    cached = Evaluation(
        state, threshold, after_first=after_first, samples=options.pop("samples", len(inputs[0])),
        is_computed=is_computed, polynomial=options.pop("polynomial", (1.0, 0.0)),
    )  # fmt: skip
    calls = []

    def around(apply):
        return cached.transform(lambda *inputs, **options: (calls.append(1), apply(*inputs, **options))[1])

    velocity = mmdit.apply(params, CONFIG, *inputs, block_transform=around, **options)
    return velocity, cached.state, len(calls)


@pytest.mark.parametrize("after_first", [True, False])
def test_the_same_input_again_is_the_same_velocity_from_the_blocks_before(params, after_first):
    inputs = random_inputs()
    exact = mmdit.apply(params, CONFIG, *inputs)
    first, state, calls = evaluate(params, inputs, {}, 0.5, after_first=after_first)
    assert calls == CONFIG.depth and torch.equal(first, exact)
    again, after, calls = evaluate(params, inputs, state, 0.5, after_first=after_first)
    assert calls == after_first
    close(again, exact, rtol=1e-5, atol=1e-5)
    assert after.keys() == state.keys() == {"signal", "moved", "change"}


@pytest.mark.parametrize("after_first", [True, False])
def test_a_residual_that_is_added_between_blocks_is_not_reused(params, after_first):
    inputs, width = random_inputs(), CONFIG.width
    residuals = [torch.ones(2, 12, width), 2 * torch.ones(2, 12, width)]
    _, state, _ = evaluate(params, inputs, {}, 0.5, after_first=after_first, residuals=residuals)
    other = [3 * residual for residual in residuals]
    again, _, calls = evaluate(params, inputs, state, 0.5, after_first=after_first, residuals=other)
    assert calls == after_first
    image = mmdit.embed_image(params, CONFIG, inputs[0])
    first = []
    mmdit.apply(params, CONFIG, *inputs, block_transform=lambda apply: lambda *inputs: (
        first.append(apply(*inputs)["image"]), {"image": first[-1], "context": inputs[2]["context"]})[1])  # fmt: skip
    base = first[0] if after_first else image
    expected = base + state["change"] + sum(other[mmdit.residual_index(block, 4, 2)] for block in range(3))
    modulation = mmdit.modulations(params, CONFIG, *(inputs[1], inputs[3]))
    shift, scale = joint_block.split_modulation(modulation["final"], width)
    patches = layers.linear(params["final"]["out"], layers.modulate(joint_block.norm(expected), shift, scale))
    close(again, mmdit.unpatchify(patches, CONFIG, 4, 3), rtol=1e-5, atol=1e-5)


def test_each_sample_decides_by_all_its_rows_and_others_change_nothing(params):
    latents, t, context, pooled = random_inputs(4)
    _, state, _ = evaluate(params, (latents, t, context, pooled), {}, 0.5, samples=2)
    # Rows 0 and 2 are of the first sample; row 2 has moved, and so both are computed. Rows 1 and 3 are reused.
    moved = latents.clone()
    moved[2] = -3 * moved[2]
    inputs = moved, t, context, pooled
    mixed, after, calls = evaluate(params, inputs, state, 1e-3, samples=2)
    exact = mmdit.apply(params, CONFIG, *inputs)
    assert calls == CONFIG.depth
    close(mixed, exact, rtol=1e-5, atol=1e-5)
    for name in ("signal", "change"):
        assert torch.equal(after[name][[1, 3]], state[name][[1, 3]]) and not torch.equal(after[name][2], state[name][2])
    pair = tuple(each[[1, 3]] for each in inputs)
    alone, _, calls = evaluate(params, pair, {name: each[[1, 3]] for name, each in state.items()}, 1e-3, samples=1)
    assert calls == 1
    close(alone, mixed[[1, 3]], rtol=1e-5, atol=1e-5)


def test_distances_of_the_modulated_input_add_up_until_the_threshold(params):
    latents, t, context, pooled = random_inputs(1)
    step = 0.02 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    _, state, _ = evaluate(params, (latents, t, context, pooled), {}, 1.0, after_first=False)
    moved, counts = [], []
    before = state["signal"]
    for index in range(1, 5):
        inputs = (latents + index * step, t, context, pooled)
        _, after, calls = evaluate(params, inputs, state, 1.0, after_first=False, polynomial=(0.5, 2.0, 0.0))
        d = block_cache.relative_distance(after["signal"], before)
        close(after["moved"], state["moved"] + 0.5 * d**2 + 2.0 * d)
        counts.append(calls)
        moved.append(after["moved"].item())
        before, state = after["signal"], after
    assert counts == [0] * 4 and moved == sorted(moved)
    _, after, calls = evaluate(params, inputs, state, moved[-1], after_first=False)
    assert calls == CONFIG.depth and after["moved"].item() == 0


def test_a_step_that_must_be_computed_is_and_skipped_layers_are_no_blocks(params):
    inputs = random_inputs()
    _, state, _ = evaluate(params, inputs, {}, 0.5)
    _, _, calls = evaluate(params, inputs, state, 9.0, is_computed=True)
    assert calls == CONFIG.depth
    exact = mmdit.apply(params, CONFIG, *inputs, skip_layers=[0, 2])
    first, state, calls = evaluate(params, inputs, {}, 0.5, skip_layers=[0, 2])
    assert calls == 2 and torch.equal(first, exact)
    close(evaluate(params, inputs, state, 0.5, skip_layers=[0, 2])[0], exact, rtol=1e-5, atol=1e-5)
    none = mmdit.apply(params, CONFIG, *inputs, skip_layers=range(4))
    assert torch.equal(evaluate(params, inputs, {}, 0.5, skip_layers=range(4))[0], none)


def test_the_modulated_input_is_what_the_first_attention_projects(params, monkeypatch):
    inputs, seen, project = random_inputs(), [], joint_block._project
    monkeypatch.setattr(joint_block, "_project", lambda *arguments: (seen.append(arguments[2]), project(*arguments))[1])
    _, state, _ = evaluate(params, inputs, {}, 0.5, after_first=False)
    close(state["signal"], seen[0])
    table = mmdit.modulations(params, CONFIG, *(inputs[1], inputs[3]))
    _, tabled, _ = evaluate(params, inputs, {}, 0.5, after_first=False, modulations=table)
    close(tabled["signal"], state["signal"], rtol=1e-5, atol=1e-5)


def test_a_polynomial_is_fitted_to_changes_and_never_negative():
    d = torch.linspace(0, 1, 20)
    close(torch.tensor(block_cache.fit(d, 3 * d**2 + 0.5 * d, 2)), torch.tensor([3.0, 0.5, 0.0]), rtol=1e-5, atol=1e-5)
    # Changes that fall are fitted by a polynomial that does not.
    assert min(block_cache.fit(d, 3 * d - 3 * d**2, 2)) == 0
    assert block_cache.evaluate_polynomial((3.0, -0.5, 0.0), torch.tensor([0.1])).item() == 0
    close(block_cache.evaluate_polynomial((2.0, 1.0, 0.5), torch.tensor([3.0])), torch.tensor([21.5]))
    with pytest.raises(ValueError, match="1 pairs are too few"):
        block_cache.fit(d[:1], d[:1], 2)
