"""Points of the path at which a policy is compared with its own samples: x_t = (1 - t) x_0 + t noise.

Batches of the objectives that need no likelihood (`nft`, `awm`) hold, a row a point:

    latents, noise (batch, channels, height, width)     a sample x_0 of the policy, and fresh noise
    t (batch,)                                          in (0, 1]
    context, pooled                                     the conditioning of its prompt
    old, reference (batch, channels, height, width)     velocities at x_t of the old policy and of the start
    advantage (batch,)                                  of the sample in its group

`add_velocities` computes the velocities of other policies beforehand, without gradients, so that an objective is a
function of the trained parameters alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import computation, tree
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Params, Tree, Velocity
from functional_sd3.flow import path
from functional_sd3.transformer import mmdit

VelocityOf = Callable[[Params, Tree], Velocity]
"""`(params of a whole model, rows with "context" and "pooled") -> velocity`."""


def model_velocity(
    config: Any,
    *,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "sdpa",
    time_difference: float | None = None,
    attend: mmdit.AttendBlocks | None = None,
) -> VelocityOf:
    """The velocity of the prompts of a batch, unguided, in float32. dtype: of the computation; None: the parameters'.

    config: of a whole model (`.transformer`). implementation, attend: as in `mmdit.apply`; time_difference too, for
    tangents in t.
    """

    def velocity_of(params: Params, batch: Tree) -> Velocity:
        weights, context, pooled = params["transformer"], batch["context"], batch["pooled"]
        weights, computed = computation.cast(weights, computation.of(config, "transformer"), dtype)
        if dtype is not None:
            context, pooled = context.to(dtype), pooled.to(dtype)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            inputs = x if dtype is None else x.to(dtype)
            v = mmdit.apply(
                weights,
                config.transformer,
                inputs,
                t,
                context,
                pooled,
                implementation=implementation,
                time_difference=time_difference,
                attend=attend,
                **computed.options,
            )
            return v.to(torch.promote_types(x.dtype, torch.float32))

        return velocity

    return velocity_of


def wide_latents(batch: Tree) -> Tensor:
    """The latents of a batch in float32 at least, the dtype of times and states: bfloat16 has 8 bits for a time."""
    return batch["latents"].to(torch.promote_types(batch["latents"].dtype, torch.float32))


def noised(batch: Tree, latents: str = "latents") -> Tensor:
    """x_t of every row."""
    return path.interpolate(batch[latents], batch["noise"], batch["t"])


def add_velocities(velocity_of: VelocityOf, batch: Tree, policies: dict[str, Params], *, rows: int = 64) -> Tree:
    """The batch with the velocities at x_t of each policy under its name; `rows` points are computed at once."""
    count = len(batch["t"])
    with torch.no_grad():
        for name, params in policies.items():
            parts = []
            for start in range(0, count, rows):
                part = tree.map(lambda leaf, first=start: leaf[first : first + rows], batch)
                parts.append(velocity_of(params, part)(noised(part), part["t"]))
            batch = {**batch, name: torch.cat(parts)}
    return batch


def sample_means(values: Tensor) -> Tensor:
    """Mean over all numbers of each sample, (batch, ...) -> (batch,)."""
    return values.flatten(1).mean(1)


def check_batch(batch: Tree, names: tuple[str, ...], what: str) -> None:
    """Raises ValueError where a batch lacks an entry that the objective `what` reads."""
    if absent := [name for name in names if name not in batch]:
        raise ValueError(f"the batch of {what} lacks {', '.join(absent)}; it has {', '.join(batch)}")


def clipped(ratio: Tensor, advantage: Tensor, eps: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) of each sample (Schulman et al. 2017, arXiv:1707.06347, PPO)."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - eps, 1 + eps))
