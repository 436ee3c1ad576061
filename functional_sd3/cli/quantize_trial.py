"""The run along which `quantize` measures errors: of layers' products, and of the velocity."""

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3 import pipeline
from functional_sd3.cli import report, runtime
from functional_sd3.core import prng, tree
from functional_sd3.core.types import Params
from functional_sd3.layouts.components import require
from functional_sd3.transformer import mmdit, precision
from functional_sd3.weights.model import Model

ENCODERS = ("clip_l", "clip_g", "t5")


class Trial(NamedTuple):
    """A run along which errors are measured: float32 parameters, noise, times, the prompts and their conditioning, and
    the steps of the float32 transformer, none for a model without one."""

    model: Model
    noise: Tensor
    sigmas: Tensor
    conditioning: tuple[Tensor, Tensor]
    prompts: list[str]
    steps: list[precision.Step]

    @classmethod
    def of(cls, model: Model, arguments: argparse.Namespace) -> "Trial":
        device, prompts = runtime.device(arguments.device), list(arguments.prompt)
        wide = {name: tree.to(tree.cast(part, torch.float32), device) for name, part in model.params.items()}
        model = model._replace(params=wide)
        noise = pipeline.initial_noise(prng.key(0), model.config, len(prompts), device=device)
        sigmas = pipeline.sigmas(model.config, noise, arguments.steps)
        with torch.no_grad():
            encoded = pipeline.encode(encoders_of(wide), model.config, model.tokenizers, prompts).positive
            conditioning, steps = (encoded.context, encoded.pooled), []
            if "transformer" in wide:
                config = require(model.config, "transformer")
                steps = precision.trajectory(wide["transformer"], config, noise, sigmas, *conditioning)
        return cls(model, noise, sigmas, conditioning, prompts, steps)

    def run(self, name: str, params: Params) -> None:
        """Computes what the component `name`, with these parameters, is there for."""
        wide, config = self.model.params, self.model.config
        if name in ENCODERS:
            encoders = encoders_of(wide) | {name: params}
            pipeline.encode(encoders, config, self.model.tokenizers, self.prompts)
        elif name == "transformer":
            for x, t, _ in self.steps:
                mmdit.apply(params, require(config, "transformer"), x, t, *self.conditioning)

    def velocity_errors(self, params: Params) -> tuple[Tensor, Tensor]:
        """`precision.trajectory_errors` of a transformer as it is stored, computed in the dtype that `generate` takes
        for it: float16 in float32 on a CPU."""
        device = self.noise.device
        if device.type == "cpu":
            params = tree.map(lambda leaf: leaf.float() if leaf.dtype == torch.float16 else leaf, params)
        with torch.no_grad():
            config = require(self.model.config, "transformer")
            return precision.trajectory_errors(self.steps, tree.to(params, device), config, *self.conditioning)

    def velocity_error(self, params: Params) -> float:
        """Relative error of the velocity over the whole run."""
        return float(self.velocity_errors(params)[1])

    def report_velocity(self, params: Params) -> None:
        """Prints the error of the velocity at every step, and that of the run."""
        errors, whole = self.velocity_errors(params)
        for t, error in zip(self.sigmas.tolist(), errors.tolist(), strict=False):
            report.say(f"velocity at t = {t:.3f}: relative error {error:.2e} against float32")
        report.say(f"velocity of the run: relative error {float(whole):.2e} against float32")


def encoders_of(params: dict[str, Params]) -> dict[str, Params]:
    """Parameters of the components that encode prompts."""
    return {name: part for name, part in params.items() if name in ENCODERS}
