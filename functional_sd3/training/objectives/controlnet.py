"""ControlNet objective: the rectified-flow loss of a frozen transformer with the residuals of a trained ControlNet.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv:2302.05543), eq. 5; diffusers'
`train_controlnet_sd3.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import computation
from functional_sd3.core.attention import Implementation
from functional_sd3.core.types import Params, Tree
from functional_sd3.training.objectives.flow import flow_loss
from functional_sd3.training.objectives.types import Loss
from functional_sd3.transformer import controlnet, mmdit


def controlnet_loss(
    config: Any,
    net: controlnet.Config,
    *,
    objective: Callable[..., Loss] = flow_loss,
    materialize: Callable[[Params], Params] | None = None,
    implementation: Implementation = "sdpa",
    **options: Any,
) -> Loss:
    """`objective` of params that hold a "controlnet" of config `net` beside the transformer.

    batch: that of `flow_loss` with "control" (batch, channels, height, width), the encoded control images
    (`pipeline.control_latents`). materialize: of the ControlNet's parameters, as in `controlnet.apply`. `options` are
    flow_loss's, and its metrics.
    """

    def residuals(
        params: Params, batch: Tree, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor
    ) -> Sequence[Tensor]:
        if not net.has_patch_embedding:
            x = mmdit.embed_image(params["transformer"], config.transformer, x)
        pooled = torch.zeros_like(pooled) if net.zero_pooled else pooled
        inputs = x, t, context, pooled, batch["control"]
        # Rematerialised as the transformer's blocks are; transforms by index are of those alone.
        transform = computation.of(config, "transformer").block_transform
        transform = None if isinstance(transform, Mapping) else transform
        return controlnet.apply(
            params["controlnet"], net, *inputs, materialize=materialize, implementation=implementation,
            block_transform=transform,
        )  # fmt: skip

    return objective(config, residuals=residuals, implementation=implementation, **options)
