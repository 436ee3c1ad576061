"""Stable Diffusion 3.5 in plain lines: the transformer, the sampler and guidance, without an option or a fast path.

    python docs/examples/plain_sd3.py --prompt "a large red circle on a white background" --out image.png

Every formula is written out in PyTorch. The library reads the weights, encodes the prompt and decodes the latents;
`mmdit.apply` and `pipeline.generate` compute the same. MMDiT: Esser et al. 2024, arXiv:2403.03206, figure 2.
"""

import argparse
import math

import torch
from torch import Tensor

import functional_sd3 as sd3

# Layers: a dictionary of tensors and a function.


def linear(p: dict, x: Tensor) -> Tensor:
    """x (..., inputs) -> (..., outputs)."""
    return x @ p["weight"].T + p["bias"]


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """The approximation by tanh (Hendrycks and Gimpel 2016), which SD3 was trained with."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the features; scale and shift come from the modulation."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)


def rms_norm(p: dict, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * p["weight"]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * layer_norm(x) + shift


# Attention.


def project(p: dict, heads: int, x: Tensor) -> list[Tensor]:
    """Queries, keys and values of tokens (batch, tokens, width), each (batch, heads, tokens, head_dim)."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in linear(p["qkv"], x).chunk(3, -1))
    if "query_norm" in p:  # SD3.5; SD3 has none
        query, key = rms_norm(p["query_norm"], query), rms_norm(p["key_norm"], key)
    return [query, key, value]


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(head_dim)) value, heads merged: (batch, tokens, width)."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


# The transformer.


def block(p: dict, heads: int, image: Tensor, context: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    """Two streams with weights of their own and one attention over both."""
    last = "out" not in p["context"]["attention"]  # nothing reads the context after the last block
    width = image.shape[-1]
    own = linear(p["image"]["modulation"], condition)[:, None].split(width, -1)  # shift, scale, gate; shift, ...
    other = linear(p["context"]["modulation"], condition)[:, None].split(width, -1)

    image_parts = project(p["image"]["attention"], heads, modulate(image, *own[:2]))
    context_parts = project(p["context"]["attention"], heads, modulate(context, *other[:2]))
    attended = attention(*(torch.cat(pair, dim=2) for pair in zip(image_parts, context_parts, strict=True)))
    tokens = image.shape[1]
    added = own[2] * linear(p["image"]["attention"]["out"], attended[:, :tokens])
    if "attention2" in p["image"]:  # SD3.5-medium: a second attention, over the image alone
        alone = attention(*project(p["image"]["attention2"], heads, modulate(image, *own[6:8])))
        added = added + own[8] * linear(p["image"]["attention2"]["out"], alone)
    image = image + added
    image = image + own[5] * mlp(p["image"]["mlp"], modulate(image, *own[3:5]))
    if not last:
        context = context + other[2] * linear(p["context"]["attention"]["out"], attended[:, tokens:])
        context = context + other[5] * mlp(p["context"]["mlp"], modulate(context, *other[3:5]))
    return image, context


def mlp(p: dict, x: Tensor) -> Tensor:
    return linear(p["out"], gelu(linear(p["in"], x)))


def embed(p: dict, x: Tensor) -> Tensor:
    return linear(p["out"], silu(linear(p["in"], x)))


def sinusoid(t: Tensor) -> Tensor:
    """256 cosines and sines of 1000 t: (batch,) -> (batch, 256)."""
    angles = 1000 * t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], -1)


def mmdit(p: dict, heads: int, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """Velocity at latents x (batch, channels, height, width) and times t (batch,); 1 is noise, 0 is data."""
    size = p["patch"]["weight"].shape[-1]
    rows, columns = x.shape[2] // size, x.shape[3] // size
    patches = x.unflatten(3, (columns, size)).unflatten(2, (rows, size))  # batch, channel, row, y, column, x
    image = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    image = linear({"weight": p["patch"]["weight"].flatten(1), "bias": p["patch"]["bias"]}, image)
    image = image + middle(p["position"], rows, columns)
    context = linear(p["context"], context)
    condition = silu(embed(p["time"], sinusoid(t)) + embed(p["pooled"], pooled))
    for layer in p["blocks"]:
        image, context = block(layer, heads, image, context, condition)
    shift, scale = linear(p["final"]["modulation"], condition)[:, None].chunk(2, -1)
    out = linear(p["final"]["out"], modulate(image, shift, scale))
    out = out.unflatten(2, (size, size, -1)).unflatten(1, (rows, columns))  # batch, row, column, y, x, channel
    return out.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def middle(table: Tensor, rows: int, columns: int) -> Tensor:
    """The positions of a grid of rows x columns: the middle of the square table (1, side * side, width)."""
    side = math.isqrt(table.shape[1])
    top, left = (side - rows) // 2, (side - columns) // 2
    return table.unflatten(1, (side, side))[:, top : top + rows, left : left + columns].flatten(1, 2)


# The sampler.


def times(steps: int, s: float = 3.0) -> Tensor:
    """From 1 (noise) to 0 (data), shifted towards noise by sigma -> s sigma / (1 + (s - 1) sigma) (eq. 23)."""

    def shift(sigma):
        return s * sigma / (1 + (s - 1) * sigma)

    lowest = shift(1 / 1000)  # of the 1000 levels of training; the released samplers shift it once more
    return torch.cat([shift(torch.linspace(1, lowest, steps, dtype=torch.float64)), torch.zeros(1)]).float()


def sample(velocity, noise: Tensor, grid: Tensor) -> Tensor:
    """Euler's method for dx/dt = velocity(x, t) from t = 1 to 0."""
    x = noise
    for t, following in zip(grid[:-1], grid[1:], strict=True):
        x = x + (following - t) * velocity(x, t)
    return x


def guided(velocity, positive: tuple, negative: tuple, scale: float):
    """Classifier-free guidance (Ho and Salimans 2022): v_negative + scale (v_positive - v_negative)."""

    def combined(x, t):
        against = velocity(x, t, *negative)
        return against + scale * (velocity(x, t, *positive) - against)

    return combined


def main(prompt: str, params: str | None = None, steps: int = 28, cfg: float = 5.0, seed: int = 0) -> Tensor:
    """An image (1, 3, height, width) in [0, 1]."""
    model = sd3.weights.load(params or sd3.shipped.folder(), dtype=torch.float32)
    transformer, heads = model.params["transformer"], model.config.transformer.heads
    positive, negative = sd3.pipeline.encode(model.params, model.config, model.tokenizers, [prompt], negative="")

    def velocity(x, t, context, pooled):
        return mmdit(transformer, heads, x, t.expand(len(x)), context, pooled)

    noise = sd3.pipeline.initial_noise(sd3.prng.key(seed), model.config, 1)
    grid = times(steps, model.config.schedule.shift)
    latents = sample(guided(velocity, positive, negative, cfg), noise, grid)
    return sd3.pipeline.decode(model.params, model.config, latents)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--params", help="folder of the weights (default: the shipped model)")
    parser.add_argument("--out", default="image.png")
    options = vars(parser.parse_args())
    with torch.no_grad():
        sd3.pixels.to_pil(main(options["prompt"], options["params"]))[0].save(options["out"])
