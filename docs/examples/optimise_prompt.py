"""Gradient ascent on a prompt's embedding, through the sampler and the decoder, towards redder images.

    python docs/examples/optimise_prompt.py --out optimised.png

How red an image is can be differentiated back through the decoder and every step of the sampler to the embedding,
which ascends it for one noise; the last lines print its effect on other noises. In the image, the upper row is drawn
from the prompt, the lower from the optimised embedding; the first column is the noise that it was optimised for.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

import functional_sd3 as sd3

Embedding = dict[str, Tensor]
"""context (1, tokens, width) and pooled (1, width): the conditioning of the transformer."""


def draw(model: sd3.weights.Model, embedding: Embedding, negative, noise: Tensor, steps: int, cfg: float) -> Tensor:
    """(1, 3, height, width) after even steps, about within [-1, 1]: not clamped, for that would stop gradients."""
    params, config = model.params, model.config
    latents = sd3.pipeline.sample(
        params,
        config,
        sd3.pipeline.Conditions(sd3.conditioning.Conditioning(**embedding), negative),
        noise,
        times=torch.linspace(1, 0, steps + 1),
        cfg=cfg,
        method=sd3.adjoint.checkpointed(sd3.ode.EULER),
    )
    return sd3.vae.decode(params["vae"], config.vae, sd3.vae.denormalize(config.vae, latents))


def redness(images: Tensor) -> Tensor:
    """Red less the mean of green and blue, in [-1, 1] for images in [-1, 1]; a mean over the pixels of all images."""
    red, green, blue = images.mean((0, 2, 3)) / 2
    return red - (green + blue) / 2


def ascend(objective, embedding: Embedding, *, iterations: int, rate: float) -> Embedding:
    """The embedding after steps of lengths falling from `rate` to 0, each along the gradient of objective(embedding).

    Normalised: far from the training data the size of the gradient changes by a factor of a hundred.
    """
    for index in range(iterations):
        gradient, value = sd3.transform.value_and_grad(objective)(embedding)
        length = rate * (1 - index / iterations) / sd3.optim.global_norm(gradient)
        embedding = sd3.tree.map(lambda leaf, up, length=length: leaf + length * up, embedding, gradient)
        if index % 5 == 0:
            print(f"iteration {index + 1}: redness {value:.4f}", flush=True)
    return embedding


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Redness on the noise that it was optimised for, and the mean on others, before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", default=sd3.shipped.folder())
    parser.add_argument("--prompt", default="a small blue circle on a white background")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--rate", type=float, default=12.0, help="length of the first step")
    parser.add_argument("--others", type=int, default=4, help="noises to try it on afterwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="where the images go")
    parsed = parser.parse_args(arguments)
    model = sd3.weights.load(parsed.params, dtype=torch.float32)
    conditions = sd3.pipeline.encode(model.params, model.config, model.tokenizers, [parsed.prompt])
    noise = sd3.pipeline.initial_noise(sd3.prng.key(parsed.seed), model.config, 1 + parsed.others)

    def draw_from(embedding: Embedding, noise: Tensor) -> Tensor:
        return draw(model, embedding, conditions.negative, noise, parsed.steps, parsed.cfg)

    start = conditions.positive._asdict()
    end = ascend(
        lambda embedding: redness(draw_from(embedding, noise[:1])),
        start,
        iterations=parsed.iterations,
        rate=parsed.rate,
    )
    scores, rows = {}, []
    for name, embedding in (("before", start), ("after", end)):
        with torch.no_grad():
            drawn = [draw_from(embedding, one).clamp(-1, 1) for one in noise.split(1)]
        scores[name] = float(redness(drawn[0]))
        if parsed.others:
            scores[f"others {name}"] = float(redness(torch.cat(drawn[1:])))
        rows += drawn
    for name, value in scores.items():
        print(f"{name}: redness {value:.3f}")
    if parsed.out:
        images = sd3.pixels.from_signed(torch.cat(rows))
        sd3.pixels.to_pil(sd3.pixels.grid(images, 1 + parsed.others))[0].save(parsed.out)
    return scores


if __name__ == "__main__":
    main()
