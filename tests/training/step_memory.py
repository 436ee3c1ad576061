"""The memory of a step of `train`, measured, and as `train --estimate` prints it, by its command line."""

import argparse
import contextlib
import io
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bench.timing import allocated_peak
from functional_sd3 import weights
from functional_sd3.cli import train, train_setup
from functional_sd3.core import prng, transform, tree
from functional_sd3.core.computation import Computation
from functional_sd3.parallel import mesh as meshes
from functional_sd3.recipes import shapes
from functional_sd3.training import division, flow_learners, objectives, optim, step, update_rule
from functional_sd3.transformer import mmdit
from functional_sd3.weights.model import Model
from tests import models

MIB = 2**20


def parsed(words):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(words)


def measured(words, sizes=None):
    """MiB that this process of a mesh holds at the peak of a step: the whole model, the state, what the step adds."""
    mesh = meshes.init(sizes) if sizes else meshes.ONE_PROCESS
    kept = 0
    load = train_setup.train_model.load

    def counted(*arguments, **options):
        nonlocal kept
        stored, model, dtype = load(*arguments, **options)
        frozen = {name: part for name, part in model.params.items() if not _learns(parsed_words, name)}
        kept = tree.nbytes(frozen)
        return stored, model, dtype

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        data = "shapes" if "--inversion" not in words else _images(Path(folder) / "data")
        parsed_words = parsed(["--data", data, "--pictures", "8", "--out", folder, "--device", "cpu", *words])
        patch.setattr(train_setup.train_model, "load", counted)
        task = train_setup.prepare(parsed_words, lambda text: None, mesh).task
        # The first one has leaves that are made once.
        state, _ = task.train_step(task.state, task.batch(0))
        # The profiler misses what the backend's thread frees: it is given the time to be the first to let go.
        for name in ("all_to_all_single", "all_gather_single"):
            patch.setattr(dist, name, partial(_patiently, getattr(dist, name)))
        added = allocated_peak(lambda: task.train_step(state, task.batch(1)))
        return (tree.nbytes(task.state) + kept + added) / MIB


def _images(folder):
    """A folder of images whose captions hold the word <zor>."""
    folder.mkdir()
    for number, scene in enumerate(shapes.scenes(prng.key(0), 8)):
        shapes.draw(scene, 64).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a <zor> circle")
    return str(folder)


def _learns(arguments, name):
    """Whether the state has a component, not the model."""
    if arguments.part == "vae":
        return True  # Nothing else is read.
    if arguments.lora or arguments.control or arguments.inversion:
        return False
    return name == "transformer" or (arguments.text_encoders == "train" and name in ("clip_l", "clip_g", "t5"))


def _patiently(collective, *args, **kwargs):
    work = collective(*args, **kwargs, async_op=True)
    work.wait()
    time.sleep(0.003)


def estimated(words):
    """MiB of the line of this command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert train.run(parsed(["--estimate", "--device", "cpu", *words])) == 0
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("this command")]
    return int(line.split()[-1].replace(",", ""))


def measured_heads(choice, sizes):
    """MiB of the peak of a step of `choice` on this process's heads, all parameters learning."""
    mesh = meshes.init(dict(choice.mesh.sizes))
    computed = Computation(block_transform=transform.remat if choice.remat else None)
    config = weights.Config(transformer=sizes, computations={"transformer": computed})
    whole = Model({"transformer": models.random_leaves(mmdit.spec(sizes))}, config, None)
    model = division.divide(whole, ["transformer"], mesh)
    learner = flow_learners.components(prng.key(0), model, ["transformer"], False, mesh)
    optimizer = update_rule.optimizer(choice.rule, 1e-4, clip=1.0, decay=0.01)
    chosen = step.trainable(learner.spec)
    train_step = update_rule.train_step(
        choice.rule, learner.loss(objectives.flow_loss), optimizer, optim.constant(1e-4),
        trainable=chosen, ema_decay=0.9, mesh=mesh, layout=learner.layout,
    )  # fmt: skip
    state = step.init(prng.key(0), learner.params, optimizer, trainable=chosen)
    del whole, model, learner
    batch = {
        "latents": torch.zeros(choice.batch, 16, choice.side, choice.side),
        "context": torch.zeros(choice.batch, choice.tokens, sizes.context_width),
        "pooled": torch.zeros(choice.batch, sizes.pooled_width),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_to_all_single", "all_gather_single"):
            patch.setattr(dist, name, partial(_patiently, getattr(dist, name)))
        return (tree.nbytes(state) + allocated_peak(lambda: train_step(state, batch))) / MIB
