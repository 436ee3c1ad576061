"""Products by the library that a processor's line of the table names: the same numbers, every derivative, any mode."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_leaves

from functional_sd3.core import dispatch, layers, prng, transform, tree
from functional_sd3.kernels import processor, products, winograd
from tests import choices

ONEDNN = "mkldnn::_linear_pointwise"
WEIGHT, BIAS, X = (prng.normal(prng.key(seed), shape) for seed, shape in enumerate(((24, 16), (24,), (2, 9, 16))))
LAYER = {"weight": WEIGHT / 4, "bias": BIAS}
ADAPTED = LAYER | {"low_rank": {"down": WEIGHT[:3] / 4, "up": WEIGHT[:, :3]}}
AMD = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2

processor\t: 1
vendor_id\t: GenuineIntel
cpu family\t: 6
"""


@pytest.fixture(autouse=True)
def everything_by_onednn(monkeypatch):
    choices.use(monkeypatch, choices.ALL)


def loss(params, x):
    return layers.linear(params, x).square().mean()


def second(params, x):
    return jvp(lambda x: grad(loss, 1)(params, x), (x,), (x.flip(0),))[1]


RUNS = {
    # name -> (the run, whether oneDNN computes some of it)
    "value": (layers.linear, True),
    "gradients": (lambda params, x: transform.value_and_grad(loss, (0, 1))(params, x), True),
    "torch.func.grad": (grad(loss, (0, 1)), False),
    "tangent": (lambda params, x: jvp(partial(layers.linear, params), (x,), (x.flip(0),)), True),
    "tangent of a gradient": (second, True),
    "tangent of a tangent": (
        lambda params, x: jvp(lambda x: jvp(partial(loss, params), (x,), (X.flip(0),))[1], (x,), (X,)),
        True,
    ),
    "mapped": (lambda params, x: vmap(partial(layers.linear, params))(x), False),
    "gradients of samples": (vmap(grad(loss), (None, 0)), False),
}


def operations(run):
    """The result, and the names of the operators that ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = run()
    return result, {event.key for event in profiler.key_averages()}


def assert_equal(found, expected):
    for mine, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("params", [LAYER, ADAPTED, {"weight": LAYER["weight"]}], ids=["layer", "adapter", "no bias"])
@pytest.mark.parametrize("name", RUNS)
def test_a_layer_by_onednn_has_the_values_and_derivatives_of_its_formula(name, params):
    run, by_onednn = RUNS[name]
    found, seen = operations(lambda: run(params, X))
    with dispatch.plain():
        expected = run(params, X)
    assert_equal(found, expected)
    assert (ONEDNN in seen) == by_onednn


def test_a_frozen_layer_in_int8_computes_in_float32_by_onednn():
    params = {"weight": torch.arange(384, dtype=torch.int8).view(24, 16), "scale": BIAS.abs(), "bias": BIAS}
    expected = F.linear(X, params["weight"] * params["scale"][:, None], BIAS)
    found, seen = operations(lambda: layers.linear(params, X))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-4)
    assert ONEDNN in seen


@pytest.mark.parametrize("differentiated", [False, True], ids=["value", "gradients"])
def test_a_compiled_layer_is_onednns_and_one_graph_for_any_number_of_rows(differentiated):
    torch._dynamo.reset()
    function = grad(loss, (0, 1)) if differentiated else loss
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    with nullcontext() if differentiated else torch.no_grad():
        for batch in (2, 3, 5):
            x = X[:1].expand(batch, -1, -1).contiguous() * torch.arange(1.0, batch + 1)[:, None, None]
            found, seen = operations(lambda x=x: compiled(LAYER, x))
            expected = function(LAYER, x)
            assert_equal(found, expected)
            assert ONEDNN in seen
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_autograd_is_onednns_too():
    torch._dynamo.reset()
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in LAYER.items()}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, seen = operations(lambda: torch.autograd.grad(compiled(leaves, X), list(leaves.values())))
    assert_equal(found, list(grad(loss)(LAYER, X).values()))
    assert ONEDNN in seen


@pytest.mark.parametrize("change", ["float64", "bfloat16", "meta", "switched off", "missing"])
def test_what_onednn_does_not_compute_is_pytorchs(change, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", change != "switched off")
    if change == "missing":
        monkeypatch.setattr(products, "pointwise", lambda: None)
    to = {"float64": torch.float64, "bfloat16": torch.bfloat16, "meta": "meta"}.get(change, "cpu")
    params, x = tree.map(lambda leaf: leaf.to(to), LAYER), X.to(to)
    found, seen = operations(lambda: transform.value_and_grad(loss)(params, x))
    assert ONEDNN not in seen and found[1].device == x.device and found[1].dtype == x.dtype
    # Without derivatives bfloat16 is oneDNN's, as it is in PyTorch.
    if change != "bfloat16":
        assert ONEDNN not in operations(lambda: layers.linear(params, x))[1]


def test_rows_and_sizes_choose_the_library(monkeypatch):
    choices.use(monkeypatch, products.Choice(range(4, 9), 5 * 384, False))
    chosen = [rows for rows in range(1, 12) if products.is_onednn(rows, WEIGHT)]
    assert chosen == [5, 6, 7, 8]
    for rows in (4, 5, 8, 9):
        _, seen = operations(lambda rows=rows: layers.linear(LAYER, prng.normal(prng.key(0), (rows, 16))))
        assert (ONEDNN in seen) == (rows in chosen)
    assert not products.is_onednn_for_all_rows(WEIGHT)


def test_small_products_that_are_differentiated_stay_pytorchs(monkeypatch):
    rows = X.shape[:-1].numel()
    for least, by_onednn in ((rows * WEIGHT.numel(), True), (rows * WEIGHT.numel() + 1, False)):
        monkeypatch.setattr(products, "SMALLEST_TRACKED", least)
        assert (ONEDNN in operations(lambda: RUNS["gradients"][0](LAYER, X))[1]) == by_onednn


def test_the_table_chooses_the_convolution(monkeypatch):
    weight = torch.ones(64, 64, 3, 3)
    x = torch.ones(1, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    assert not winograd.fits_conv2d({"weight": weight}, x, padding=1)
    choices.use(monkeypatch)
    assert winograd.fits_conv2d({"weight": weight}, x, padding=1)


def test_the_first_processor_is_read_with_vendor_and_family(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(AMD, encoding="utf-8")
    capability = torch.backends.cpu.get_cpu_capability()
    assert processor.identify(path) == ("AuthenticAMD", 26, capability)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD", ("AuthenticAMD", 25)),
        ("Intel64 Family 6 Model 85 Stepping 7, GenuineIntel", ("GenuineIntel", 6)),
        ("arm", ("", 0)),
        ("", ("", 0)),
    ],
)
def test_without_linux_the_systems_name_is_read_and_others_are_unknown(name, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(processor.platform, "processor", lambda: name)
    path = tmp_path / "cpuinfo"
    assert processor.identify(path)[:2] == expected
    # Arm's Linux names no vendor.
    path.write_text("processor\t: 0\nCPU implementer\t: 0x41\n\n", encoding="utf-8")
    assert processor.identify(path)[:2] == expected


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (("AuthenticAMD", 25, "AVX512"), products.TABLE["AuthenticAMD", 25, "AVX512"]),
        (("AuthenticAMD", 27, "AVX512"), products.TABLE["AuthenticAMD", 26, "AVX512"]),
        (("AuthenticAMD", 25, "AVX2"), products.AMD_AVX2),
        (("AuthenticAMD", 23, "AVX2"), products.AMD_AVX2),
        (("GenuineIntel", 6, "AVX2"), products.FORMER),
        (("GenuineIntel", 19, "AVX512"), products.FORMER),
        (("", 0, "AVX2"), products.FORMER),
        (("", 0, "SVE256"), products.PYTORCH),
        (("", 0, "DEFAULT"), products.PYTORCH),
    ],
)
def test_a_processor_that_nobody_measured_has_the_choice_of_those_most_like_it(here, expected):
    assert products.choose(processor.Processor(*here)) == expected


def test_the_lines_are_of_large_products():
    lines = [*products.TABLE.values(), products.AMD_AVX2, products.FORMER]
    assert all(each.rows.step == 1 and each.size >= 1 << 20 for each in lines)
    assert products.PYTORCH.rows == range(0) and not products.PYTORCH.winograd and not products.PYTORCH.attention
