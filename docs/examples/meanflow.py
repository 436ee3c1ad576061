"""Trains a MeanFlow in two dimensions, which then draws eight Gaussians on a circle in one step.

    python docs/examples/meanflow.py

u(x, t, r) is the mean of the flow's velocity over [r, t] (Geng et al. 2025, arXiv:2505.13447). The flow's own velocity,
u(x, t, t), leads in one step from noise to the mean of the data, which is the middle of the circle.
"""

import argparse
import math

import torch
from torch import Tensor

import functional_sd3 as sd3
from functional_sd3.training import optim, step

CENTRES = 2 * torch.view_as_real(torch.polar(torch.ones(8), torch.arange(8) * math.pi / 4))


def network(params: dict, rows: dict):
    """u(x, t, r): a perceptron of x and of slow sinusoids of t and t - r."""

    def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        angles = torch.stack([t, t - r], -1).expand(len(x), 2)[..., None] * math.pi / 2 * torch.arange(1, 4)
        hidden = torch.cat([x, angles.cos().flatten(1), angles.sin().flatten(1)], 1)
        *layers, last = params["layers"]
        for layer in layers:
            hidden = torch.nn.functional.silu(sd3.layers.linear(layer, hidden))
        return sd3.layers.linear(last, hidden)

    return u


def main(steps: int = 1000, batch: int = 256, seed: int = 0) -> dict[str, float]:
    """Mean distance of a sample to its nearest centre, by way of drawing."""
    init_key, run_key, data_key, noise_key = sd3.prng.split(sd3.prng.key(seed), 4)
    spec = {"layers": [sd3.layers.linear_spec(*sizes) for sizes in ((14, 128), (128, 128), (128, 128), (128, 2))]}
    optimizer = optim.adamw(optim.warmup_cosine(2e-3, 50, steps, 1e-4), decay=0.0)
    # power=0: in so few dimensions the usual weight of a sample would favour the nearest centre over the mean.
    loss = sd3.losses.meanflow_loss(network, equal=0.5, density=sd3.path.uniform, power=0.0)
    train_step = step.make_train_step(loss, optimizer, ema_decay=0.99, donate=True)
    state = step.init(run_key, sd3.spec.init(init_key, spec), optimizer)
    for number in range(steps):
        choice, spread = sd3.prng.split(sd3.prng.fold_in(data_key, number))
        data = CENTRES[sd3.prng.randint(choice, (batch,), 0, 8)] + 0.1 * sd3.prng.normal(spread, (batch, 2))
        state, _ = train_step(state, {"latents": data})
    grid = lambda n: sd3.schedule.even(n, shift=1.0)  # noqa: E731
    u, noise = network(state.ema, {}), sd3.prng.normal(noise_key, (2000, 2))
    drawn = {f"MeanFlow, steps {n}": sd3.ode.integrate(sd3.ode.MEANFLOW, u, noise, grid(n)) for n in (1, 4)}
    drawn["Euler, steps 1"] = sd3.ode.integrate(sd3.ode.EULER, lambda x, t: u(x, t, t), noise, grid(1))
    return {name: float(torch.cdist(x, CENTRES).amin(1).mean()) for name, x in drawn.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="updates")
    parser.add_argument("--seed", type=int, default=0)
    for name, distance in main(**vars(parser.parse_args())).items():
        print(f"{name}: {distance:.3f} from the nearest centre")
