"""Fixed-point inversion of a method's step, with Anderson acceleration.

A step of length h is a map y -> y + h phi(y). The same method on the reversed grid does not invert it;
solving x = step(y) for y does. For Euler's method the iteration y <- x - h v(y, t) is that of backward Euler (Pan et
al. 2023, "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion", arXiv:2309.04907, algorithm 1,
there for DDIM); here it is y <- y + (x - step(y)), which is equal and holds for any one-step method.
"""

import torch
from torch import Tensor

from functional_sd3.core.dispatch import is_concrete
from functional_sd3.core.types import Tree, Velocity
from functional_sd3.flow.ode.method import Advance, Method, no_carry
from functional_sd3.flow.path import broadcast
from functional_sd3.flow.per_sample import norm

ITERATIONS = 50
TOLERANCE = 1e-6
DEPTH = 4


class InversionFailed(ArithmeticError):
    """Fixed-point inversion did not reach its tolerance: `sample` is the worst, its `residual` is relative to |x|, `t`
    is y's, `finding` the message without advice."""

    def __init__(self, sample: int, residual: float, tolerance: float, iterations: int, t: float):
        self.finding = (
            f"sample {sample} at t = {t:.6g}: {iterations} iterations left {residual:.2g} of |x|, above the tolerance "
            f"{tolerance:.2g}"
        )
        super().__init__(
            f"{self.finding}; use more steps or less guidance, or tolerance=None, which accepts any residual"
        )
        self.sample, self.residual, self.t = sample, residual, t


def inverse(
    method: Method, *, iterations: int = ITERATIONS, tolerance: float | None = TOLERANCE, depth: int = DEPTH
) -> Method:
    """The method whose step from (x, t) to t_next is the y for which `method`'s step from (y, t_next) to t gives x.

    Each iteration evaluates the velocity once for each stage of `method`. A sample is solved when
    |x - step(y)| <= tolerance |x| (Euclidean; float32 reaches about 1e-7), and is not changed any more, so that it does
    not depend on its batch; the iteration ends when all are solved, or after `iterations`. tolerance None: all
    iterations, without a check.
    depth: of Anderson's acceleration (1965; Walker and Ni 2011), the number of earlier iterates that a step is combined
    with. 0 is the plain iteration, which converges where h |dphi/dy| < 1.

    Works under vmap, grad (through the iterations) and compile, where no value can be read, so all iterations are
    made. Elsewhere a tolerance that is not met raises `InversionFailed`. Raises ValueError for a
    method that carries a state or takes its last step otherwise, and for iterations below 1.
    """
    check_one_step(method)
    if iterations < 1:
        raise ValueError(f"iterations {iterations} must be at least 1")

    def step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, carry: Tree) -> Advance:
        y = x
        pairs: list[tuple[Tensor, Tensor]] = []
        allowed = None if tolerance is None else tolerance * norm(x)
        for _ in range(iterations):
            advance = method.step(velocity, y, t_next, t, [])
            residual = x - advance.x
            pairs = [*pairs, (y, residual)][-depth - 1 :]
            proposed = _anderson_iterate(pairs)
            if allowed is None:
                y = proposed
                continue
            residual_norm = norm(residual)
            is_solved = residual_norm <= allowed
            y = torch.where(broadcast(is_solved, x), y, proposed)
            if is_concrete(is_solved) and is_solved.all():
                return Advance(y, carry, advance.slope)
        if tolerance is not None and is_concrete(residual_norm):
            _raise_above_tolerance(residual_norm / norm(x), tolerance, iterations, t_next)
        return Advance(y, carry, advance.slope)

    return Method(
        no_carry,
        step,
        order=method.order,
        evaluations=iterations * method.evaluations,
        name=f"{method.name}_inverse",
        mean=method.mean,
    )


def check_one_step(method: Method) -> None:
    """Raises ValueError unless every step of the method is the same function of x and the times alone."""
    start = torch.zeros(1, dtype=torch.float32, device="cpu")
    half = torch.full((), 0.5, dtype=torch.float32, device="cpu")
    if method.init(start, 2 * half) != []:
        raise ValueError(f"{method.name} carries a state of its own; only one-step methods have inverses")
    if method.step(lambda x, t, *r: x, start, 2 * half, half, []).carry != []:
        raise ValueError(f"{method.name} carries earlier steps; only one-step methods such as heun have inverses")
    if method.last is not None:
        raise ValueError(
            f"{method.name} ends with a step of {method.last.name}, so that its steps are not all alike; take the "
            "method without its last: method._replace(last=None)"
        )


def _anderson_iterate(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The next iterate from the last ones and their residuals, newest last: y + r - sum_j gamma_j (dy_j + dr_j), where
    |r - sum_j gamma_j dr_j| is least for each sample."""
    y, residual = pairs[-1]
    if len(pairs) == 1:
        return y + residual
    # (batch, iterates, elements)
    iterates, residuals = (
        torch.stack([each.reshape(len(y), -1) for each in part], 1) for part in zip(*pairs, strict=True)
    )
    dy, dr, last = iterates.diff(dim=1), residuals.diff(dim=1), residuals[:, -1]
    # The normal equations square the condition number, so they are solved in double precision. A ridge keeps them
    # regular where iterates no longer change.
    dr_double = dr.double()
    gram = dr_double @ dr_double.transpose(1, 2)
    ridge = 1e-12 * gram.diagonal(dim1=1, dim2=2).amax(1) + torch.finfo(torch.float64).tiny
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram, dr_double @ last.double()[..., None]).to(last.dtype)
    return y + residual - (weights.transpose(1, 2) @ (dy + dr)).reshape(y.shape)


def _raise_above_tolerance(residuals: Tensor, tolerance: float, iterations: int, t: Tensor) -> None:
    # A state that is not finite is reported by `check=True` of a run.
    worst = int(residuals.nan_to_num(nan=0.0, posinf=0.0).argmax())
    if tolerance < residuals[worst] < torch.inf:
        raise InversionFailed(
            worst, float(residuals[worst]), tolerance, iterations, float(t if t.ndim == 0 else t[worst])
        )
