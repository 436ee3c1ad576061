"""Laws of editing, interpolation, regions and tiles: ends, closed forms, and sums that are one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3 import pipeline
from functional_sd3.core import prng
from functional_sd3.flow import ode, path, schedule
from functional_sd3.flow.ode import fixed_point
from functional_sd3.pipeline import blending
from tests import models
from tests.models import parts


@pytest.fixture(scope="module")
def images():
    small = prng.uniform(prng.key(9), (2, 3, 6, 6))
    return torch.nn.functional.interpolate(small, (64, 64), mode="bicubic").clamp(0, 1)


@given(st.floats(0, 1), st.integers(0, 99))
def test_slerp_keeps_length_and_goes_round_evenly(amount, seed):
    start, end = prng.normal(prng.key(seed), (2, 3, 4, 5), dtype=torch.float64)
    start, end = start / start.flatten(1).norm(dim=1)[:, None, None], end / end.flatten(1).norm(dim=1)[:, None, None]
    between = pipeline.slerp(start, end, torch.tensor(amount, dtype=torch.float64))
    torch.testing.assert_close(between.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))
    angle = lambda a, b: torch.acos((a * b).flatten(1).sum(1).clamp(-1, 1))  # noqa: E731
    torch.testing.assert_close(angle(start, between), amount * angle(start, end), atol=1e-6, rtol=0)


def test_slerp_ends_where_it_says_and_is_lerp_where_there_is_no_arc():
    start, end = prng.normal(prng.key(0), (2, 3, 7))
    assert torch.equal(pipeline.slerp(start, end, 0.0), start)
    torch.testing.assert_close(pipeline.slerp(start, end, 1.0), end, atol=1e-6, rtol=0)
    for other in (start, 2 * start, -start):
        torch.testing.assert_close(pipeline.slerp(start, other, 0.3), 0.7 * start + 0.3 * other, atol=1e-6, rtol=1e-5)
    # With noises of one length the variance stays, where the chord loses half of it.
    noise = prng.normal(prng.key(1), (2, 1, 40_000))
    assert abs(float(pipeline.slerp(*noise, 0.5).var()) - 1) < 0.02
    assert abs(float(pipeline.lerp(*noise, 0.5).var()) - 0.5) < 0.02


def test_a_place_between_is_vmappable_and_has_finite_slopes(model):
    conditions = pipeline.encode(*parts(model), ["a red circle", "a blue star"])
    noises = prng.normal(prng.key(0), (2, 16, 8, 8))
    places = torch.tensor([0.0, 0.3, 1.0])
    together = pipeline.between(noises, conditions, places, pipeline.slerp)
    each = torch.func.vmap(lambda place: pipeline.between(noises, conditions, place[None], pipeline.slerp))(places)
    torch.testing.assert_close(together[0], each[0][:, 0])
    torch.testing.assert_close(together[1].positive.context, each[1].positive.context[:, 0])
    slope = torch.func.jacrev(lambda x: pipeline.slerp(x, x.clone(), torch.tensor([0.5, 0.5])))(noises[:, 0, 0])
    assert torch.isfinite(slope).all()


def test_interpolation_ends_in_the_images_of_its_stops(model):
    prompts, keys = ["a red circle", "a blue star", "a ring"], prng.split(prng.key(2), 3)
    frames = pipeline.interpolate(*parts(model), prompts, keys, frames=5, steps=2, batch=2)
    for frame, stop in ((0, 0), (2, 1), (4, 2)):
        image = pipeline.generate(*parts(model), prompts[stop], keys[stop : stop + 1], steps=2)[0]
        torch.testing.assert_close(frames[frame], image, atol=1e-4, rtol=0)
    assert (frames[1] - (frames[0] + frames[2]) / 2).abs().max() > 0.01
    still = pipeline.interpolate(*parts(model), prompts[:2], prng.key(5), frames=2, steps=2)
    for frame, prompt in zip(still, prompts[:2], strict=True):
        image = pipeline.generate(*parts(model), prompt, prng.key(5), steps=2)[0]
        torch.testing.assert_close(frame, image, atol=1e-4, rtol=0)


def test_variations_go_from_one_seed_to_the_other(model):
    told, near, far = {"steps": 2}, prng.key(1), prng.key(2)
    prompts = ["a red circle", "a ring"]
    for amount, key in ((0.0, near), (1.0, far)):
        moved = pipeline.variations(*parts(model), prompts, near, towards=far, amount=amount, **told)
        torch.testing.assert_close(moved, pipeline.generate(*parts(model), prompts, key, **told), atol=1e-4, rtol=0)
    amounts = torch.tensor([0.1, 0.9])
    both = pipeline.variations(*parts(model), prompts, near, towards=far, amount=amounts, **told)
    lone = pipeline.variations(*parts(model), prompts, near, towards=far, amount=0.9, **told)
    torch.testing.assert_close(both[1], lone[1], atol=1e-5, rtol=0)


def test_a_trajectory_ends_in_the_image_and_begins_with_the_first_prediction(model):
    told = {"steps": 3, "cfg": 2.0}
    states = pipeline.trajectory(*parts(model), "a ring", prng.key(3), **told)
    seen = pipeline.trajectory(*parts(model), "a ring", prng.key(3), show=pipeline.denoised, **told)
    image = pipeline.generate(*parts(model), "a ring", prng.key(3), **told)
    assert states.shape == seen.shape == (3, 1, 3, 64, 64)
    assert torch.equal(states[-1], image)
    # The last step goes to data: what it took them to be is where it arrives.
    torch.testing.assert_close(seen[-1], image, atol=1e-4, rtol=0)
    noise = pipeline.initial_noise(prng.key(3), model.config, 1)
    field = pipeline.velocity(model.params, model.config, pipeline.encode(*parts(model), ["a ring"]), 2.0)
    first = pipeline.decode(model.params, model.config, noise - field(noise, torch.tensor(1.0)))
    torch.testing.assert_close(seen[0], first, atol=1e-4, rtol=0)


def test_drawn_fully_to_its_image_a_run_ends_there_and_untouched_outside_its_window():
    end, start = prng.normal(prng.key(0), (2, 2, 4, 3))
    grid = schedule.sigmas(8)
    field = lambda x, t: torch.sin(3 * x) + t  # noqa: E731
    for method in (ode.EULER, ode.MIDPOINT, ode.HEUN_EDM):
        drawn = pipeline.pull_to(end, 1.0, *pipeline.step_window_times(grid, 0.0, 1.0))(field)
        torch.testing.assert_close(ode.integrate(method, drawn, start, grid), end, atol=1e-5, rtol=0)
        # The other way round, to a noise at t = 1.
        back = pipeline.pull_to(end, 1.0, 1.0, -1.0, place=1.0)(field)
        torch.testing.assert_close(ode.integrate(method, back, start, grid.flip(0)), end, atol=1e-5, rtol=0)
    states = ode.integrate(ode.EULER, field, start, grid, save="all")
    late = pipeline.pull_to(end, 0.5, *pipeline.step_window_times(grid, 0.5, 1.0))(field)
    bent = ode.integrate(ode.EULER, late, start, grid, save="all")
    assert torch.equal(states[:5], bent[:5]) and not torch.equal(states[5], bent[5])
    # One step of Euler: half of the field, half of the straight line.
    t, x = grid[4], states[4]
    slope = 0.5 * field(x, t) + 0.5 * (x - end) / t
    torch.testing.assert_close(bent[5], x + (grid[5] - t) * slope)
    nothing = pipeline.pull_to(end, 0.5, *pipeline.step_window_times(grid, 0.3, 0.3))(field)
    assert torch.equal(ode.integrate(ode.EULER, nothing, start, grid), states[-1])


def test_edits_that_change_nothing_give_the_image_back(model, images):
    latents = pipeline.encode_images(model.params, model.config, images)
    back = pipeline.decode(model.params, model.config, latents)
    told = {"steps": 6, "cfg": 2.0}
    drawn = pipeline.edit(*parts(model), "a ring", "a star", images, eta=1.0, window=(0.0, 1.0), **told)
    torch.testing.assert_close(drawn, back, atol=1e-4, rtol=0)
    same = {"source_cfg": 2.0, "cfg": 2.0, "steps": 6}
    unmoved = pipeline.flow_edit(*parts(model), "a ring", "a ring", images, prng.key(0), **same)
    torch.testing.assert_close(unmoved, back, atol=1e-5, rtol=0)
    start = pipeline.flow_edit(*parts(model), "a ring", "a star", images, prng.key(0), strength=0.0)
    assert torch.equal(start, back)
    # With each step solved for its start, the noise is that from which the method itself leads to the image.
    told = {"eta": 0.0, "source_cfg": 2.0, "cfg": 2.0, "steps": 6}
    plain, exact = (
        pipeline.edit(*parts(model), "a ring", "a ring", images, inversion=inversion, **told)
        for inversion in (None, fixed_point.inverse)
    )
    torch.testing.assert_close(exact, back, atol=1e-4, rtol=0)
    assert (plain - back).abs().max() > 1e-3
    # With the same prompt there and back the error is that of the inversion, which ever more steps make vanish.
    errors = []
    for steps in (4, 16):
        round_trip = pipeline.edit(
            *parts(model), "a ring", "a ring", images, eta=0.0, cfg=1.0, steps=steps, method=ode.RK4
        )
        errors.append(float((round_trip - back).abs().mean()))
    assert errors[1] < 0.2 * errors[0] and errors[1] < 0.01


def test_an_edit_is_its_two_runs_written_out(model, images):
    source, target = (pipeline.encode(*parts(model), [text] * 2) for text in ("a ring", "a star"))
    latents, grid = pipeline.encode_images(model.params, model.config, images), schedule.sigmas(4)
    there = pipeline.velocity(model.params, model.config, source, 1.5)
    back = pipeline.velocity(model.params, model.config, target, 3.0)
    drawn = lambda x, t: back(x, t) + (0.6 * ((x - latents) / t - back(x, t)) if t > grid[2] else 0)  # noqa: E731
    noise = ode.integrate(ode.EULER, there, latents, grid.flip(0))
    expected = ode.integrate(ode.EULER, drawn, noise, grid)
    edit = pipeline.InversionEdit(["a ring"] * 2, 1.5, eta=0.6, window=(0.0, 0.5))
    sampling = pipeline.SamplingOptions(steps=4, cfg=3.0, method=ode.EULER)
    ours = pipeline.edit_latents(model.params, model.config, (source, target), latents, edit, sampling)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_flow_edit_is_its_sum_written_out(model, images):
    """Kulikov et al. 2024, algorithm 1, step by step."""
    conditions = tuple(pipeline.encode(*parts(model), [text] * 2) for text in ("a ring", "a star"))
    latents, key, steps = pipeline.encode_images(model.params, model.config, images), prng.key(4), 4
    scales = (1.5, 4.0)
    fields = [pipeline.velocity(model.params, model.config, told, scale) for told, scale in zip(conditions, scales, strict=True)]  # fmt: skip  # noqa: E501
    grid, z = schedule.sigmas(steps), latents
    keys = prng.fold_in(key, torch.arange(2))
    for step in (1, 2, 3):
        t, moved = grid[step], []
        for each in range(2):
            noise = torch.stack([prng.normal(prng.fold_in(prng.fold_in(one, step), each), (16, 8, 8)) for one in keys])
            source = path.interpolate(latents, noise, t)
            moved.append(fields[1](z + source - latents, t) - fields[0](source, t))
        z = z + (grid[step + 1] - t) * torch.stack(moved).mean(0)
    edit, sampling = pipeline.FlowEdit(["a ring"] * 2, 1.5, averages=2), pipeline.SamplingOptions(steps=steps, cfg=4.0)
    ours = pipeline.flow_edit_latents(
        model.params, model.config, conditions, latents, key, edit, sampling, strength=0.75
    )
    torch.testing.assert_close(ours, z, atol=1e-4, rtol=1e-4)


@given(st.lists(st.floats(0.05, 3), max_size=3), st.integers(0, 9))
def test_shares_add_up_to_one_and_what_no_region_asks_for_is_the_images(weights, seed):
    config = models.config()
    masks = (prng.uniform(prng.key(seed), (len(weights) + 1, 1, 1, 64, 64)) > 0.5).float()
    asked = [pipeline.Region("", mask, weight) for mask, weight in zip(masks, weights, strict=False)]
    shares = pipeline.shares(asked, config, torch.zeros(1, 16, 8, 8))
    assert shares.shape == (1 + len(weights), 1, 8, 8) and (shares >= 0).all()
    torch.testing.assert_close(shares.sum(0), torch.ones(1, 8, 8))
    total = sum((torch.nn.functional.avg_pool2d(one.mask, 8) * one.weight for one in asked), torch.zeros(1, 1, 8, 8))
    torch.testing.assert_close(shares[0], (1 - total[0]).clamp_min(0), atol=1e-6, rtol=0)


def test_one_region_of_everything_is_its_prompt_and_halves_are_means(model):
    everything, told = torch.ones(1, 1, 8, 8), {"steps": 2}
    whole = pipeline.regional(
        *parts(model), "a ring", [pipeline.Region("a star", everything, 1.0)], prng.key(1), **told
    )
    torch.testing.assert_close(
        whole, pipeline.generate(*parts(model), "a star", prng.key(1), **told), atol=1e-4, rtol=0
    )
    x, t = prng.normal(prng.key(2), (1, 16, 8, 8)), torch.tensor(0.6)
    both = [pipeline.encode(*parts(model), [text]) for text in ("a ring", "a star")]
    fields = [pipeline.velocity(model.params, model.config, each, 2.0) for each in both]
    shares = pipeline.shares([pipeline.Region("", everything, 0.25)], model.config, x)
    mean = pipeline.blend_fields(shares)(model.params, model.config, both, 2.0)(x, t)
    torch.testing.assert_close(mean, 0.75 * fields[0](x, t) + 0.25 * fields[1](x, t))


@given(st.integers(2, 20), st.integers(1, 60), st.integers(1, 60), st.integers(1, 2), st.data())
def test_tiles_cover_everything_and_lie_on_patches(tile, height, width, patch, data):
    overlap = data.draw(st.integers(0, tile - 1))
    tile, overlap, height, width = (side * patch for side in (tile, overlap, height, width))
    covered = torch.zeros(height, width)
    for (rows, columns), ramp in blending.windows(covered, tile, overlap, patch):
        part = covered[rows, columns]
        assert part.shape == ramp.shape == (min(tile, height), min(tile, width)) and (ramp > 0).all()
        assert rows.start % patch == columns.start % patch == 0
        part += 1
    assert (covered > 0).all()


def test_an_image_of_one_tile_is_generate_and_tiles_of_a_pointwise_field_are_the_field(model):
    told = {"height": 64, "width": 64, "steps": 2}
    tiled = pipeline.tiled(*parts(model), "a ring", prng.key(1), **told)
    torch.testing.assert_close(
        tiled, pipeline.generate(*parts(model), "a ring", prng.key(1), **told), atol=1e-5, rtol=0
    )
    pointwise = lambda *arguments, **options: lambda x, t: torch.sin(x) * t  # noqa: E731
    x = prng.normal(prng.key(3), (2, 16, 22, 30))
    blend = pipeline.tiles(8, 3, pointwise)(model.params, model.config, None)
    torch.testing.assert_close(blend(x, torch.tensor(0.5)), torch.sin(x) * 0.5)


def test_an_image_beyond_the_table_of_positions_is_drawn_in_tiles_and_named_without(model):
    drawn = pipeline.tiled(*parts(model), "a ring", prng.key(1), height=64, width=400, tile=128, overlap=32, steps=2)
    assert drawn.shape == (1, 3, 64, 400) and torch.isfinite(drawn).all()
    with pytest.raises(ValueError, match="width 400 is beyond the 192 pixels .* in tiles"):
        pipeline.generate(*parts(model), "a ring", prng.key(1), height=64, width=400)
