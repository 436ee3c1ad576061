"""A small random model, complete with tokenizers, for tests of whole programs."""

import math
from dataclasses import replace
from functools import cache

import torch

from functional_sd3.core import prng
from functional_sd3.core import spec as specs
from functional_sd3.flow import schedule
from functional_sd3.recipes.shapes import architecture
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Model, model


@cache
def tokenizers():
    return architecture.tokenizers(prng.key(0))


def config(**transformer):
    """The tiny model's sizes, smaller; `transformer` replaces fields of its transformer's config."""
    small = architecture.config(tokenizers())
    sizes = mmdit.Config(
        depth=3,
        heads=2,
        head_dim=16,
        patch_size=2,
        context_width=small.t5.width,
        pooled_width=2 * small.clip_l.projection_width,
        position_size=12,
        sample_size=8,
        qk_norm=True,
        dual_attention_layers=(0,),
    )
    return replace(
        small,
        transformer=replace(sizes, **transformer),
        vae=replace(small.vae, channels=(8, 8, 16, 16), scaling=1.5305, shift=0.0609),
        schedule=schedule.Config(shift=3.0),
    )


def transformer_config(**fields) -> mmdit.Config:
    """A transformer of two heads of 8 alone, for tests of functions of one; `fields` are of its config."""
    sizes = {"heads": 2, "head_dim": 8, "in_channels": 2, "out_channels": 2, "context_width": 6, "pooled_width": 5}
    return mmdit.Config(**{**sizes, **fields})


def random_model(config=None) -> Model:
    """Every leaf random and of the size it would have after training: nothing zero that could hide a mistake."""
    config = config or globals()["config"]()

    def fill(path: str, param: specs.Param) -> torch.Tensor:
        key = prng.key(int.from_bytes(path.encode()[-7:], "big"))
        if not param.trainable:
            return param.init(key, param.shape)
        noise = prng.normal(key, param.shape)
        if len(param.shape) == 1:
            return 0.1 * noise + (1.0 if path.endswith("weight") else 0.0)
        return noise * 0.8 / math.prod(param.shape[1:]) ** 0.5

    return Model(specs.map_params(fill, model.spec(config)), config, tokenizers())


def random_leaves(described, scale: float = 0.2, seed: int = 0):
    """A tree of a network's spec with leaves of this standard deviation, around 1 for norms of queries and keys.

    Nothing is zero, behind which no derivative would be seen; what is never trained is as `init` makes it.
    """
    generator = torch.Generator().manual_seed(seed)

    def leaf(path: str, param: specs.Param) -> torch.Tensor:
        if not param.trainable:
            return param.init(prng.key(0), param.shape)
        return scale * torch.randn(param.shape, generator=generator) + (1.0 if "_norm" in path else 0.0)

    return specs.map_params(leaf, described)


def random_inception():
    """The FID network with weights that keep features of the order of 1: far cheaper than drawing them by keys."""
    from functional_sd3.metrics import inception

    generator = torch.Generator().manual_seed(0)

    def fill(path: str, param: specs.Param) -> torch.Tensor:
        if len(param.shape) == 1:
            return param.init(prng.key(0), param.shape)
        return torch.randn(param.shape, generator=generator) * (2 / math.prod(param.shape[1:])) ** 0.5

    return specs.map_params(fill, inception.spec())


def parts(model: Model) -> tuple:
    """(params, config, tokenizers): what the pipeline's functions take first."""
    return model.params, model.config, model.tokenizers
