"""A small transformer without zeros, its inputs, and the relative difference of trees, for tests over processes."""

from functional_sd3 import mmdit
from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs

CONFIG = mmdit.Config(
    depth=3,
    heads=6,
    head_dim=8,
    in_channels=4,
    out_channels=4,
    context_width=12,
    pooled_width=10,
    position_size=8,
    sample_size=8,
    qk_norm=True,
    dual_attention_layers=(0,),
)
SPEC = mmdit.spec(CONFIG)


def filled(spec, seed=0):
    """Parameters of which none starts at zero."""
    leaves = specs.paths(spec)
    keys = prng.split(prng.key(seed), len(leaves))
    flat = {
        path: (1.0 if path.endswith("norm.weight") else 0.0) + 0.2 * prng.normal(key, leaf.shape)
        for key, (path, leaf) in zip(keys, leaves.items(), strict=True)
    }
    return tree.unflatten_paths(flat)


def inputs(batch=2, height=6, width=10, tokens=5):
    """15 tokens, which divide over neither 2 nor 4 processes."""
    keys = prng.split(prng.key(1), 4)
    shapes = [(batch, 4, height, width), (batch, tokens, 12), (batch, 10)]
    latents, context, pooled = (prng.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    return latents, prng.uniform(keys[3], (batch,)), context, pooled


def differences(one, divided):
    """Largest relative difference of the leaves of two trees, each by the size of the leaf."""
    pairs = zip(tree.leaves(one), tree.leaves(divided), strict=True)
    return max(float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in pairs)
