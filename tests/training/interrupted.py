"""A small run that kills itself: `python interrupted.py OUT WHEN STEP`; imported by the tests that go on with it."""

import os
import signal
import sys
from pathlib import Path

import torch

from functional_sd3.core import prng
from functional_sd3.training import checkpoint, loop, optim, step

STEPS = 23


def loss(params, batch, keys):
    hidden = torch.tanh((batch["x"] + prng.normal(keys, (6,))) @ params["in"])
    error = (hidden @ params["out"] - batch["x"]).square().mean()
    return error, {"bin_loss": torch.stack([error.detach(), 2 * error.detach()]), "bin_share": torch.tensor([1.0, 0.0])}


def setting():
    """First state, step, batches."""
    params = {"in": prng.normal(prng.key(0), (6, 8)), "out": prng.normal(prng.key(1), (8, 6))}
    rate = optim.warmup_cosine(1e-2, 3, STEPS)
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate))
    data, order = prng.normal(prng.key(2), (10, 6)), loop.order(prng.key(3), 4, 10)
    train_step = step.make_train_step(loss, optimizer, donate=True, rate=rate, ema_decay=0.9)
    return step.init(prng.key(4), params, optimizer), train_step, lambda number: {"x": data[order(number)]}


def train(out, train_step=None, on_sample=None):
    """The run from its last checkpoint, or from the start."""
    state, plain_step, batch = setting()
    found = checkpoint.found(Path(out) / "checkpoints")
    if found:
        state = checkpoint.load(found[-1], state)
    return loop.run(
        state, train_step or plain_step, batch, steps=STEPS, out=Path(out), save_every=5, log_every=2, keep=2,
        progress=False, on_sample=on_sample,
    )  # fmt: skip


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def main(out, when, number):
    plain_step, replace = setting()[1], os.replace

    def killed_step(state, batch):
        after = plain_step(state, batch)
        if int(after[0].step) == number:
            kill()
        return after

    def killed_replace(source, target):
        # The new checkpoint is written beside its place, and not there yet.
        if Path(target).name == f"step-{number:08d}.safetensors":
            kill()
        replace(source, target)

    if when == "write":
        os.replace = killed_replace
    train(out, killed_step if when == "step" else None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
