"""How blocks are computed is said once, in the config: every objective, the encoders and the pipeline follow it."""

import dataclasses
import inspect

import pytest
import torch

from bench.timing import allocated_peak
from functional_sd3 import pipeline, weights
from functional_sd3.core import computation, layers, prng, transform, tree
from functional_sd3.core.computation import Computation
from functional_sd3.layouts.components import Config
from functional_sd3.text import clip, conditioning, t5
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.training import objectives, step
from functional_sd3.transformer import mmdit
from tests import models
from tests.training import objective_examples as given

KEYS = given.KEYS


def computed(config, **parts):
    return dataclasses.replace(config, computations={"transformer": Computation(**parts)})


def makers(**parts):
    """Every objective of the transformer, by name, with blocks that are computed so."""
    return given.makers(computed(given.MODEL, **parts), computed(given.MEAN, **parts))


def gradients(name, make, params=given.PARAMS, differentiate=transform.value_and_grad):
    batch, loss = given.batch_of(name), make()
    return differentiate(lambda part: loss({"transformer": part, "fake": part}, batch, KEYS)[0])(params)


@pytest.mark.parametrize("name", makers())
def test_an_objective_follows_the_computation_in_its_config(name):
    blocks, remats = [], []

    def materialize(params):
        blocks.append("attention" in params.get("image", {}))
        return tree.map(lambda leaf: leaf.double().float(), params)

    def remat(fn):
        remats.append(fn)
        return transform.remat(fn)

    plain, value = gradients(name, makers()[name])
    again, same = gradients(name, makers(materialize=materialize, block_transform=remat)[name])
    assert remats and True in blocks and False in blocks
    torch.testing.assert_close(same, value, rtol=1e-5, atol=1e-6)
    assert tree.allclose(again, plain, rtol=1e-4, atol=1e-6)


def test_an_objective_that_is_added_later_is_tested_here_too():
    losses = {name: getattr(objectives, name) for name in objectives.__all__ if name.endswith("_loss")}
    # These pass their options on to the flow's loss.
    of_flow = {name for name, make in losses.items() if "options" in inspect.signature(make).parameters}
    assert set(makers()) == {*losses} - {"vae_loss"} - of_flow


@pytest.mark.parametrize(
    ("differentiate", "most"), [(transform.value_and_grad, 0.4), (torch.func.grad_and_value, 0.65)]
)
def test_rematerialised_blocks_keep_less_and_no_copies_in_another_dtype(differentiate, most):
    """One block's activations, and its parameters in bfloat16, instead of all blocks'."""
    sizes = dataclasses.replace(given.CONFIG, depth=8, heads=4, head_dim=16, sample_size=16, position_size=8)
    params = models.random_leaves(mmdit.spec(sizes))
    batch = {
        "latents": prng.normal(prng.key(0), (4, 2, 16, 16)),
        "context": prng.normal(prng.key(1), (4, 3, 6)),
        "pooled": prng.normal(prng.key(2), (4, 5)),
    }

    def step_of(**parts):
        loss = objectives.flow_loss(computed(Config(transformer=sizes), **parts), dtype=torch.bfloat16)
        gradient = differentiate(lambda part: loss({"transformer": part}, batch, prng.split(prng.key(3), 4))[0])
        return lambda: gradient(params)

    plain, lean = step_of(), step_of(block_transform=transform.remat)
    kept = tree.nbytes(params)
    # Less the gradients, which both return.
    peaks = [allocated_peak(run) - kept for run in (plain, lean)]
    assert peaks[1] < most * peaks[0]
    first, again = (torch.cat([leaf.flatten() for leaf in tree.leaves(run()[0])]) for run in (plain, lean))
    assert (again - first).norm() < 1e-2 * first.norm()  # Sums in bfloat16 in another order.


def test_a_remat_of_the_whole_training_step_changes_the_state_by_rounding_alone(tiny):
    config = computed(tiny.config, block_transform=transform.remat)
    encoders = dict.fromkeys(("clip_l", "t5"), Computation(block_transform=transform.remat))
    config = dataclasses.replace(config, computations={**config.computations, **encoders})
    optimizer = step.optim.adamw(1e-3)
    states = []
    for each in (tiny.config, config):
        loss = objectives.flow_loss(each, dropout=0.5, empty=tiny.empty)
        train_step = step.make_train_step(loss, optimizer)
        state = step.init(prng.key(0), tiny.params, optimizer)
        for _ in range(2):
            state, _ = train_step(state, tiny.batch)
        states.append(state)
    assert tree.allclose(states[0].optimizer[0].mean, states[1].optimizer[0].mean, rtol=1e-4, atol=1e-6)


TEXT = {
    "t5": (t5, t5.Config(vocab=20, width=16, layers=3, heads=2, head_dim=8, mlp_width=24)),
    "clip_l": (clip, clip.Config(vocab=20, length=6, width=16, layers=3, heads=2, mlp_width=16, eos_id=19)),
}


@pytest.mark.parametrize("name", TEXT)
def test_encoders_materialise_a_block_at_a_time(name):
    module, config = TEXT[name]
    params = models.random_leaves(module.spec(config))
    ids = prng.randint(prng.key(1), (2, 6), 0, 20)
    held = []

    def materialize(part):
        held.append(sum(leaf.numel() for leaf in tree.leaves(part)))
        return tree.cast(part, torch.float32)

    stored = tree.cast(params, torch.float64)
    want = module.apply(tree.cast(stored, torch.float32), config, ids)
    got = module.apply(stored, config, ids, materialize=materialize, block_transform=transform.remat)
    assert tree.allclose(got, want) and len(held) == 4 and sum(held) == tree.count(params)


def test_the_encoders_and_the_pipeline_follow_the_config_too():
    sizes = dataclasses.replace(given.CONFIG, context_width=32, pooled_width=32)
    config = Config(
        clip_l=dataclasses.replace(TEXT["clip_l"][1], projection_width=16),
        t5=dataclasses.replace(TEXT["t5"][1], width=32),
        transformer=sizes,
    )
    params = {name: models.random_leaves(spec) for name, spec in weights.spec(config).items()}
    cast = Computation(materialize=lambda part: layers.cast(part, torch.float32))
    stored = tree.cast(params, torch.float64)
    lean = dataclasses.replace(config, computations=dict.fromkeys(params, cast))
    ids = conditioning.Ids(*(prng.randint(prng.key(4), (2, 6), 0, 19) for _ in range(3)))
    want, got = conditioning.encode(params, config, ids), conditioning.encode(stored, lean, ids)
    assert tree.allclose(tree.cast(list(got), torch.float32), list(want), rtol=1e-5, atol=1e-6)
    negative = Conditioning(*(torch.zeros_like(part) for part in want))
    noise = prng.normal(prng.key(5), (2, 2, 8, 8))
    images = [
        pipeline.sample(part, each, pipeline.Conditions(want, negative), noise, steps=2, cfg=2.0)
        for part, each in ((params, config), (stored, lean))
    ]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-5)


def test_a_computation_is_no_part_of_what_a_model_is():
    assert computed(given.MODEL, block_transform=transform.remat) == given.MODEL
    assert hash(computed(given.MODEL, block_transform=transform.remat)) == hash(given.MODEL)
    assert computation.of(given.MODEL, "t5") == computation.PLAIN and not computation.PLAIN.options
