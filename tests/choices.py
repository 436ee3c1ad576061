"""Choices of `kernels.products` for tests, on whatever machine they run."""

from functional_sd3.kernels import attention_products, int8, int8_functions, onednn, products

SMALL = products.Choice(range(16, 513), 0, True, True)
"""oneDNN for 16 to 512 rows of any size and attention in bfloat16, BLAS for others, and Winograd's algorithm."""
ALL = products.Choice(range(1, products.ANY), 0, False)
"""oneDNN for everything."""


def use(monkeypatch, choice=SMALL):
    """The table's choice, and no least size of a weight, in this test."""
    monkeypatch.setattr(products, "CHOICE", choice)
    monkeypatch.setattr(products, "SMALLEST_IN_GRAPH", 0)
    monkeypatch.setattr(products, "SMALLEST_TRACKED", 0)
    monkeypatch.setattr(onednn, "SMALLEST_WEIGHT", 0)
    monkeypatch.setattr(attention_products, "SMALLEST", 0)
    monkeypatch.setattr(int8, "LEAST_SIZE", None if int8_functions.product() is None else 0)
