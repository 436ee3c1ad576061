"""`train --estimate`: within 15 % of what a step holds at its peak, for every choice, and of real sizes."""

import argparse

import pytest
import torch

from bench.timing import allocated_peak
from functional_sd3 import lora, weights
from functional_sd3.cli import train
from functional_sd3.core import prng, transform, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.computation import Computation
from functional_sd3.core.types import Params
from functional_sd3.parallel import offload
from functional_sd3.training import estimate, objectives, optim, step, update_rule
from functional_sd3.training.memory_choice import Choice
from functional_sd3.training.update_rule import UpdateRule
from functional_sd3.transformer import mmdit
from functional_sd3.weights import quantize
from tests import models

MIB = 2**20
BF16 = torch.bfloat16
SIZES = mmdit.Config(
    depth=4, heads=3, head_dim=64, in_channels=16, out_channels=16, context_width=128, pooled_width=96,
    position_size=16, sample_size=16, qk_norm=True, dual_attention_layers=(0, 1),
)  # fmt: skip
LARGE_BATCH = {"batch": 8, "side": 24, "tokens": 40}
SMALL_BATCH = {"batch": 2, "side": 8, "tokens": 20}
CHOICES = {
    "plain": Choice(**LARGE_BATCH),
    "remat": Choice(**LARGE_BATCH, remat=True),
    "remat bfloat16": Choice(**LARGE_BATCH, remat=True, dtype=BF16),
    "accumulate": Choice(**LARGE_BATCH, accumulate=4),
    "bfloat16 weights": Choice(**SMALL_BATCH, rule=UpdateRule("adamw8bit", BF16), remat=True),
    "fused": Choice(**SMALL_BATCH, rule=UpdateRule("adamw8bit", BF16, True), remat=True),
    "muon": Choice(**SMALL_BATCH, rule=UpdateRule("muon")),
    "lora": Choice(**LARGE_BATCH, lora=8, dtype=torch.float32),
    "lora int8": Choice(**LARGE_BATCH, lora=8, dtype=BF16, base=True),
    "lora swap": Choice(**LARGE_BATCH, lora=8, dtype=torch.float32, swapped=2),
}


def measured(choice: Choice) -> float:
    """MiB that a run holds at the peak of a step: state, frozen base and all that the step allocates."""
    params: Params = {"transformer": models.random_leaves(mmdit.spec(SIZES))}
    parts = {"block_transform": transform.remat} if choice.remat or choice.base or choice.swapped else {}
    frozen = 0
    spec = {"transformer": mmdit.spec(SIZES)}
    learned, whole = tree.cast(params, choice.rule.weights), lambda learned: learned
    if choice.lora:
        base = {"transformer": tree.cast(params["transformer"], choice.dtype)}
        if choice.base:
            base = {"transformer": quantize.quantize(base["transformer"])}
        blocks = base["transformer"]["blocks"]
        held = blocks[len(blocks) - choice.swapped :] if choice.swapped else []
        if choice.swapped:
            held[:] = [tree.cast(block, torch.float16) for block in held]
            base["transformer"]["blocks"] = [*blocks[: -choice.swapped], *held]
            parts["materialize"] = offload.materialize(base["transformer"]["blocks"], "cpu", dtype=choice.dtype)
        frozen = tree.nbytes(base) - tree.nbytes(held)
        spec = lora.spec(spec, choice.lora, ["transformer.blocks.*attention*"])
        learned, whole = specs.init(prng.key(1), spec), lambda learned: lora.apply(base, learned, lazy=True)
    config = weights.Config(transformer=SIZES, computations={"transformer": Computation(**parts)})
    objective = objectives.flow_loss(config, dtype=choice.dtype)
    optimizer = update_rule.optimizer(choice.rule, 1e-4, clip=1.0, decay=0.01)
    train_step = update_rule.train_step(
        choice.rule, lambda params, batch, keys: objective(whole(params), batch, keys), optimizer, optim.constant(1e-4),
        trainable=step.trainable(spec), ema_decay=0.9, accumulate=choice.accumulate,
    )  # fmt: skip
    state = step.init(prng.key(0), learned, optimizer, trainable=step.trainable(spec))

    def run():
        batch = {
            "latents": torch.zeros(choice.batch, 16, choice.side, choice.side),
            "context": torch.zeros(choice.batch, choice.tokens, 128),
            "pooled": torch.zeros(choice.batch, 96),
        }
        return train_step(state, batch)

    return (tree.nbytes(state) + frozen + allocated_peak(run)) / MIB


@pytest.mark.parametrize("name", CHOICES)
def test_an_estimate_is_within_15_percent_of_what_is_measured(name):
    config = weights.Config(transformer=SIZES)
    needed = estimate.memory(config, CHOICES[name])
    assert needed.total / MIB == pytest.approx(measured(CHOICES[name]), rel=0.15)


@pytest.fixture
def estimated(capsys):
    """`train --estimate`; answers the numbers of each line by its name, and all of the output."""

    def call(*words):
        parser = argparse.ArgumentParser()
        train.add_arguments(parser)
        assert train.run(parser.parse_args(["--estimate", *map(str, words)])) == 0
        text = capsys.readouterr().out
        rows = [line.rsplit(maxsplit=7) for line in text.splitlines()[2:-1]]
        lines: dict[str, list[int]] = {}
        for name, *numbers in rows:
            lines.setdefault(name.strip(), [int(number.replace(",", "")) for number in numbers])
        return lines, text

    return call


@pytest.mark.parametrize(("name", "parameters"), [("sd3.5-medium", 2.470e9), ("sd3.5-large", 8.147e9)])
def test_released_models_are_known_by_name_and_nothing_is_loaded(estimated, name, parameters):
    """20 bytes a parameter for float32 weights, gradients, Adam and average; a base in int8 takes a byte."""
    rows, text = estimated("--params", name, "--batch-size", 1)
    learned, _, average, moments, gradients, activations, total = rows["--remat"]
    assert learned == average == pytest.approx(4 * parameters / MIB, rel=0.01)
    assert moments == pytest.approx(8 * parameters / MIB, rel=0.11) and gradients <= learned
    assert total == pytest.approx(sum(rows["--remat"][:-1]), abs=8)
    last = rows["--base int8, --data a cache"]
    assert 0.99 * parameters / MIB < last[1] < 1.25 * parameters / MIB
    names = list(rows)
    full = [rows[each][-1] for each in names[1:7]]
    assert full == sorted(full, reverse=True)
    assert "1024 x 1024" in text


def test_an_estimate_of_a_folder_follows_its_options(estimated):
    plain, _ = estimated("--batch-size", 8)
    lean, _ = estimated("--batch-size", 8, "--remat", "--optimizer", "adamw8bit", "--weights", "bfloat16")
    assert lean["this command"][-1] < 0.5 * plain["this command"][-1]
    assert plain["this command"] == plain["float32, adamw"]


def test_an_estimate_of_buckets_is_of_their_largest_area(estimated):
    rows, text = estimated("--batch-size", 2, "--buckets", "32,48")
    assert "images of 48 x 48 a step" in text
    assert rows == estimated("--batch-size", 2, "--size", 48)[0]


def test_what_cannot_be_estimated_is_an_error(estimated):
    for words, said in (
        (["--mesh", "fsdp=3", "--batch-size", 4], "--batch-size 4 cannot be divided over 3 processes"),
        (["--mesh", "width=2"], "--mesh: 'width=2' in the mesh"),
        (["--params", "sd3.5-large", "--mesh", "tensor=4"], "the 38 heads of the attention divide over 1, 2, 19, 38"),
        (["--params", "sd3.5-lage"], "there is no such file or folder.*--estimate knows sd3-medium, sd3.5-medium"),
        (["--params", "sd3.5-large", "--size", 1000], "--size 1000 must be a multiple of 16 pixels"),
        (["--params", "sd3.5-large", "--base", "int8"], "--base int8 is of the base of --lora"),
        (["--params", "sd3.5-large", "--lora", 4, "--block-swap", 39], "--block-swap 39 is more than the 38 blocks"),
    ):
        with pytest.raises(ValueError, match=said):
            estimated(*words)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_run_does_not_keep_the_parameters_that_it_started_from(tmp_path, part):
    import gc
    import weakref

    from functional_sd3.cli import train_setup

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    words = ["--data", "shapes", "--pictures", "8", "--batch-size", "4", "--out", str(tmp_path), "--device", "cpu"]
    words += ["--part", part]
    kept: list = []
    load = train_setup.train_model.load

    def watched(*arguments):
        stored, model, dtype = load(*arguments)
        kept.extend(weakref.ref(leaf) for leaf in tree.leaves(model.params[part]))
        return stored, model, dtype

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_setup.train_model, "load", watched)
        setup = train_setup.prepare(parser.parse_args(words), lambda text: None)
    gc.collect()
    assert setup.task.state is not None and kept and not any(ref() is not None for ref in kept)
