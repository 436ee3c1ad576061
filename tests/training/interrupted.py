"""A small run that is killed; imported by the tests that go on with it.

`python interrupted.py OUT WHEN STEP` kills itself in a step or while a checkpoint is written; `python interrupted.py
OUT moments SEED COUNT` is killed in OUT/0, OUT/1, ... at random moments.
"""

import os
import random
import signal
import sys
import time
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


def train(out, train_step=None, batch_of_step=None, **options):
    """The run from its last checkpoint, or from the start; options of `loop.run`."""
    state, plain_step, batch = setting()
    actual = checkpoint.paths(Path(out) / "checkpoints")
    if actual:
        state = checkpoint.load(actual[-1], state)
    options = {"steps": STEPS, "save_every": 5, "log_every": 2, "keep": 2, "progress": False} | options
    return loop.run(state, train_step or plain_step, batch_of_step or batch, out=Path(out), **options)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_random_moments(out, seed, count):
    """Runs in OUT/0, OUT/1, ..., each killed after up to the time that a whole one takes."""
    plain_step, moments = setting()[1], random.Random(seed)

    def slow_step(state, batch):
        time.sleep(0.003)
        return plain_step(state, batch)

    started = time.monotonic()
    train(Path(out) / "warm", slow_step)
    whole = time.monotonic() - started
    for index in range(count):
        # The interpreter and torch start once for all of them.
        child = os.fork()
        if not child:
            train(Path(out) / str(index), slow_step, sample_every=4, on_sample=lambda state, done: time.sleep(0.003))
            os._exit(0)
        time.sleep(moments.uniform(0.02, 1.2 * whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


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
    if sys.argv[2] == "moments":
        kill_at_random_moments(sys.argv[1], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
