"""A whole run captured for a size: equal to `sample` for other prompts, noise and scales, and free of values that are
read, which a CUDA graph forbids. The capture itself needs a GPU."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from functional_sd3.core import prng, tree
from functional_sd3.flow import guidance, ode
from functional_sd3.pipeline import Conditions, captured, sample
from functional_sd3.text.conditioning import Conditioning
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config
from tests import models

SIZES = mmdit.Config(
    depth=2, heads=2, head_dim=16, in_channels=2, out_channels=2, context_width=16, pooled_width=16, position_size=8,
    sample_size=8, qk_norm=True, dual_attention_layers=(0,),
)  # fmt: skip
CONFIG = Config(transformer=SIZES)


@pytest.fixture(scope="module")
def params():
    return {"transformer": models.random_leaves(mmdit.spec(SIZES))}


def inputs(seed, device="cpu"):
    keys = prng.split(prng.key(seed), 5)
    halves = [Conditioning(prng.normal(keys[at], (2, 3, 16)), prng.normal(keys[at + 1], (2, 16))) for at in (0, 2)]
    return tree.map(lambda leaf: leaf.to(device), (Conditions(*halves), prng.normal(keys[4], (2, 2, 8, 8))))


def test_it_is_the_run_for_other_prompts_noise_and_scales(params):
    run = captured.capture(params, CONFIG, *inputs(0), steps=3, method=ode.HEUN)
    for seed, scale in ((1, 5.0), (2, torch.tensor(2.5))):
        conditions, noise = inputs(seed)
        whole = sample(params, CONFIG, conditions, noise, steps=3, cfg=scale, method=ode.HEUN)
        torch.testing.assert_close(run(conditions, noise, scale), whole, rtol=1e-5, atol=1e-6)


def test_the_inputs_of_the_capture_and_of_a_call_stay_as_they_are(params):
    first, second = inputs(0), inputs(1)
    before = tree.map(torch.clone, [first, second])
    captured.capture(params, CONFIG, *first, steps=1)(*second)
    assert all(map(torch.equal, tree.leaves([first, second]), tree.leaves(before)))


class FromTheHost(TorchFunctionMode):
    """The calls that copy from the host to the device "meta"."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta:
            copies = func in (torch.Tensor.to, torch.Tensor.copy_) and any(getattr(each, "is_cpu", 0) for each in args)
            if copies or func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
                self.found.append(func)
        return result


@pytest.mark.parametrize("made", [None, guidance.zero_star, guidance.apg])
@pytest.mark.parametrize("method", [ode.EULER, ode.DPMPP_2M])
def test_nothing_is_read_or_copied_from_the_host_within_the_run(params, made, method):
    """On the device "meta", where reading a value is an error; within a capture both are."""
    on_meta = tree.map(lambda leaf: leaf.to("meta"), params)
    run = captured.capture(on_meta, CONFIG, *inputs(0, "meta"), steps=3, method=method, guidance=made)
    run.inputs["cfg"] = torch.empty((), dtype=torch.float32, device="meta")
    with torch.no_grad(), FromTheHost() as watch:
        assert run.run(run.inputs).shape == (2, 2, 8, 8)
    assert watch.found == []


def test_copies_from_the_host_are_seen():
    with FromTheHost() as watch:
        torch.tensor([1.0], device="meta")
        torch.ones(2).to("meta")
        torch.empty(2, device="meta").copy_(torch.ones(2)).to("meta")
    assert len(watch.found) == 3


def test_another_size_is_refused(params):
    run = captured.capture(params, CONFIG, *inputs(0), steps=1)
    conditions, noise = inputs(1)
    with pytest.raises(ValueError, match=r"\[1, 2, 8, 8\], and the run was captured for \[2, 2, 8, 8\]"):
        run(conditions, noise[:1])
