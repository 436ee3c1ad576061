"""bench.products: the choice that follows from times, and the whole command in miniature."""

import pytest
import torch

from bench import narrow
from bench import products as measuring
from functional_sd3.kernels import int8_functions, onednn, processor, products


def times(ratio):
    """Products of all sizes, by oneDNN in ratio(rows, size) of BLAS's time."""
    return [
        measuring.Product(rows, inputs, outputs, 1.0, ratio(rows, rows * inputs * outputs))
        for rows in measuring.ROWS
        for inputs, outputs in measuring.LAYERS
    ]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (lambda rows, size: 0.5, products.Choice(range(1, products.ANY), 0, True)),
        (lambda rows, size: 1.3, products.Choice(range(0), 0, True)),
        (lambda rows, size: 0.8 if 16 <= rows <= 512 else 1.2, products.Choice(range(16, 513), 0, True)),
        (lambda rows, size: 0.8 if size >= 1 << 22 else 1.5, products.Choice(range(1, products.ANY), 1 << 22, True)),
    ],
    ids=["oneDNN", "BLAS", "rows", "sizes"],
)
def test_the_choice_is_the_one_that_takes_least_time(ratio, expected):
    found = measuring.best(times(ratio), True)
    assert found == expected
    assert measuring.share(times(ratio), found) <= 1.0


def test_the_share_is_the_geometric_mean_under_the_choice():
    measured = [measuring.Product(8, 4, 4, 2.0, 1.0), measuring.Product(4, 4, 4, 2.0, 1.0)]
    assert measuring.share(measured, products.Choice(range(8, 9), 0, False)) == pytest.approx(0.5**0.5)
    assert measuring.share(measured, products.Choice(range(1, 99), 65, False)) == pytest.approx(0.5**0.5)


def test_the_command_prints_the_line_of_this_processor(monkeypatch, capsys):
    for name, value in {"ROWS": (1, 2, 4, 8, 16, 32), "LAYERS": ((64, 64),), "CONVOLUTIONS": ((64, 32),)}.items():
        monkeypatch.setattr(measuring, name, value)
    monkeypatch.setattr(measuring, "ATTENTIONS", ((2, 300),))
    monkeypatch.setattr(measuring, "SECONDS", 1e-5)
    monkeypatch.setattr(narrow, "WIDTHS", (64,))
    monkeypatch.setattr(narrow, "SIZES", ((2, 4),))
    monkeypatch.setattr(narrow, "LAYERS", ((16, 32),))
    monkeypatch.setattr(narrow, "ROWS", (2, 77))
    assert measuring.main(["--rounds", "1", "--cpu-time"]) == 0
    printed = capsys.readouterr().out
    assert repr(processor.identify()) in printed and "Choice(range(" in printed and "of BLAS's time" in printed
    assert "bfloat16 pays from a width of" in printed
    assert ("    16 -> 32, 77: " in printed) == (int8_functions.product() is not None)
    assert onednn.has_bfloat16() == ("the same in bfloat16" in printed)
    assert (
        measuring._code(products.Choice(range(1, products.ANY), 4, True, True))
        == "Choice(range(1, ANY), 1 << 2, True, True)"
    )
    monkeypatch.setattr(products, "pointwise", lambda: None)
    assert measuring.main([]) == 1


def test_both_ways_of_attention_agree():
    query, key, value = measuring._random(*((1, 2, 300, 64) for _ in range(3)))
    fused, by_products = (way() for way in measuring.attention_ways(query, key, value, 128))
    torch.testing.assert_close(by_products, fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({64: [1.4, 0.8], 128: [0.8, 0.7], 256: [0.6]}, 128),
        ({64: [0.8], 128: [0.9], 256: [0.6]}, 256),
        ({64: [0.8], 128: [1.1]}, None),
    ],
)
def test_bfloat16_pays_from_the_width_on_at_which_no_size_is_slow(ratios, expected):
    assert narrow.least_width(ratios) == expected


@pytest.mark.parametrize(
    ("logs", "expected"),
    [({1: 0.2, 2: -0.1, 4: 0.1, 8: -0.2, 16: -0.3}, 8), ({1: -0.1, 2: -0.2}, 1), ({1: -0.1, 2: 0.0}, None)],
)
def test_int8_pays_from_the_size_on_at_which_it_is_never_slower(logs, expected):
    assert narrow.least_size(logs) == expected


@pytest.mark.skipif(int8_functions.product() is None, reason="needs products of int8 that are right")
def test_the_ways_of_a_layer_compute_the_same():
    exact, *found = (way().float() for way in (lambda ways: [ways[1], *ways])(narrow.layer_ways(48, 32, 5)))
    assert all((one - exact).norm() < 0.03 * exact.norm() for one in found)
