"""Learns the grid of eight steps whose latents end nearest to those of the converged run.

    python docs/examples/learn_grid.py

A grid is 8 free numbers (`schedule.learned`), and the error of a run is a differentiable function of them: its gradient
comes back through every step of the sampler. Learned on prompts of the shapes world, and compared on held-out prompts
and other noise with the model's own grid and with SD3's shifted one.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import functional_sd3 as sd3


class Problem(NamedTuple):
    """Prompts with their noise, and the latents of the converged run."""

    model: sd3.weights.Model
    conditions: sd3.pipeline.Conditions
    noise: Tensor
    exact: Tensor
    cfg: float


def problem(model: sd3.weights.Model, prompts: Sequence[str], key: Tensor, cfg: float) -> Problem:
    """Prompts with latents of Dormand and Prince's pair at a tolerance of 1e-3, far below the errors compared here."""
    conditions = sd3.pipeline.encode(model.params, model.config, model.tokenizers, prompts)
    noise = sd3.pipeline.initial_noise(key, model.config, len(prompts))
    velocity = sd3.pipeline.velocity(model.params, model.config, conditions, cfg)
    exact = sd3.ode.integrate(sd3.ode.DOPRI5, velocity, noise, [1.0, 0.0], rtol=1e-3, atol=1e-3)
    return Problem(model, conditions, noise, exact, cfg)


def errors(case: Problem, times: Tensor, method: sd3.ode.Method) -> Tensor:
    """|x - exact| / |exact| of each sample, (batch,), of a run over `times` (steps + 1,)."""
    model = case.model
    latents = sd3.pipeline.sample(
        model.params, model.config, case.conditions, case.noise, times=times, cfg=case.cfg, method=method
    )
    return (latents - case.exact).flatten(1).norm(dim=1) / case.exact.flatten(1).norm(dim=1)


def learn(cases: Sequence[Problem], start: Tensor, method: sd3.ode.Method, *, iterations: int, rate: float) -> Tensor:
    """The grid after `iterations` steps of Adam from the grid `start`, on one of `cases` after the other."""
    optimizer = sd3.optim.chain(
        sd3.optim.scale_by_adam(b2=0.99),
        sd3.optim.scale_by_learning_rate(lambda step: rate * (1 - step / iterations)),
    )
    logits = torch.log(-start.diff())
    state = optimizer.init(logits)
    checkpointed = sd3.adjoint.checkpointed(method)

    def loss(logits: Tensor, case: Problem) -> Tensor:
        return errors(case, sd3.schedule.learned(logits), checkpointed).mean()

    for index in range(iterations):
        gradient, value = sd3.transform.value_and_grad(loss)(logits, cases[index % len(cases)])
        updates, state = optimizer.update(gradient, state, logits)
        logits = sd3.optim.apply_updates(logits, updates)
        if index % 6 == 0 or index == iterations - 1:
            print(f"iteration {index + 1}: error {100 * value:.2f} %", flush=True)
    return sd3.schedule.learned(logits)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Mean error on held-out prompts and noise, by grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", default=sd3.shipped.folder())
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--method", choices=sd3.ode.METHODS, default="euler")
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--prompts", type=int, default=12, help="to learn from, and as many to compare on")
    parser.add_argument("--iterations", type=int, default=36)
    parser.add_argument("--rate", type=float, default=0.06)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    model = sd3.weights.load(parsed.params, dtype=torch.float32)
    method, batch = sd3.ode.METHODS[parsed.method], 4
    scene_key, noise_key, held_key = sd3.prng.split(sd3.prng.key(parsed.seed), 3)
    prompts = [sd3.shapes.caption(scene) for scene in sd3.shapes.scenes(scene_key, parsed.prompts)]
    unseen = [text for things in (1, 2) for text, _ in sd3.shapes.held_out_captions(things)]
    unseen = [unseen[index * len(unseen) // parsed.prompts] for index in range(parsed.prompts)]
    with torch.no_grad():
        cases = [
            problem(model, prompts[at : at + batch], sd3.prng.fold_in(noise_key, at), parsed.cfg)
            for at in range(0, parsed.prompts, batch)
        ]
        held = problem(model, unseen, held_key, parsed.cfg)
    start = sd3.schedule.shift(torch.linspace(1, 0, parsed.steps + 1), 3.0)
    grids = {
        "the model's own": sd3.pipeline.sigmas(model.config, held.noise, parsed.steps),
        "shifted as SD3's": sd3.schedule.sigmas(parsed.steps, shift=3.0),
        "shifted once": start,
        # From there, because the others give their last step a hundredth or less, and a share that small hardly learns.
        "learned": learn(cases, start, method, iterations=parsed.iterations, rate=parsed.rate),
    }
    mean_errors = {}
    for name, grid in grids.items():
        with torch.no_grad():
            mean_errors[name] = errors(held, grid, method).mean().item()
        print(f"{name:16s} error {100 * mean_errors[name]:5.2f} %   {' '.join(f'{t:.3f}' for t in grid.tolist())}")
    return mean_errors


if __name__ == "__main__":
    main()
