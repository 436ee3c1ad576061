"""Blocks on the host or mapped from a file, quantised or rematerialised: equal values and gradients, less memory."""

import dataclasses

import pytest
import torch

from bench.timing import allocated_peak
from functional_sd3 import lora, weights
from functional_sd3.core import computation, prng, transform, tree
from functional_sd3.core.computation import Computation
from functional_sd3.parallel import offload
from functional_sd3.training import objectives
from functional_sd3.transformer import mmdit
from functional_sd3.weights import quantize
from tests import models

SIZES = mmdit.Config(
    depth=6, heads=4, head_dim=16, in_channels=2, out_channels=2, context_width=16, pooled_width=16, position_size=8,
    sample_size=16,
)  # fmt: skip
CONFIG = weights.Config(transformer=SIZES)
BATCH = {
    "latents": prng.normal(prng.key(0), (2, 2, 8, 8)),
    "context": prng.normal(prng.key(1), (2, 3, 16)),
    "pooled": prng.normal(prng.key(2), (2, 16)),
}


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """The parameters of a transformer in float16, mapped from their file."""
    path = tmp_path_factory.mktemp("mapped")
    params = {"transformer": tree.cast(models.random_leaves(mmdit.spec(SIZES)), torch.float16)}
    weights.save(path, weights.Model(params, CONFIG, weights.Tokenizers()), layout="native")
    return weights.load(path, dtype="stored").params["transformer"]


def adapter():
    spec = lora.spec({"transformer": mmdit.spec(SIZES)}, 2)
    return tree.map(lambda leaf: leaf + 0.1, models.random_leaves(spec))


def gradients(base, computed, differentiate=transform.value_and_grad):
    config = dataclasses.replace(CONFIG, computations={"transformer": computed})
    loss = objectives.flow_loss(config)

    def of(learned):
        return loss(lora.apply({"transformer": base}, learned, lazy=True), BATCH, prng.split(prng.key(3), 2))[0]

    return differentiate(of)(ADAPTER)


ADAPTER = adapter()
REMAT = {"block_transform": transform.remat}


def copied(base, **options):
    return offload.materialize(base["blocks"], "cpu", dtype=torch.float32, **options)


@pytest.mark.parametrize("differentiate", [transform.value_and_grad, torch.func.grad_and_value])
@pytest.mark.parametrize("ahead", [False, True])
def test_mapped_blocks_give_the_gradients_of_blocks_in_memory(mapped, differentiate, ahead):
    plain = gradients(tree.cast(mapped, torch.float32), computation.PLAIN)
    swapped = gradients(mapped, Computation(materialize=copied(mapped, ahead=ahead), **REMAT), differentiate)
    assert tree.allclose(plain, swapped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_mapped_and_rematerialised_blocks_compose(mapped, dtype):
    """Against the dequantised base in memory, at less than half of its peak, the base counted."""
    stored = quantize.quantize(mapped, dtype)
    exact = tree.cast(quantize.dequantize(_wide_scales(stored)), torch.float32)
    plain = gradients(exact, computation.PLAIN)
    together = computation.then(_wide_scales, quantize.dequantize, copied(stored))
    composed = gradients(stored, Computation(materialize=together, **REMAT))
    by_layer = gradients(stored, Computation(materialize=copied(stored), **REMAT))
    for each in (composed, by_layer):
        assert tree.allclose(plain, each, rtol=1e-4, atol=1e-4)
    kept = tree.nbytes(ADAPTER)
    whole = allocated_peak(lambda: gradients(tree.cast(mapped, torch.float32), computation.PLAIN)) - kept
    peak = allocated_peak(lambda: gradients(stored, Computation(materialize=together, **REMAT))) - kept
    assert peak < 0.5 * whole


def test_copies_without_rematerialised_blocks_are_made_again_and_not_kept(mapped):
    whole = tree.nbytes(tree.cast(mapped["blocks"], torch.float32))
    plain = allocated_peak(lambda: gradients(tree.cast(mapped, torch.float32), computation.PLAIN))
    copies = allocated_peak(lambda: gradients(mapped, Computation(materialize=copied(mapped))))
    assert plain - copies > 0.5 * whole


def _wide_scales(params):
    return tree.map_with_path(lambda path, leaf: leaf.float() if path.endswith("scale") else leaf, params)


def test_blocks_are_copied_one_ahead_and_no_more(mapped):
    copies = copied(mapped, ahead=True)
    numbers = []
    for number in (0, 1, 2, 3, 2, 1, 0):
        taken = {leaf.data_ptr(): leaf for leaf in copies.copies.values()}
        block = copies(mapped["blocks"][number])
        assert tree.allclose(block, tree.cast(mapped["blocks"][number], torch.float32), rtol=0, atol=0)
        numbers.append(all(leaf.data_ptr() in taken for leaf in tree.leaves(block)))
        assert len(copies.copies) in (0, len(tree.leaves(mapped["blocks"][1])))
    # The first, and the one at which the direction turned, which was not known before.
    assert numbers == [False, True, True, True, False, True, True]


def test_the_last_blocks_stay_where_they_are(mapped):
    kept = offload.keep(mapped, 2, "cpu")
    assert all(one is other for one, other in zip(tree.leaves(kept["blocks"][4:]), tree.leaves(mapped["blocks"][4:]), strict=True))  # fmt: skip # noqa: E501
    assert not tree.diff(kept, mapped)
    on_meta = offload.keep(mapped, 2, "meta")
    kinds = [tree.leaves(block)[0].device.type for block in on_meta["blocks"]]
    assert kinds == 4 * ["meta"] + 2 * ["cpu"]
    with pytest.raises(ValueError, match="count 7 is more than the 6 blocks of the network"):
        offload.keep(mapped, 7, "cpu")


def test_parameters_that_learn_get_gradients_where_they_are(mapped):
    wide = tree.cast(mapped, torch.float32)
    config = dataclasses.replace(
        CONFIG, computations={"transformer": Computation(materialize=copied(wide, ahead=True), **REMAT)}
    )

    def gradient(each):
        loss = objectives.flow_loss(each)
        return transform.value_and_grad(lambda part: loss({"transformer": part}, BATCH, prng.split(prng.key(3), 2))[0])(
            wide
        )

    plain, lean = gradient(CONFIG), gradient(config)
    assert tree.allclose(plain, lean, rtol=1e-4, atol=1e-5)
