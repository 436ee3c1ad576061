"""Random parameters that LoRAs of the tests apply to."""

import torch

from functional_sd3.core import spec as specs
from functional_sd3.layouts.components import spec
from tests.weights.conftest import CONFIG

GENERATOR = torch.Generator().manual_seed(11)
PARAMS = specs.map_params(
    lambda path, param: 0.3 * torch.randn(param.shape, generator=GENERATOR) + (1.0 if "norm" in path else 0.0),
    {name: part for name, part in spec(CONFIG).items() if name != "vae"},
)
