"""Sigma grids: spacings, shifts, parts of grids, and what is refused."""

import pytest
import torch

from functional_sd3.flow import ode, schedule

# torch builds its own forward-mode rules with torch.jit.script on the first jvp.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
DYNAMIC = schedule.Config(use_dynamic_shifting=True, time_shift_type="linear")


def test_the_four_steps_of_the_turbo_model():
    # Stability's reference and diffusers, shift 3.
    expected = torch.tensor([1.0, 0.8576924, 0.6021506, 0.0089286, 0.0])
    torch.testing.assert_close(schedule.sigmas(4), expected, rtol=0, atol=1e-6)


def test_the_low_end_is_shifted_twice_by_default_and_once_on_request():
    assert schedule.sigmas(28)[-2].item() == pytest.approx(0.0089286, abs=1e-6)
    assert schedule.sigmas(28, double_shift=False)[-2].item() == pytest.approx(0.0029940, abs=1e-6)


def test_shift_is_the_addition_of_its_logarithm_on_the_logit_of_sigma():
    sigma = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    shifted = torch.logit(schedule.shift(sigma, 3.0))
    torch.testing.assert_close(shifted, torch.logit(sigma) + torch.log(torch.tensor(3.0, dtype=torch.float64)))


def test_grids_are_float32_and_on_the_given_device():
    grid = schedule.sigmas(5, device="meta")
    assert grid.dtype == torch.float32 and grid.device.type == "meta" and grid.shape == (6,)


def test_the_gradient_of_a_grid_in_its_shift_is_the_derivative_of_the_formula():
    shift = torch.tensor(3.0, dtype=torch.float64)
    base = torch.linspace(0, 1, 7, dtype=torch.float64)
    jacobian = torch.func.jacfwd(schedule.shift, argnums=1)(base, shift)
    torch.testing.assert_close(jacobian, base * (1 - base) / (1 + 2 * base) ** 2)
    step = 1e-3
    slope = torch.func.jacrev(lambda s: schedule.sigmas(6, shift=s))(torch.tensor(3.0))
    difference = (schedule.sigmas(6, shift=3 + step) - schedule.sigmas(6, shift=3 - step)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-2, atol=1e-4)


def test_a_tensor_shift_gives_the_grid_of_the_number():
    torch.testing.assert_close(schedule.sigmas(9, shift=torch.tensor(2.5)), schedule.sigmas(9, shift=2.5))


def test_shifts_vmap_and_compile_to_the_grids_of_each():
    shifts = torch.tensor([1.0, 3.0, 6.0])
    grids = torch.func.vmap(lambda s: schedule.sigmas(7, shift=s))(shifts)
    for grid, s in zip(grids, shifts.tolist(), strict=True):
        torch.testing.assert_close(grid, schedule.sigmas(7, shift=s))
    compiled = torch.compile(lambda s: schedule.sigmas(7, shift=s), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(shifts[1]), schedule.sigmas(7))


def test_karras_spacing_is_even_in_the_seventh_root_and_exponential_in_the_logarithm():
    karras = schedule.karras(6, 0.01, 0.9) ** (1 / 7)
    torch.testing.assert_close(karras.diff(), karras.diff().mean().expand(5))
    exponential = schedule.exponential(6, 0.01, 0.9).log()
    torch.testing.assert_close(exponential.diff(), exponential.diff().mean().expand(5))


@pytest.mark.parametrize("spacing", [schedule.linear, schedule.karras, schedule.exponential, schedule.beta])
def test_spacings_begin_and_end_where_they_say(spacing):
    levels = spacing(8, 0.02, 0.95)
    assert levels.shape == (8,)
    assert levels[0].item() == pytest.approx(0.95, abs=1e-12) and levels[-1].item() == pytest.approx(0.02, abs=1e-12)
    assert (levels.diff() < 0).all()


def test_a_grid_of_ones_own_is_shifted_as_the_config_says_and_its_gradient_is_that_of_the_formula():
    levels = torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    grid = schedule.from_levels(schedule.Config(shift=3.0), levels)
    torch.testing.assert_close(grid, torch.tensor([1.0, 2.1 / 2.4, 0.6 / 1.4, 0.0]))
    torch.testing.assert_close(schedule.from_levels(schedule.Config(shift=3.0), [1.0, 0.7, 0.2]), grid)
    gradient = torch.func.jacrev(lambda x: schedule.from_levels(schedule.Config(shift=3.0), x))(levels)
    torch.testing.assert_close(gradient[:3].diagonal(), 3 / (1 + 2 * levels) ** 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spacing", [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_the_gradient_in_mu_is_that_of_differences_for_every_spacing(spacing, kind):
    # A spacing depends on the ends alone, which shift_terminal would fix.
    options = {spacing: True} if spacing else {"shift_terminal": 0.05}
    config = schedule.Config(train_timesteps=20, use_dynamic_shifting=True, time_shift_type=kind, **options)
    mu, step = torch.tensor(1.15, dtype=torch.float64), 1e-3
    slope = torch.func.jacfwd(lambda mu: schedule.from_config(config, 5, mu=mu))(mu)
    ahead, behind = (schedule.from_config(config, 5, mu=1.15 + sign * step) for sign in (1, -1))
    assert slope.abs().max() > 0.01
    torch.testing.assert_close(slope.float(), (ahead - behind) / (2 * step), rtol=1e-2, atol=2e-4)


def test_a_grid_is_learned_through_the_run_that_follows_it():
    # Two steps of Euler on dx/dt = x end at x (1 - h) (1 - (1 - h)): the middle time that gradients find is 1/2.
    logits = torch.tensor([1.0, -0.5], requires_grad=True)
    for _ in range(200):
        end = ode.integrate(ode.EULER, lambda x, t: x, torch.ones(1), schedule.learned(logits))
        (gradient,) = torch.autograd.grad(-end.sum(), [logits])
        logits = (logits - 5 * gradient).detach().requires_grad_()
    assert schedule.learned(logits)[1].item() == pytest.approx(0.5, abs=1e-3)


def test_grids_of_different_lengths_stand_side_by_side_and_the_shorter_waits_at_its_end():
    grids = schedule.stack([schedule.sigmas(5), schedule.partial(schedule.sigmas(5), 0.4), torch.tensor([1.0, 0.2])])
    assert grids.shape == (6, 3) and torch.equal(grids[:, 0], schedule.sigmas(5))
    assert torch.equal(grids[:3, 1], schedule.sigmas(5)[3:]) and (grids[3:, 1] == 0).all()
    assert (grids[2:, 2] == grids[1, 2]).all()


@pytest.mark.parametrize("spacing", [schedule.linear, schedule.karras, schedule.exponential])
def test_spacings_are_differentiable_in_their_ends(spacing):
    lowest, highest = torch.tensor(0.02, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: spacing(5, a, b), (lowest.requires_grad_(), highest.requires_grad_()))


def test_stretching_moves_the_last_level_to_the_given_one():
    levels = schedule.stretch(schedule.linear(6, 0.01), 0.1)
    assert levels[0] == 1 and levels[-1].item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("steps", "strength", "kept"),
    [(50, 0.2, 10), (50, 0.6, 30), (28, 0.6, 17), (10, 0.7, 7), (4, 1, 4), (4, 0, 0), (10, 0.01, 1), (99, 1 / 3, 33)],
)
def test_strength_keeps_that_part_of_the_steps_rounded_up(steps, strength, kept):
    grid = schedule.sigmas(steps)
    part = schedule.partial(grid, strength)
    assert len(part) == kept + 1 and torch.equal(part, grid[steps - kept :])


def test_learned_grids_descend_from_one_to_zero_and_even_logits_give_even_steps():
    torch.testing.assert_close(schedule.learned(torch.zeros(8)), torch.linspace(1, 0, 9))
    grid = schedule.learned(torch.tensor([3.0, -2.0, 0.5, 9.0]))
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()


def test_the_position_of_a_time_of_the_grid_is_its_index():
    grid = schedule.sigmas(9)
    assert torch.equal(schedule.position(grid, grid), torch.arange(10))
    assert schedule.position(grid, grid[3]).shape == () and schedule.position(grid, grid[3] + 1e-6) == 3


def test_resolution_mu_passes_through_both_ends():
    config = schedule.Config(use_dynamic_shifting=True)
    assert schedule.resolution_mu(config, 256) == pytest.approx(0.5)
    assert schedule.resolution_mu(config, 4096) == pytest.approx(1.15)


def test_configs_are_hashable_values():
    assert len({schedule.Config(), schedule.Config(shift=3.0), schedule.Config(shift=1.0)}) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule.sigmas(0), "steps 0"),
        (lambda: schedule.sigmas(2.5), "steps 2.5"),
        (lambda: schedule.sigmas(4, shift=0.0), "shift 0.0"),
        (lambda: schedule.sigmas(4, shift=float("nan")), "shift nan"),
        (lambda: schedule.sigmas(4, train_timesteps=0), "train_timesteps 0"),
        (lambda: schedule.partial(schedule.sigmas(4), 1.2), "strength 1.2"),
        (lambda: schedule.partial(schedule.sigmas(4), float("nan")), "strength nan"),
        (lambda: schedule.from_config(schedule.Config(use_dynamic_shifting=True), 4), "needs mu"),
        (lambda: schedule.from_config(schedule.Config(), 4, mu=1.0), "mu 1.0 has no meaning"),
        (lambda: schedule.from_config(schedule.Config(time_shift_type="cubic"), 4), "'cubic'"),
        (lambda: schedule.from_config(schedule.Config(use_karras_sigmas=True, use_beta_sigmas=True), 4), "only one"),
        (lambda: schedule.from_config(schedule.Config(shift_terminal=0.1), 1), "at least 2 steps"),
        (lambda: schedule.from_config(schedule.Config(shift_terminal=1.2), 4), "shift_terminal 1.2"),
        (lambda: schedule.from_config(DYNAMIC, 4, mu=-1.0), "gives the shift -1.0"),
        (lambda: schedule.from_levels(schedule.Config(), [1.0, 0.5, 0.0]), r"leave \(0, 1\]"),
        (lambda: schedule.from_levels(schedule.Config(), [900.0, 500.0]), r"leave \(0, 1\]"),
        (lambda: schedule.from_levels(schedule.Config(), [0.5, 0.7]), "do not descend"),
        (lambda: schedule.from_levels(schedule.Config(), torch.tensor([999, 500])), "not timesteps"),
        (lambda: schedule.from_levels(schedule.Config(), torch.ones(2, 2)), r"shape \(2, 2\)"),
        (lambda: schedule.from_levels(DYNAMIC, [0.5]), "needs mu"),
    ],
)
def test_what_makes_no_grid_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_absurd_numbers_of_steps_are_refused_before_a_grid_is_made():
    for call in (
        lambda: schedule.sigmas(10**12),
        lambda: schedule.even(10**12),
        lambda: schedule.Config(distilled_steps=10**12, distillation="meanflow"),
    ):
        with pytest.raises(ValueError, match="steps 1000000000000 must be at most 1,000,000: a grid holds the time of"):
            schedule.check_config(call())


@pytest.mark.parametrize("steps", [None, "3", [3], 2.5, 0, -1, True])
def test_steps_that_are_no_whole_number_of_at_least_1_are_refused(steps):
    with pytest.raises(ValueError, match=r"steps .* must be a whole number of at least 1"):
        schedule.check_steps(steps)
