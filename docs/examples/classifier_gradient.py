"""Guidance by a classifier's gradient on the predicted data: circles of a colour that the prompt does not name.

At every step the data is predicted, x_0 = x - t v(x, t), decoded, and classified by the mean colour of what is not
white; the velocity moves along the gradient of log p(colour) (Dhariwal and Nichol 2021, arXiv:2105.05233), through the
network (Chung et al. 2023, arXiv:2209.14687) or of x_0 alone.
"""

import argparse
from functools import partial

import torch

import functional_sd3 as sd3

COLOURS = torch.tensor(list(sd3.shapes.COLOURS.values())) / 255


def log_probabilities(images: torch.Tensor) -> torch.Tensor:
    """(batch, colours): a softmax of distances to the mean colour of the pixels that are not white."""
    ink = 1 - torch.exp(-(images - 0.96).square().sum(1, keepdim=True) / 0.1)
    mean = (ink * images).sum((2, 3)) / (ink.sum((2, 3)) + 1e-3)
    return torch.log_softmax(-(mean[:, None] - COLOURS).square().sum(-1) / 0.05, 1)


@torch.no_grad()
def main(colour: str = "blue", strength: float = 1.0, count: int = 4, steps: int = 20, out: str | None = None) -> dict:
    """Mean probability of the colour by kind of guidance."""
    model = sd3.weights.load(sd3.shipped.folder(), dtype=torch.float32)
    conditions = sd3.pipeline.encode(*model, ["a large circle on a white background"] * count)
    plain = sd3.pipeline.velocity(model.params, model.config, conditions, 1.0)
    noise = sd3.pipeline.initial_noise(sd3.prng.key(0), model.config, count)
    wanted, vae = [*sd3.shapes.COLOURS].index(colour), model.config.vae

    def decode(latents: torch.Tensor) -> torch.Tensor:  # not clamped, for that would stop gradients
        return sd3.vae.decode(model.params["vae"], vae, sd3.vae.denormalize(vae, latents)) / 2 + 0.5

    def guided(x: torch.Tensor, t: torch.Tensor, through_network: bool) -> torch.Tensor:
        v = plain(x, t)
        predict = lambda x: decode(x - t * (plain(x, t) if through_network else v))  # noqa: E731
        gradient = torch.func.grad(lambda x: log_probabilities(predict(x))[:, wanted].sum())(x)
        size, longest = (each.flatten(1).norm(dim=1)[:, None, None, None] for each in (v, gradient))
        return v - strength * size / longest.clamp_min(1e-12) * gradient

    through, alone = (partial(guided, through_network=is_through) for is_through in (True, False))
    drawn, probabilities, times = [], {}, sd3.schedule.even(steps, 3.0)
    for name, velocity in {"none": plain, "through the network": through, "of x_0 alone": alone}.items():
        drawn.append(decode(sd3.ode.integrate(sd3.ode.EULER, velocity, noise, times)).clamp(0, 1))
        probabilities[name] = float(log_probabilities(drawn[-1])[:, wanted].exp().mean())
        print(f"gradient {name}: p({colour}) {probabilities[name]:.2f}", flush=True)
    if out:
        sd3.pixels.to_pil(sd3.pixels.grid(torch.cat(drawn), count))[0].save(out)
    return probabilities


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--colour", choices=sd3.shapes.COLOURS, default="blue")
    parser.add_argument("--out", help="where the images go, a row for each kind")
    main(**vars(parser.parse_args()))
