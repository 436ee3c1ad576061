"""Modulations of a run, computed once: every evaluation has those of its own time, chosen by the index of its step."""

import pytest
import torch

from functional_sd3 import pipeline
from functional_sd3.core import prng
from functional_sd3.core import spec as specs
from functional_sd3.flow import guidance, ode, schedule
from functional_sd3.flow.analysis import adjoint
from functional_sd3.flow.ode import fixed_point
from functional_sd3.pipeline import modulation_table
from functional_sd3.pipeline.modulation_table import Table
from functional_sd3.transformer import control, controlnet
from tests import models
from tests.models import parts

KEY, STEPS = prng.key(7), 4
METHODS = {
    **ode.METHODS,
    **{name: make(KEY) for name, make in ode.STOCHASTIC.items()},
    "checkpointed": adjoint.checkpointed(ode.HEUN),
    "inverse": fixed_point.inverse(ode.EULER, tolerance=1e-2),
}
GUIDANCES = {
    "whole": guidance.cfg(3.0),
    "windows": guidance.skip_layer(guidance.interval(guidance.cfg(3.0), 0.25, 1.0), (0,), 1.5, 0.3, 0.7),
    "zero": guidance.zero_init(guidance.zero_star(3.0)),
}
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def model():
    return models.random_model(models.config(depth=1))


@pytest.fixture(scope="module")
def conditions(model):
    return pipeline.encode(*parts(model), ["a red circle", "a blue star"])


@pytest.fixture(scope="module")
def noise(model):
    return pipeline.initial_noise(prng.key(2), model.config, 2)[..., :4, :4]


@pytest.fixture(scope="module")
def windowed_control(model, noise):
    """A ControlNet that is active in the middle steps alone."""
    sizes = model.config.transformer
    config = controlnet.Config(
        depth=1, heads=sizes.heads, head_dim=sizes.head_dim, patch_size=sizes.patch_size,
        in_channels=sizes.in_channels, context_width=sizes.context_width, pooled_width=sizes.pooled_width,
        position_size=sizes.position_size, qk_norm=sizes.qk_norm,
    )  # fmt: skip
    paths = specs.paths(controlnet.spec(config))
    leaves = {
        path: 0.1 * prng.normal(prng.fold_in(KEY, i), param.shape) for i, (path, param) in enumerate(paths.items())
    }
    params = specs.map_params(lambda path, param: leaves[path], controlnet.spec(config))
    return control.Control(params, config, noise[:1], start=0.25, end=0.75)


@pytest.mark.parametrize("guiding", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_is_that_of_modulations_computed_at_every_evaluation(
    model, conditions, noise, windowed_control, method, guiding
):
    def plain(step):
        active = [windowed_control] if 1 <= step < 3 else []
        return pipeline.velocity(
            model.params, model.config, conditions, guidance=guidance.at(guiding, step, STEPS), control=active
        )

    with torch.no_grad():
        times = pipeline.sigmas(model.config, noise, STEPS)
        expected = ode.integrate(method, ode.Stepwise(plain), noise, times)
        found = pipeline.sample(
            model.params, model.config, conditions, noise,
            steps=STEPS, method=method, guidance=guiding, control=[windowed_control],
        )  # fmt: skip
    close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_velocity_of_a_step_has_the_modulations_of_its_own_times_alone(model, conditions, noise):
    grid = pipeline.sigmas(model.config, noise, STEPS)
    known = ode.evaluation_times(ode.MIDPOINT, grid, 2)
    stepwise = pipeline.velocity(model.params, model.config, conditions, 3.0, known)
    plain = pipeline.velocity(model.params, model.config, conditions, 3.0)
    for step, times in enumerate(known):
        for t in times:
            close(stepwise.at(step)(noise, t), plain(noise, t))
            with pytest.raises(ValueError, match="not among the 2 times"):
                stepwise.at(step - 1)(noise, t)


def test_a_grid_for_each_sample_is_the_run_of_each_and_float64_times_are_taken(model, conditions, noise):
    grids = schedule.sigmas(STEPS), torch.linspace(0.9, 0.1, STEPS + 1)

    def sample(conditions, noise, times, method=ode.HEUN):
        return pipeline.sample(model.params, model.config, conditions, noise, times=times, method=method, cfg=3.0)

    with torch.no_grad():
        found = sample(conditions, noise, torch.stack(grids, 1))
        for index, grid in enumerate(grids):
            one = slice(index, index + 1)
            alone = sample(pipeline.slice_batch(conditions, one), noise[one], grid)
            close(found[one], alone, atol=1e-4, rtol=1e-4)
        assert torch.equal(sample(conditions, noise, grids[0].double()), sample(conditions, noise, grids[0]))


def table(times):
    times = torch.as_tensor(times)
    return Table(
        times[:, None] if times.ndim == 1 else times, {"block": 10 * times.reshape(len(times), -1, 1).expand(-1, 3, 2)}
    )


def test_the_row_is_that_of_the_nearest_time_up_to_rounding():
    rows = table([0.75, 0.5, 0.25])
    for t, expected in ((0.5, 5.0), (0.5 + 1e-7, 5.0), (0.25, 2.5)):
        row = modulation_table.lookup(rows, torch.tensor(t))
        assert row.is_valid is None and row.modulations["block"].eq(expected).all()
    each = modulation_table.lookup(rows, torch.tensor([0.25, 0.75, 0.5]))
    assert torch.equal(each.modulations["block"][:, 0], torch.tensor([2.5, 7.5, 5.0]))
    for wrong in (torch.tensor(0.5 + 1e-5), torch.tensor([0.25, 0.3, 0.5])):
        with pytest.raises(ValueError, match="not among the 3 times"):
            modulation_table.lookup(rows, wrong)
    with pytest.raises(ValueError, match="not among"):
        modulation_table.lookup(table(torch.tensor([0.5], dtype=torch.float64)), torch.tensor(0.5 + 1e-7).double())


@pytest.mark.parametrize("rows", [table([0.5]), table([0.75, 0.5])], ids=["one row", "two rows"])
def test_where_no_value_can_be_read_another_time_gives_nan_and_its_own_the_row(rows):
    x = torch.ones(3, 2)

    def velocity(t):
        row = modulation_table.lookup(rows, t)
        return modulation_table.mask_invalid(x * row.modulations["block"], row)

    times = torch.tensor([0.5, 0.4])
    for found in (
        torch.func.vmap(velocity)(times),
        torch.stack([torch.compile(velocity, fullgraph=True, backend="eager")(t) for t in times]),
    ):
        assert found[0].eq(5.0).all() and found[1].isnan().all()
    # Reading a value of a tensor without one would raise.
    rows = Table(rows.times.to("meta"), {"block": rows.modulations["block"].to("meta")})
    row = modulation_table.lookup(rows, torch.tensor(0.4, device="meta"))
    assert modulation_table.mask_invalid(x.to("meta"), row).shape == x.shape
