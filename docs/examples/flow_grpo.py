"""Flow-GRPO in the open: a flow in the plane learns by rewards to draw from one of its four modes.

    python docs/examples/flow_grpo.py

The policy is the exact velocity of a mixture of four Gaussians, whose weights and means are its parameters. The flow's
SDE draws samples, the reward is 1 within a circle around one mode, and clipped ratios of the likelihoods of the steps
make rewarded samples likelier (Liu et al. 2025, arXiv:2505.05470).
"""

import argparse

import torch
from torch import Tensor

import functional_sd3 as sd3

START = {"means": torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]]), "logits": torch.zeros(4)}
TARGET, WIDTH = torch.tensor([2.0, 0.0]), 0.3


def velocity_of(params: dict[str, Tensor]):
    """v = (x - E[x_0 | x]) / t at x = (1 - t) x_0 + t noise, x_0 of the mixture."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        variance = ((1 - t) * WIDTH).square() + t.square()
        offsets = x[:, None] - (1 - t) * params["means"]
        shares = (params["logits"] - offsets.square().sum(-1) / (2 * variance)).softmax(-1)
        expected = params["means"] + (1 - t) * WIDTH**2 / variance * offsets
        return sd3.path.velocity_of(x, (shares[..., None] * expected).sum(1), t)

    return velocity


def main(updates: int = 40, count: int = 64, eps: float = 0.2, rate: float = 0.1, seed: int = 0) -> list[float]:
    """Mean reward of the samples of each update."""
    optimizer, times, rewards = sd3.optim.adamw(rate, decay=0.0), sd3.schedule.sigmas(8, shift=1.0), []
    params, state = START, optimizer.init(START)
    for update in range(updates):
        noise_key, step_key = sd3.prng.split(sd3.prng.fold_in(sd3.prng.key(seed), update)).unbind()
        method, noise = sd3.ode.flow_sde(step_key, a=0.7), sd3.prng.normal(noise_key, (count, 2))
        states = sd3.ode.integrate(method, velocity_of(params), noise, times, save="all")
        before = sd3.ode.log_probs(method, velocity_of(params), states, times)
        reward = ((states[-1] - TARGET).norm(dim=-1) < 1).float()
        advantage = sd3.rewards.group_advantages(reward[None])[0]  # one prompt, so all samples are one group

        def loss(params, method=method, states=states, before=before, advantage=advantage):
            ratio = (sd3.ode.log_probs(method, velocity_of(params), states, times) - before).exp()  # (steps, samples)
            return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - eps, 1 + eps)).mean()

        for _ in range(2):  # the first has ratios of 1: the policy's gradient; the second is clipped
            changes, state = optimizer.update(torch.func.grad(loss)(params), state, params)
            params = sd3.optim.apply_updates(params, changes)
        rewards.append(float(reward.mean()))
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=40)
    print("rewards:", *(f"{reward:.2f}" for reward in main(**vars(parser.parse_args()))))
