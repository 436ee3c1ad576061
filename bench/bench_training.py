"""One training step, and gradients sample by sample."""

import pytest
import torch

from bench import peers
from functional_sd3.core import prng, transform, tree
from functional_sd3.flow import path
from functional_sd3.training import objectives, optim, step
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config

CONFIG = mmdit.Config(
    depth=4, heads=6, position_size=32, sample_size=32, context_width=512, pooled_width=256, qk_norm=True
)
BATCH = 8


def batch():
    keys = prng.split(prng.key(0), 3)
    shapes = {"latents": (16, 32, 32), "context": (77, 512), "pooled": (256,)}
    return {name: prng.normal(key, (BATCH, *shape)) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_step(versus, compiled):
    """Against the loop of diffusers' training scripts: module, autograd, clipping, fused AdamW, EMA."""
    from diffusers.training_utils import EMAModel

    torch._dynamo.reset()
    pair, data = peers.transformer(CONFIG), batch()
    module = pair.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    average = EMAModel(module.parameters(), decay=0.999, foreach=True)
    run = torch.compile(module, dynamic=False) if compiled else module
    generator = torch.Generator().manual_seed(0)

    def theirs():
        latents, noise = data["latents"], torch.randn(data["latents"].shape, generator=generator)
        t = torch.sigmoid(torch.randn(BATCH, generator=generator))
        mixed = (1 - t.view(-1, 1, 1, 1)) * latents + t.view(-1, 1, 1, 1) * noise
        velocity = run(mixed, data["context"], data["pooled"], 1000 * t, return_dict=False)[0]
        loss = (velocity - (noise - latents)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(module.parameters())
        return loss.detach()

    rule = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-5, decay=0.01))
    learned = step.trainable({"transformer": mmdit.spec(CONFIG)})
    train = step.make_train_step(
        objectives.flow_loss(Config(transformer=CONFIG)),
        rule,
        trainable=learned,
        ema_decay=0.999,
        donate=True,
        compile=compiled,
    )
    copies = tree.map(torch.clone, {"transformer": pair.params})
    held = [step.init(prng.key(0), copies, rule, trainable=learned)]

    def ours():
        held[0], metrics = train(held[0], data)
        return metrics["loss"]

    versus(
        f"training step, width 384, 4 blocks, 256 + 77 tokens, batch {BATCH}, {'compiled' if compiled else 'eager'}",
        ours,
        theirs,
        peer="diffusers' module, autograd, fused AdamW, EMA",
        # Their noise is another, so the losses agree only roughly.
        tolerance=0.1,
        grad=True,
        memory=not compiled,
        # Those of the eager module are those of the compiled one.
        least=not compiled,
        compiled=compiled,
    )


def test_per_sample_gradients(versus):
    config = mmdit.Config(
        depth=2, heads=2, position_size=8, sample_size=8, context_width=64, pooled_width=64, qk_norm=True
    )
    params, keys = mmdit.init(prng.key(0), config), prng.split(prng.key(1), 4)
    params = tree.map(lambda leaf: leaf + 0.02 * prng.normal(keys[0], tuple(leaf.shape)), params)
    data = [
        prng.normal(key, (16, *shape))
        for key, shape in zip(keys, ((16, 8, 8), (16, 8, 8), (24, 64), (64,)), strict=True)
    ]

    def loss(params, latents, noise, context, pooled, implementation="math"):
        def velocity(x, t):
            return mmdit.apply(params, config, x, t, context[None], pooled[None], implementation=implementation)

        return path.loss(velocity, latents[None], noise[None], torch.full((1,), 0.5)).mean()

    gradients = transform.per_sample_grads(loss)
    one = transform.value_and_grad(lambda *arguments: loss(*arguments, implementation="sdpa"))

    def by_loop():
        gradients = [tree.leaves(one(params, *(part[index] for part in data))[0]) for index in range(16)]
        return [torch.stack(leaves) for leaves in zip(*gradients, strict=True)]

    versus(
        "per-sample gradients of the loss, width 128, 2 blocks, 16 + 24 tokens, batch 16",
        lambda: list(tree.leaves(gradients(params, *data))),
        by_loop,
        peer="a loop of autograd over samples",
        grad=True,
        rounds=11,
    )
