"""Small models in every shape the folders of SD3 come in."""

import pytest
import torch

from functional_sd3.core import spec as specs
from functional_sd3.flow import schedule
from functional_sd3.image import vae
from functional_sd3.text import clip, t5
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config, Model, spec

CONFIG = Config(
    clip_l=clip.Config(vocab=60, length=20, width=16, layers=2, heads=2, mlp_width=24, projection_width=16),
    clip_g=clip.Config(vocab=60, length=20, width=24, layers=3, heads=2, mlp_width=40, activation="gelu", eos_id=59),
    t5=t5.Config(vocab=50, width=16, layers=2, heads=2, head_dim=4, mlp_width=12),
    transformer=mmdit.Config(
        depth=3,
        heads=2,
        head_dim=8,
        context_width=48,
        pooled_width=40,
        position_size=6,
        sample_size=8,
        qk_norm=True,
        dual_attention_layers=(0, 1),
    ),
    vae=vae.Config(channels=(4, 8, 8), blocks_per_level=1, groups=2, sample_size=16),
    schedule=schedule.Config(shift=2.5),
)


@pytest.fixture(scope="session")
def make_model():
    """(config, seed, dtype) -> Model without tokenizers, no two of whose parameters are alike."""

    def make(config: Config = CONFIG, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
        generator = torch.Generator().manual_seed(seed)
        leaf = lambda path, param: torch.randn(param.shape, generator=generator).to(dtype)  # noqa: E731
        return Model(specs.map_params(leaf, spec(config)), config)

    return make
