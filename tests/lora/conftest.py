"""The small models of the tests of weights/."""

from tests.weights.conftest import make_model

__all__ = ["make_model"]
