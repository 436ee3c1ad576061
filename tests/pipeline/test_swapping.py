"""Blocks that stay on the host or in their file: the same images, and less memory."""

import weakref

import pytest
import torch

from bench.timing import allocated_peak
from functional_sd3 import cli, pipeline, weights
from functional_sd3.core import prng, tree
from functional_sd3.pipeline import estimate
from functional_sd3.transformer import mmdit
from functional_sd3.weights import quantize
from tests import models
from tests.models import parts

PROMPTS = ["a red circle", "a star"]
STORED = torch.float16
DEEPEST = 3
"""Blocks of the deepest components of `models.config()`: others have fewer, and keep none on the device."""


def drawn(folder, count, dtype=torch.float32, **options):
    outline = weights.outline(folder)
    components, config = pipeline.swap_blocks(
        weights.fetcher(folder, dtype="stored", quantized=True), outline.config, count, "cpu", dtype=dtype
    )
    with torch.no_grad():
        return pipeline.generate(
            components, config, outline.tokenizers, PROMPTS, prng.key(3), steps=2, offload=True, **options
        )


@pytest.mark.parametrize("count", [0, 1, DEEPEST])
def test_the_image_is_that_of_the_whole_model(folder, count):
    whole = pipeline.generate_from(folder, PROMPTS, prng.key(3), dtype=torch.float32, steps=2)
    assert torch.equal(drawn(folder, count), whole)
    # float16 on a CPU is computed in float32 by default, as by `weights.load`.
    assert torch.equal(drawn(folder, count, None), whole)


def test_weights_of_a_byte_are_swapped_too(model, folder, tmp_path):
    small = {**model.params, "transformer": quantize.quantize(model.params["transformer"])}
    weights.save(tmp_path / "small", model._replace(params=small), layout="native")
    options = {"dtype": torch.float32, "quantized": True}
    whole = pipeline.generate_from(tmp_path / "small", PROMPTS, prng.key(3), steps=2, **options)
    assert torch.equal(drawn(tmp_path / "small", 2), whole)


def test_a_component_is_gone_before_the_next_is_read(model):
    alive: list[weakref.ref] = []

    def fetch(name):
        assert not [leaf for leaf in alive if leaf() is not None], f"a component is there when {name} is read"
        params = tree.map(torch.clone, model.params[name])
        alive[:] = map(weakref.ref, tree.leaves(params))
        return params

    components, config = pipeline.swap_blocks(fetch, model.config, 2, "cpu")
    with torch.no_grad():
        image = pipeline.generate(components, config, model.tokenizers, PROMPTS, prng.key(3), steps=1, offload=True)
    assert torch.equal(image, pipeline.generate(*parts(model), PROMPTS, prng.key(3), steps=1))


def test_layers_that_make_modulations_are_copied_once_a_run_and_never_by_a_step(model):
    copied: list[set[str]] = []

    def materialize(part):
        copied.append(set(tree.flatten_paths(part)))
        return part

    params, sizes = model.params["transformer"], model.config.transformer
    x, text = torch.zeros(1, sizes.in_channels, 8, 8), torch.zeros(1, 3, sizes.context_width)
    pooled, t = torch.zeros(1, sizes.pooled_width), torch.tensor([0.5])
    rows = mmdit.modulations(params, sizes, t, pooled, materialize=materialize)
    assert all(".modulation." in path for block in copied[1:] for path in block) and len(copied) == 1 + sizes.depth
    copied.clear()
    stepped = mmdit.apply(params, sizes, x, None, text, None, modulations=rows, materialize=materialize)
    assert not any(".modulation." in path for block in copied[1:] for path in block) and len(copied) == 1 + sizes.depth
    torch.testing.assert_close(stepped, mmdit.apply(params, sizes, x, t, text, pooled), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "said"),
    [(-1, "count -1 must be a number"), (DEEPEST + 1, f"is more than the {DEEPEST} blocks of the")],
)
def test_a_number_of_blocks_that_no_component_has_is_refused(model, count, said):
    with pytest.raises(ValueError, match=said):
        pipeline.swap_blocks(model.params, model.config, count, "cpu")


def test_the_command_line_draws_the_same_image(folder, tmp_path):
    words = ["generate", "a star", "--params", folder, "--steps", 2, "--dtype", "float32", "--out"]
    for name, more in (("whole.png", []), ("swapped.png", ["--block-swap", 2])):
        assert cli.main([str(word) for word in (*words, tmp_path / name, *more)]) == 0
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "swapped.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--block-swap", "-1"], "must be a number of blocks, 0 or more"),
        (["--block-swap", "6"], "--block-swap 6 is more than the 5 blocks of the transformer: give at most 5"),
        (["--block-swap", "6", "--estimate"], "--block-swap 6 is more than the 5 blocks of the transformer"),
        (["--block-swap", "1", "--compile"], "--compile does not"),
        (["--block-swap", "1", "--mesh", "guidance=2"], "is of one process"),
    ],
)
def test_options_that_exclude_it_are_refused(words, said, capsys):
    assert cli.main(["generate", "a star", *words]) == 1
    assert said in capsys.readouterr().err


CHOICES = {"whole": {}, "offload": {"offload": True}, "swapped": {"swapped": 6}}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_estimate_is_what_a_run_allocates(choice, tmp_path):
    """Of weights that are converted from 16 bits; the allocator sees no mapped memory."""
    config = models.config(depth=6, heads=4, head_dim=64)
    model = models.random_model(config)
    weights.save(tmp_path / "model", model, layout="native", dtype=torch.bfloat16)
    options = {"dtype": torch.float32, "finite": False}

    def run():
        outline = weights.outline(tmp_path / "model")
        components = weights.fetcher(tmp_path / "model", **options)
        if choice == "swapped":
            mapped = weights.fetcher(tmp_path / "model", dtype="stored", finite=False)
            components, swapped = pipeline.swap_blocks(mapped, outline.config, 6, "cpu", dtype=torch.float32)
            outline = outline._replace(config=swapped)
        if choice == "whole":
            components = weights.load(tmp_path / "model", **options).params
        with torch.no_grad():
            pipeline.generate(
                components, outline.config, outline.tokenizers, "a star", prng.key(3), steps=2,
                offload=choice != "whole",
            )  # fmt: skip

    side, length = config.transformer.sample_size, model.tokenizers.t5.model_max_length
    chosen = estimate.Choice(
        side, side, tokens=min(256, length), steps=2, computed=torch.float32, on_device=False, fused=True,
        **CHOICES[choice],
    )  # fmt: skip
    expected = estimate.peak(estimate.stages(config, chosen), on_device=False)[1]
    assert expected / 1.25 <= allocated_peak(run) <= expected * 1.1
