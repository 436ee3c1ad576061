"""Tolerances of adaptive methods, and their checks."""

import math

import torch
from torch import Tensor

from functional_sd3.flow.ode.embedded import Adaptive
from functional_sd3.flow.ode.method import Method
from functional_sd3.flow.times import is_readable


def replace(
    method: Adaptive,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    max_steps: int | None = None,
) -> Adaptive:
    """The method with the given options in place of its own. Raises ValueError for one that is not adaptive."""
    if not isinstance(method, Adaptive):
        name = method.name if isinstance(method, Method) else method
        raise ValueError(f"method {name!r} must be an adaptive one, such as ode.DOPRI5 or ode.named('dopri5')")
    return method._replace(
        rtol=method.rtol if rtol is None else rtol,
        atol=method.atol if atol is None else atol,
        max_steps=method.max_steps if max_steps is None else max_steps,
    )


def check(method: Adaptive, x: Tensor) -> None:
    """Raises ValueError for tolerances that are no such numbers, do not fit the batch of x, or are finer than its
    dtype."""
    least = 4 * torch.finfo(x.dtype).eps
    for name, value, low in (("rtol", method.rtol, least), ("atol", method.atol, 0.0)):
        if isinstance(value, Tensor):
            if value.ndim > 1 or (value.ndim == 1 and value.shape != x.shape[:1]):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; it is a number or (batch,), ({len(x)},)")
            if not is_readable(value):
                continue
        numbers = value.flatten().tolist() if isinstance(value, Tensor) else [value]
        for number in numbers:
            if not (0 <= number < math.inf):
                raise ValueError(f"{name} {number} must be a number of at least 0")
            if 0 < number < low:
                dtype = str(x.dtype).removeprefix("torch.")
                raise ValueError(f"{name} {number} cannot be met in {dtype}; it must be at least {low:.2g}")
    if not isinstance(method.rtol, Tensor) and not isinstance(method.atol, Tensor) and method.rtol == method.atol == 0:
        raise ValueError("rtol and atol are both 0, which no step can meet")
    if method.max_steps < 1:
        raise ValueError(f"max_steps {method.max_steps} must be at least 1")
