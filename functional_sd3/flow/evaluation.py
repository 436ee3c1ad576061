"""One evaluation of a velocity field, checked: a shape that only broadcasts would be wrong in silence."""

from collections.abc import Callable

from torch import Tensor

from functional_sd3.core.checks import function_name


def evaluate(velocity: Callable[..., Tensor], x: Tensor, *times: Tensor) -> Tensor:
    """velocity(x, t), or velocity(x, t, r) of a mean velocity, in the dtype of x. Raises as `evaluate_field`."""
    return evaluate_field(velocity, x, *times).to(x.dtype)


def evaluate_field(velocity: Callable[..., Tensor], x: Tensor, *times: Tensor) -> Tensor:
    """velocity(x, *times) in its own dtype.

    Raises ValueError, naming the function, where that is no tensor of the shape of x.
    """
    slope = velocity(x, *times)
    if not isinstance(slope, Tensor) or slope.shape != x.shape:
        what = f"a tensor {list(slope.shape)}" if isinstance(slope, Tensor) else type(slope).__name__
        raise ValueError(
            f"the velocity {function_name(velocity)} returned {what}; it must return dx/dt, a tensor of the shape of "
            f"x, {list(x.shape)}"
        )
    return slope
