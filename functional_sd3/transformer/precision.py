"""Errors of the velocity with quantised or low-precision parameters."""

import torch
from torch import Tensor

from functional_sd3.core.types import Params
from functional_sd3.transformer import mmdit
from functional_sd3.transformer.mmdit import Config


def velocity_errors(
    reference: Params, params: Params, config: Config, noise: Tensor, sigmas: Tensor, context: Tensor, pooled: Tensor
) -> Tensor:
    """|v - v_reference| / |v_reference| at every step of a run, (steps,), the norms over the whole batch.

    reference: float32 parameters; the states are those of their run by Euler's method from `noise` (batch, channels,
    height, width) along `sigmas` (steps + 1,). params: compared with them, of any dtype, quantised or with a LoRA.
    context (batch, tokens, context_width), pooled (batch, pooled_width).
    """
    x, errors = noise, []
    for t, t_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        exact = mmdit.apply(reference, config, x, t, context, pooled)
        errors.append((mmdit.apply(params, config, x, t, context, pooled) - exact).norm() / exact.norm())
        x = x + (t_next - t) * exact
    return torch.stack(errors)
