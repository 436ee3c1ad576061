"""Stable Diffusion 3.5 in plain lines: the transformer, the sampler and guidance, without an option or a fast path.

    python docs/examples/plain_sd3.py --prompt "a large red circle on a white background" --out image.png

The library reads the weights, encodes the prompt and decodes the latents; `mmdit.apply` and `pipeline.generate` compute
the same as this. MMDiT: Esser et al. 2024, arXiv:2403.03206, figure 2. Explained in docs/learn/, pages 5 and 7 to 9.
"""

import argparse
import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

import functional_sd3 as sd3

# Layers: p is a dictionary of tensors, x has the shape (batch, tokens, width).


def linear(p: dict, x: Tensor) -> Tensor:
    return x @ p["weight"].T + p["bias"]


def mlp(p: dict, x: Tensor) -> Tensor:
    return linear(p["out"], gelu(linear(p["in"], x), approximate="tanh"))


def rms_norm(p: dict, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * p["weight"]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the features of each token, then scale and shift."""
    return (1 + scale) * layer_norm(x, x.shape[-1:], eps=1e-6) + shift


# Attention.


def project(p: dict, heads: int, x: Tensor) -> list[Tensor]:
    """Queries, keys and values, (batch, heads, tokens, head_dim) each."""
    query, key, value = rearrange(linear(p["qkv"], x), "b n (three h d) -> three b h n d", three=3, h=heads)
    if "query_norm" in p:  # SD3.5; SD3 has none
        query, key = rms_norm(p["query_norm"], query), rms_norm(p["key_norm"], key)
    return [query, key, value]


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(head_dim)) value, heads side by side: (batch, tokens, width)."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return rearrange(scores.softmax(-1) @ value, "b h n d -> b n (h d)")


# The transformer.


def block(p: dict, heads: int, image: Tensor, context: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    """Two streams with weights of their own and one attention over both."""
    own, other = p["image"], p["context"]
    # Shift, scale and gate of the attention, then of the MLP, then of a second attention; the same for all tokens.
    parts = linear(own["modulation"], condition)[:, None].split(image.shape[-1], -1)
    others = linear(other["modulation"], condition)[:, None].split(image.shape[-1], -1)

    of_image = project(own["attention"], heads, modulate(image, *parts[0:2]))
    of_context = project(other["attention"], heads, modulate(context, *others[0:2]))
    joint = attention(*(torch.cat(pair, dim=2) for pair in zip(of_image, of_context, strict=True)))
    to_image, to_context = joint[:, : image.shape[1]], joint[:, image.shape[1] :]

    added = parts[2] * linear(own["attention"]["out"], to_image)
    if "attention2" in own:  # SD3.5-medium: a second attention, over the image alone
        alone = attention(*project(own["attention2"], heads, modulate(image, *parts[6:8])))
        added = added + parts[8] * linear(own["attention2"]["out"], alone)
    image = image + added
    image = image + parts[5] * mlp(own["mlp"], modulate(image, *parts[3:5]))
    if "out" in other["attention"]:  # not in the last block, after which nothing needs the context
        context = context + others[2] * linear(other["attention"]["out"], to_context)
        context = context + others[5] * mlp(other["mlp"], modulate(context, *others[3:5]))
    return image, context


def embed(p: dict, x: Tensor) -> Tensor:
    return linear(p["out"], silu(linear(p["in"], x)))


def sinusoid(t: Tensor) -> Tensor:
    """256 cosines and sines of 1000 t: (batch,) -> (batch, 256)."""
    angles = 1000 * t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], -1)


def middle(table: Tensor, rows: int, columns: int) -> Tensor:
    """The positions of rows x columns patches: the middle of the square table (1, side * side, width)."""
    side = math.isqrt(table.shape[1])
    top, left = (side - rows) // 2, (side - columns) // 2
    return table.unflatten(1, (side, side))[:, top : top + rows, left : left + columns].flatten(1, 2)


def mmdit(p: dict, heads: int, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """Velocity at latents x (batch, channels, height, width) and times t (batch,); 1 is noise, 0 is data."""
    size = p["patch"]["weight"].shape[-1]  # of a patch; its weight is that of a convolution
    rows, columns = x.shape[2] // size, x.shape[3] // size
    image = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size) @ p["patch"]["weight"].flatten(1).T
    image = image + p["patch"]["bias"] + middle(p["position"], rows, columns)
    context = linear(p["context"], context)
    condition = silu(embed(p["time"], sinusoid(t)) + embed(p["pooled"], pooled))
    for layer in p["blocks"]:
        image, context = block(layer, heads, image, context, condition)
    shift, scale = linear(p["final"]["modulation"], condition)[:, None].chunk(2, -1)
    out = linear(p["final"]["out"], modulate(image, shift, scale))
    return rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=size, q=size)


# The sampler.


def times(steps: int, s: float = 3.0) -> Tensor:
    """From 1 (noise) to 0 (data), shifted towards noise (eq. 23) as the released samplers do it."""

    def shift(t):
        return s * t / (1 + (s - 1) * t)

    even = torch.linspace(1, shift(1 / 1000), steps, dtype=torch.float64)
    return torch.cat([shift(even), torch.zeros(1)]).float()


def sample(velocity, noise: Tensor, grid: Tensor) -> Tensor:
    """Euler's method for dx/dt = velocity(x, t) from t = 1 to 0."""
    x = noise
    for t, following in zip(grid[:-1], grid[1:], strict=True):
        x = x + (following - t) * velocity(x, t)
    return x


def main(prompt: str, params: str | None = None, steps: int = 28, cfg: float = 5.0, seed: int = 0) -> Tensor:
    """An image (1, 3, height, width) in [0, 1]."""
    model = sd3.weights.load(params or sd3.shipped.folder(), dtype=torch.float32)
    transformer, heads = model.params["transformer"], model.config.transformer.heads
    positive, negative = sd3.pipeline.encode(model.params, model.config, model.tokenizers, [prompt], negative="")

    def guided(x, t):
        """Classifier-free guidance (Ho and Salimans 2022)."""
        v_p, v_n = (mmdit(transformer, heads, x, t[None], *condition) for condition in (positive, negative))
        return v_n + cfg * (v_p - v_n)

    noise = sd3.pipeline.initial_noise(sd3.prng.key(seed), model.config, 1)
    latents = sample(guided, noise, times(steps, model.config.schedule.shift))
    return sd3.pipeline.decode(model.params, model.config, latents)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--params", help="folder of the weights (default: the shipped model)")
    parser.add_argument("--out", default="image.png")
    options = parser.parse_args()
    with torch.no_grad():
        sd3.pixels.to_pil(main(options.prompt, options.params))[0].save(options.out)
