"""What the tests of guidance share: random velocities, and every guidance by name."""

import torch

from functional_sd3.core import prng
from functional_sd3.flow import guidance

CONDITIONING = ("context", "pooled")


def velocities(seed: int, batch: int = 3, shape=(4, 6, 5)) -> dict[str, torch.Tensor]:
    """Answers of a network at a point, alike as those to a prompt and its negative are."""
    names = ("positive", "negative", "weak", "prompt 1", "skip_layers (1,)", "perturbed_layers (1,)")
    names = (*names, "perturbed_layers (1,) perturbation")
    keys = prng.split(prng.key(seed), len(names) + 1)
    common = prng.normal(keys[-1], (batch, *shape))
    return {name: common + 0.7 * prng.normal(key, (batch, *shape)) for name, key in zip(names, keys[:-1], strict=True)}


def point(seed: int, batch: int = 3, shape=(4, 6, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    return prng.normal(prng.key(seed + 1000), (batch, *shape)), torch.tensor(0.6)


def combine(guiding: guidance.Guidance, by_name, x, t, carry=None) -> torch.Tensor:
    """The guided velocity of velocities by name, from the first carry or a given one."""
    return guiding.combine(by_name, x, t, guiding.init(x, t) if carry is None else carry)[0]


BASES = {
    "cfg": guidance.cfg,
    "zero_star": guidance.zero_star,
    "tangential": guidance.tangential,
    "magnitude_aware": lambda scale: guidance.magnitude_aware(scale, 2.0),
    "auto": lambda scale: guidance.auto(scale, {}),
    "apg of the paper": lambda scale: guidance.apg(scale, longest=4.0, from_positive=True, of_data=True),
    "apg of diffusers": lambda scale: guidance.apg(scale, longest=4.0, eta=0.3),
}
"""What begins a guidance: scale -> Guidance."""

MORE = {
    "skip_layer": lambda scale: guidance.at(guidance.skip_layer(guidance.cfg(4.0), (1,), scale, 0.0, 1.0), 1, 3),
    "perturbed": lambda scale: guidance.perturbed(guidance.zero_star(4.0), (1,), scale),
    "smoothed": lambda scale: guidance.smoothed(guidance.cfg(4.0), (1,), scale),
    "composed": lambda scale: guidance.composed(guidance.cfg(4.0), (CONDITIONING, scale)),
    "rescaled": lambda scale: guidance.rescaled(guidance.cfg(4.0), scale),
}
"""What makes a guidance of one: scale or factor -> Guidance."""

ALL = {**BASES, **MORE}
