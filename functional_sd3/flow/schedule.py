"""Grids of sigma (= t) from noise to data: spacings, shifts and the schedules that released models sample on.

A grid is a float32 tensor (steps + 1,): descending from 1 (noise) to 0 (data). It is computed in float64 and rounded
once. Shifts: Esser et al. 2024, arXiv:2403.03206, section 5.3.2, eq. 23. Kept to the bit: diffusers'
`FlowMatchEulerDiscreteScheduler`. Everything is differentiable in its tensor arguments, so a grid can be learned.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import SupportsInt

import torch
from torch import Tensor

from functional_sd3.flow import distilled
from functional_sd3.flow.spacing import Scalar, beta, exponential, karras, linear
from functional_sd3.flow.times import is_readable

MAX_STEPS = 1_000_000
"""The most steps of a grid, as in `--steps`."""


@dataclass(frozen=True)
class Config:
    """The fields of `scheduler_config.json`, in diffusers' names (`num_train_timesteps`: `train_timesteps`).

    `stochastic_sampling` is of the method: a run of the pipeline that names none takes `ode.renoised` instead of
    Euler's. The last four, which diffusers does not know, are of distilled models: the number of steps that one was
    distilled for, on `even(steps, shift)`; the numbers of steps that it was trained for after that, such as by rewards,
    the default first (empty: none but `distilled_steps`); what it learned (`distilled.KINDS`); whether guidance is
    folded into it. The rest are of the grid.
    """

    shift: float = 3.0
    train_timesteps: int = 1000
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None
    invert_sigmas: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    stochastic_sampling: bool = False
    distilled_steps: int | None = None
    trained_steps: tuple[int, ...] = ()
    distillation: str | None = None
    guidance_distilled: bool = False


def shift(sigma: Tensor, s: Scalar) -> Tensor:
    """s sigma / (1 + (s - 1) sigma): moves a grid in [0, 1] towards noise for s > 1; `shift(shift(x, s), 1 / s) = x`.

    On the logit of sigma it is the addition of log(s). The ends 0 and 1 stay.
    """
    return s * sigma / (1 + (s - 1) * sigma)


def sigmas(
    steps: int,
    *,
    shift: Scalar = 3.0,
    train_timesteps: int = 1000,
    double_shift: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """The grid of SD3 and SD3.5: float32 (steps + 1,), from 1 to 0, for `steps` Euler steps.

    steps points evenly spaced from 1 down to sigma_min are shifted, and 0 follows. `double_shift`: sigma_min, the
    lowest level of the training table (1 / train_timesteps), is itself taken after the shift, so the low end is shifted
    twice. Stability's and diffusers' samplers both do it, every published image depends on it (the last level before
    0 is 0.0089 at shift 3); False shifts once. It starts at 1 for every shift, where diffusers' float32 table, which
    `from_config` follows to the last bit, misses 1 by a rounding for some, such as 4.292.

    Raises ValueError for steps < 1, shift <= 0, train_timesteps < 1.
    """
    check_steps(steps)
    if train_timesteps < 1:
        raise ValueError(f"train_timesteps {train_timesteps} must be at least 1")
    levels = shifted(linear(steps, _lowest(train_timesteps, shift if double_shift else 1.0)), shift)
    return _finish(levels, device)


def even(steps: int, shift: Scalar = 3.0, *, device: torch.device | str | None = None) -> Tensor:
    """`shift` of 1, 1 - 1 / steps, ..., 0: float32 (steps + 1,), the grid of distilled models.

    Grids of different steps nest: `even(n * k)[::k]` is `even(n)` to the bit. Raises ValueError for steps < 1 and
    shift <= 0.
    """
    check_steps(steps)
    levels = 1 - torch.arange(steps, dtype=torch.float64, device="cpu") / steps
    return _finish(shifted(levels, shift), device)


def from_config(
    config: Config, steps: int, *, mu: Scalar | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The grid that diffusers' scheduler of this config sets for `steps`: float32 (steps + 1,).

    mu: the log-shift (exponential) or shift (linear) of a config with `use_dynamic_shifting`, see `resolution_mu`; it
    is needed there and refused elsewhere. With `invert_sigmas` the grid ascends from 0 to 1.

    That of a distilled model is `even(steps, shift)`. Raises ValueError for steps that such a model of segments cannot
    be drawn in: its velocity is known at the times of `distilled_steps`, or of each of `trained_steps`, alone, so they
    must divide one of these numbers.
    """
    check_steps(steps)
    check_config(config)
    if config.distilled_steps is not None:
        distilled.check_steps(config.distillation, config.distilled_steps, config.trained_steps, steps)
        return even(steps, config.shift, device=device)
    s = 1.0 if config.use_dynamic_shifting else config.shift
    levels = linear(steps, _lowest(config.train_timesteps, s), _level(1.0, s))
    return _from_levels(config, levels, mu, device)


def from_levels(
    config: Config,
    levels: Tensor | Sequence[float],
    *,
    mu: Scalar | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The grid that diffusers' scheduler makes of a user's own `sigmas`: float32 (n + 1,) from n of them.

    levels: descending within (0, 1], without the 0 at the end. They are still shifted, stretched and spaced by
    the config; a grid to be used unchanged is an argument of `ode.integrate`. Numbers are taken in float32 as
    diffusers does, a tensor in its own dtype; differentiable in a tensor and in mu. mu as in `from_config`.
    """
    check_config(config)
    levels = levels if isinstance(levels, Tensor) else torch.tensor(levels, dtype=torch.float32, device="cpu")
    check_levels(levels)
    return _from_levels(config, levels, mu, device)


def _from_levels(config: Config, levels: Tensor, mu: Scalar | None, device: torch.device | str | None) -> Tensor:
    if config.use_dynamic_shifting != (mu is not None):
        raise ValueError(
            "a config with use_dynamic_shifting needs mu: see schedule.resolution_mu"
            if mu is None
            else f"mu {mu} has no meaning for a config without use_dynamic_shifting"
        )
    if mu is not None:
        levels = _odds_shifted(levels, _exp(mu) if config.time_shift_type == "exponential" else mu)
    else:
        levels = shifted(levels, config.shift)
    if config.shift_terminal:
        levels = stretch(levels, config.shift_terminal)
    for used, spacing in (
        (config.use_karras_sigmas, karras),
        (config.use_exponential_sigmas, exponential),
        (config.use_beta_sigmas, beta),
    ):
        if used:
            levels = spacing(len(levels), levels[-1].double(), levels[0].double())
    # The table's rounding may put its first level at 1 + 1e-7, which is no time.
    grid = _finish(levels.clamp(max=1.0), device)
    return 1 - grid if config.invert_sigmas else grid


def resolution_mu(config: Config, tokens: int) -> float:
    """mu for an image of `tokens` patches, height * width / (8 * patch_size)^2.

    The line through base_shift at base_image_seq_len and max_shift at max_image_seq_len; it continues beyond both. It
    is `calculate_shift` of diffusers' pipelines.
    """
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return tokens * slope + (config.base_shift - slope * config.base_image_seq_len)


def learned(logits: Tensor) -> Tensor:
    """A grid from free numbers: logits (steps,) -> (steps + 1,), descending from 1 to 0 by steps of softmax(logits)."""
    descent = torch.cumsum(torch.softmax(logits, 0), 0)
    return torch.cat([logits.new_ones(1), 1 - descent[:-1], logits.new_zeros(1)])


# Grid to grid.


def shifted(levels: Tensor, s: Scalar) -> Tensor:
    """`shift` of the levels (n,) of a grid. Raises ValueError for s <= 0, where it can be read."""
    if not isinstance(s, Tensor) and not (s > 0 and math.isfinite(s)):
        raise ValueError(f"shift {s} must be a positive number; 1 leaves the grid as it is, 3 is that of SD3")
    return shift(levels, s)


def stretch(levels: Tensor, terminal: Scalar) -> Tensor:
    """Scale 1 - sigma so that the last level before 0 is `terminal` (LTX-Video; diffusers' `shift_terminal`)."""
    if len(levels) < 2:
        raise ValueError("shift_terminal sets the last of several levels: it needs at least 2 steps")
    return 1 - (1 - levels) / ((1 - levels[-1]) / (1 - terminal))


def partial(grid: Tensor, strength: float) -> Tensor:
    """The last part of a grid, for image-to-image: of n steps the last n * strength, rounded up; 0 keeps none, 1 all.

    Where n * strength is a whole number it is that number (50 * 0.2 is 10), whatever its floating-point product. Start
    from `path.interpolate(x0, noise, partial(grid, strength)[0])`. Raises ValueError for a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} must be between 0 (the image as it is) and 1 (all noise)")
    steps = len(grid) - 1
    return grid[steps - math.ceil(round(steps * strength, 6)) :]


def stack(grids: Sequence[Tensor]) -> Tensor:
    """Grids of different numbers of steps as one, (n + 1, batch), for `ode.integrate`: a grid for each sample.

    The shorter ones repeat their last time, in steps of no length.
    """
    longest = max(len(grid) for grid in grids)
    return torch.stack([torch.cat([grid, grid[-1:].expand(longest - len(grid))]) for grid in grids], 1)


def position(grid: Tensor, t: Tensor) -> Tensor:
    """Index of the time of a grid (n,) that is nearest to each t, int64 shaped like t; no value is read on the host."""
    return (grid - t[..., None]).abs().argmin(-1)


def check_steps(steps: int) -> None:
    """Raises ValueError unless `steps` is a whole number from 1 to `MAX_STEPS`."""
    if isinstance(steps, bool | str) or not isinstance(steps, SupportsInt) or steps != int(steps) or steps < 1:
        raise ValueError(f"steps {steps!r} must be a whole number of at least 1")
    if steps > MAX_STEPS:
        raise ValueError(f"steps {steps} must be at most {MAX_STEPS:,}: a grid holds the time of each")


def check_levels(levels: Tensor) -> None:
    """Raises ValueError for levels that are not (n,) or, where they can be read, do not descend within (0, 1]."""
    if levels.ndim != 1 or len(levels) < 1:
        raise ValueError(f"levels have shape {tuple(levels.shape)}; they must be (n,), with at least one")
    if not levels.is_floating_point():
        raise ValueError(f"levels have dtype {levels.dtype}; they are noise levels in (0, 1], not timesteps")
    if is_readable(levels) and not ((levels > 0) & (levels <= 1)).all():
        raise ValueError(f"levels {levels.tolist()} leave (0, 1]; 1 is noise, and the 0 at the end is added")
    if is_readable(levels) and (levels.diff() > 0).any():
        raise ValueError(f"levels {levels.tolist()} do not descend from noise to data")


def with_trained_steps(config: Config, steps: int) -> Config:
    """The config of a distilled model that was trained to be drawn in `steps` too; another's as it is."""
    if config.distilled_steps is None:
        return config
    numbers = distilled.numbers_of_steps(config.distilled_steps, config.trained_steps)
    return config if steps in numbers else replace(config, trained_steps=(*numbers, steps))


def check_config(config: Config) -> None:
    """Raises ValueError for a config whose options contradict one another or are out of range."""
    if config.time_shift_type not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type {config.time_shift_type!r} must be 'exponential' or 'linear'")
    if config.use_karras_sigmas + config.use_exponential_sigmas + config.use_beta_sigmas > 1:
        raise ValueError("only one of use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas can be set")
    if config.stochastic_sampling and config.invert_sigmas:
        raise ValueError("stochastic_sampling goes from noise to data; with invert_sigmas the grid ascends")
    if config.train_timesteps < 1:
        raise ValueError(f"train_timesteps {config.train_timesteps} must be at least 1")
    if config.distilled_steps is not None:
        for number in (config.distilled_steps, *config.trained_steps):
            check_steps(number)
    spacings = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting")
    used = [name for name in (*spacings, "invert_sigmas", "shift_terminal") if getattr(config, name)]
    distilled.check(config.distilled_steps, config.distillation, config.trained_steps, used)
    if config.shift_terminal and not 0 < config.shift_terminal < 1:
        raise ValueError(f"shift_terminal {config.shift_terminal} must be between 0 and 1, the last level before 0")


def _lowest(train_timesteps: int, s: Scalar) -> Tensor:
    return _level(torch.tensor(1.0, dtype=torch.float32, device="cpu") / train_timesteps, s)


def _level(sigma: Tensor | float, s: Scalar) -> Tensor:
    # The training table is float32, and the grid lies between its ends.
    if not isinstance(sigma, Tensor):
        sigma = torch.tensor(sigma, dtype=torch.float32, device="cpu")
    return shift(sigma.to(s.device) if isinstance(s, Tensor) else sigma, s).double()


def _odds_shifted(levels: Tensor, s: Scalar) -> Tensor:
    # `shift` in the form of diffusers' dynamic one, s / (s + 1 / sigma - 1), whose rounding differs.
    if not isinstance(s, Tensor) and not (s > 0 and math.isfinite(s)):
        raise ValueError(f"mu gives the shift {s}, which must be a positive number; 1 leaves the grid as it is")
    s = torch.as_tensor(s, dtype=levels.dtype, device=levels.device)
    return s / (s + (torch.ones_like(levels) / levels - 1))


def _finish(levels: Tensor, device: torch.device | str | None) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)]).to(dtype=torch.float32, device=device)


def _exp(value: Scalar) -> Scalar:
    return torch.exp(value) if isinstance(value, Tensor) else math.exp(value)
