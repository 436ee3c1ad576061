"""Random transformers, ours and diffusers', of the same sizes."""

import pytest
import torch

from functional_sd3.transformer import mmdit
from tests import models

pytest.importorskip("diffusers")
SMALL = dict(depth=4, heads=4, head_dim=16, context_width=48, pooled_width=40, position_size=24, sample_size=32)
LAYOUTS = {
    "SD3": mmdit.Config(**SMALL),
    "SD3.5-medium": mmdit.Config(**SMALL, qk_norm=True, dual_attention_layers=(0, 1)),
    "SD3.5-large": mmdit.Config(**SMALL, qk_norm=True),
    "patches of one": mmdit.Config(**SMALL, qk_norm=True, patch_size=1, in_channels=4, out_channels=4),
    "dual to the last": mmdit.Config(**SMALL, qk_norm=True, dual_attention_layers=(3,)),
}


def random_params(config: mmdit.Config) -> dict:
    return models.random_leaves(mmdit.spec(config), 0.1)


def random_inputs(config: mmdit.Config, batch=3, height=20, width=28, tokens=7) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    side = config.patch_size
    latents = torch.randn(batch, config.in_channels, height // 2 * side, width // 2 * side, generator=generator)
    context = torch.randn(batch, tokens, config.context_width, generator=generator)
    pooled = torch.randn(batch, config.pooled_width, generator=generator)
    return latents, torch.linspace(0.05, 1.0, batch), context, pooled


def their_velocity(theirs, latents, t, context, pooled, **options):
    with torch.no_grad():
        return theirs(latents, context, pooled, 1000 * t, return_dict=False, **options)[0]


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()
