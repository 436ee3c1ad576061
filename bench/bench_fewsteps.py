"""A step of MeanFlow beside a plain step of the same network, and with attention by the formula."""

from functional_sd3.core import prng, transform, tree
from functional_sd3.training import objectives
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config

SIZES = mmdit.Config(depth=4, heads=8, position_size=96, sample_size=64, qk_norm=True, interval_size=256)
CONFIG = Config(transformer=SIZES)
SHAPES = {"latents": (16, 64, 64), "context": (154, 4096), "pooled": (2048,)}
EVERY_SAMPLE = {"equal": 0.0}
"""r < t for every sample, so that the derivative is of the whole batch."""


def step(loss):
    """A function that computes the gradient of a loss and gives its unweighted error."""
    # Moved from where they start, so that no derivative is zero.
    params = {"transformer": tree.map(lambda leaf: leaf + 0.01, mmdit.init(prng.key(0), SIZES))}
    keys = prng.split(prng.key(1), len(SHAPES))
    batch = {name: prng.normal(key, (1, *shape)) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}
    sample_keys = prng.split(prng.key(2), 1)

    def run():
        value, metrics = transform.value_and_grad(loss, has_aux=True)(params, batch, sample_keys)[1]
        return metrics.get("error", value).detach()

    return run


def test_meanflow_step(versus):
    versus(
        "MeanFlow step (4 blocks of width 512, 1,024 + 154 tokens) beside a plain step",
        step(objectives.meanflow_loss(CONFIG, **EVERY_SAMPLE)),
        step(objectives.flow_loss(CONFIG)),
        peer="plain step",
        tolerance=None,
        rounds=5,
        memory=True,
        grad=True,
    )


def test_meanflow_step_by_the_formula(versus):
    ours, formula = (objectives.meanflow_loss(CONFIG, implementation=how, **EVERY_SAMPLE) for how in ("sdpa", "math"))
    versus(
        "MeanFlow step (4 blocks of width 512, 1,024 + 154 tokens)",
        step(ours),
        step(formula),
        peer="attention by the formula",
        rounds=3,
        memory=True,
        grad=True,
    )
