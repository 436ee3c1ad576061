"""Guidance and text encoders on several processes: the velocities, derivatives and conditioning of one."""

import warnings
from functools import partial

import pytest
import torch

from functional_sd3 import pipeline
from functional_sd3.core import prng, tree
from functional_sd3.flow import guidance as guidances
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel import tensor
from functional_sd3.pipeline import dividing
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.transformer import controlnet, mmdit
from functional_sd3.transformer.control import Control
from tests import models
from tests.parallel.examples import differences


def run_of(model):
    """A loss of the guided velocity, with a ControlNet and a branch of its own options, in parameters and inputs."""
    sizes = model.config.transformer
    net = controlnet.Config(
        depth=1, heads=2, head_dim=16, context_width=sizes.context_width, pooled_width=sizes.pooled_width,
        position_size=12, sample_size=8,
    )  # fmt: skip
    control = Control(models.random_leaves(controlnet.spec(net)), net, prng.normal(prng.key(4), (1, 16, 8, 8)))
    context, pooled = (2, 2, 7, sizes.context_width), (2, 2, sizes.pooled_width)
    both = prng.normal(prng.key(1), context), prng.normal(prng.key(2), pooled)
    conditions = pipeline.Conditions(*(Conditioning(*(part[half] for part in both)) for half in (0, 1)))
    x = prng.normal(prng.key(9), (2, 16, 8, 8))

    def loss(transformer, conditions, net, config, times):
        velocity = pipeline.velocity(
            {"transformer": transformer},
            config,
            conditions,
            5.0,
            times,
            guidance=guidances.at(guidances.skip_layer(guidances.cfg(4.0), [1]), 1, 10),
            control=[control._replace(params=net)],
        )
        return (velocity(x, torch.tensor(0.6)) * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum()

    return loss, (model.params["transformer"], conditions, control.params)


def errors_of_guidance(sizes):
    model, mesh = models.random_model(), meshes.init(sizes)
    loss, arguments = run_of(model)
    errors = {}
    for name, times in (("any time", None), ("table", torch.tensor([0.6]))):
        wanted = torch.func.grad_and_value(loss, (0, 1, 2))(*arguments, model.config, times)
        config = dividing.with_mesh(model.config, mesh)
        errors[name] = differences(wanted, torch.func.grad_and_value(loss, (0, 1, 2))(*arguments, config, times))
    return errors


def test_guidance_on_two_processes_has_the_velocity_and_gradients_of_one(processes):
    for errors in processes(2, errors_of_guidance, {"guidance": 2}):
        assert max(errors.values()) < 3e-6, errors


def error_of_compiled_blocks():
    """The images of blocks in one graph, with the sums over the processes inside, less those of one process."""
    model, mesh = models.random_model(models.config(depth=1, heads=4)), meshes.init({"tensor": 2})
    run = {"prompts": "a star", "key": prng.key(1), "steps": 1, "cfg": 1.0}
    whole = pipeline.generate(*models.parts(model), **run)
    part = tensor.cut(model.params["transformer"], mmdit.spec(model.config.transformer), mesh, heads=4)
    params, config = {**model.params, "transformer": part}, dividing.with_mesh(model.config, mesh)
    compiled = partial(torch.compile, fullgraph=True, backend="eager")
    images = pipeline.generate(params, config, model.tokenizers, **run, block_transform=compiled)
    return float((images - whole).abs().max())


def test_compiled_blocks_of_a_part_of_the_heads_have_the_images_of_one_process(processes):
    assert max(processes(2, error_of_compiled_blocks, timeout=180)) < 1e-4


def too_few_rows():
    model, mesh = models.random_model(), meshes.init({"guidance": 2})
    sizes = model.config.transformer
    half = Conditioning(torch.zeros(1, 3, sizes.context_width), torch.zeros(1, sizes.pooled_width))
    config = dividing.with_mesh(model.config, mesh)
    velocity = pipeline.velocity(model.params, config, pipeline.Conditions(half, half), 1.0)
    with pytest.raises(ValueError, match="guidance=2, but an evaluation of 1 row:"):
        velocity(torch.zeros(1, 16, 8, 8), torch.tensor(0.5))


def test_fewer_rows_than_processes_are_refused(processes):
    processes(2, too_few_rows)


def encoded(sizes):
    """What was read, and whether all is equal to one process to the bit, without a note of absent encoders."""
    model, mesh = models.random_model(), meshes.init(sizes)
    request = pipeline.Request(["a red circle", "a star"], prng.key(0))
    wanted = pipeline.prepare(model.params.__getitem__, model.config, model.tokenizers, request).prompts
    read = []

    def fetch(name):
        read.append(name)
        return model.params[name]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = dividing.with_mesh(model.config, mesh)
        prompts = pipeline.prepare(fetch, config, model.tokenizers, request).prompts
    return read, not tree.diff(tuple(wanted.texts), tuple(prompts.texts))


@pytest.mark.parametrize("count", [2, 4])
def test_each_text_encoder_is_read_by_one_process_and_all_have_its_conditioning(processes, count):
    results = processes(count, encoded, {"guidance": count})
    assert sorted(name for read, _ in results for name in read) == ["clip_g", "clip_l", "t5"]
    assert max(len(read) for read, _ in results) == (2 if count == 2 else 1)
    assert all(same for _, same in results)


def test_encoders_are_divided_by_their_size():
    from functional_sd3.layouts.components import Config
    from functional_sd3.text import clip, t5

    config = Config(clip_l=clip.CLIP_L, clip_g=clip.CLIP_G, t5=t5.T5_XXL)
    names = ["clip_l", "clip_g", "t5"]
    assert dividing.encoder_owners(config, names, 2) == {"t5": 0, "clip_g": 1, "clip_l": 1}
    assert dividing.encoder_owners(config, names, 8) == {"t5": 0, "clip_g": 1, "clip_l": 2}
