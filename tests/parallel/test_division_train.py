"""Training steps of a transformer that is divided over processes are those of one, whatever else divides the batch."""

import pytest
import torch

from functional_sd3 import mmdit
from functional_sd3.core import prng, transform
from functional_sd3.core import tree as trees
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel import sharding, tensor
from functional_sd3.training import muon, optim, step
from tests.parallel.examples import CONFIG, SPEC, differences, filled, inputs


def train(sizes, count=3):
    """Whole parameters after some steps of clipped AdamW, and the last metrics."""
    mesh = meshes.init(sizes) if sizes else meshes.ONE_PROCESS
    part = tensor.part_spec(SPEC, mesh, heads=CONFIG.heads)
    layout = sharding.layout(part, mesh)
    gather = sharding.materialize(layout, mesh)

    def loss(params, batch, keys):
        latents, t, context, pooled = batch["inputs"]
        noise = prng.normal(keys, latents.shape[1:])
        velocity = mmdit.apply(
            params, CONFIG, latents + noise, t, context, pooled, mesh=mesh, materialize=gather,
            block_transform=transform.remat,
        )  # fmt: skip
        return (velocity - noise).square().mean(), {}

    optimizer = optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-3))
    train_step = step.make_train_step(
        loss, optimizer, trainable=step.trainable(SPEC), mesh=mesh, layout=layout, accumulate=1 if sizes else 2
    )
    params = sharding.shard(filled(SPEC), layout, mesh)
    state = step.init(prng.key(1), params, optimizer, trainable=step.trainable(SPEC))
    for _ in range(count):
        state, metrics = train_step(state, {"inputs": inputs(batch=4)})
    return sharding.whole(state.params, layout, mesh), metrics


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}, {"data": 2, "sequence": 2}], ids=str
)
def test_training_divided_over_a_batch_and_within_is_that_of_one_process(processes, sizes):
    wanted, metrics = train({})
    start = trees.leaves(filled(SPEC))
    moved = [a - b for a, b in zip(trees.leaves(wanted), start, strict=True)]
    for params, own in processes(4, train, sizes):
        assert differences([metrics["loss"], metrics["grad_norm"]], [own["loss"], own["grad_norm"]]) < 3e-6
        # AdamW turns rounding of a gradient that is nearly zero into a step; so all together, beside what was learned.
        errors = torch.cat([(a - b).flatten() for a, b in zip(trees.leaves(wanted), trees.leaves(params), strict=True)])
        assert errors.norm() < 1e-4 * torch.cat([leaf.flatten() for leaf in moved]).norm()


def refused():
    mesh = meshes.init({"tensor": 2})
    layout = sharding.layout(tensor.part_spec(SPEC, mesh, heads=CONFIG.heads), mesh)
    with pytest.raises(ValueError, match="needs the layout of the parts"):
        step.make_train_step(lambda *_: None, optim.adamw(1e-3), mesh=mesh)
    with pytest.raises(ValueError, match="Muon turns whole matrices"):
        step.make_train_step(lambda *_: None, muon.muon(1e-3), mesh=mesh, layout=layout)


def test_what_needs_whole_parameters_is_refused(processes):
    processes(2, refused)
