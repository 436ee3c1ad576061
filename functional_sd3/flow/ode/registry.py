"""Methods by name, for command lines and files: `named("dopri5", rtol=1e-4)`, `named("euler_ancestral", key=key)`."""

from torch import Tensor

from functional_sd3.core.types import Key
from functional_sd3.flow.ode import adaptive, tolerances
from functional_sd3.flow.ode.embedded import Adaptive
from functional_sd3.flow.ode.mean_velocity import MEANFLOW
from functional_sd3.flow.ode.method import Method
from functional_sd3.flow.ode.multistep import AB2, AB3, AB4, DPMPP_2M
from functional_sd3.flow.ode.predictor_corrector import UNIPC
from functional_sd3.flow.ode.runge_kutta import EULER, HEUN, HEUN_EDM, MIDPOINT, RALSTON, RK4
from functional_sd3.flow.ode.stochastic import ancestral, churn, cps, dance, flow_sde, renoised

METHODS = {
    method.name: method for method in (EULER, MIDPOINT, HEUN, HEUN_EDM, RALSTON, RK4, DPMPP_2M, UNIPC, AB2, AB3, AB4)
}
"""The methods of fixed steps."""

MEAN = {MEANFLOW.name: MEANFLOW}
"""The methods of mean velocities, `velocity(x, t, r)`, in fixed steps."""

ADAPTIVE = adaptive.METHODS
"""The methods that choose their steps."""

STOCHASTIC = {
    "euler_ancestral": ancestral,
    "euler_renoised": renoised,
    "heun_churn": churn,
    "flow_sde": flow_sde,
    "cps": cps,
    "dance": dance,
}
"""The methods that draw noise: functions of a key."""

NAMES = (*METHODS, *ADAPTIVE, *STOCHASTIC, *MEAN)
"""The names of all methods, for `named`."""


def named(
    name: str,
    *,
    key: Key | None = None,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
) -> Method | Adaptive:
    """The method of that name. key: for the stochastic ones, which need it; others ignore it. rtol, atol: for the
    adaptive ones, 1e-5 and 1e-6 by default.

    Raises ValueError for an unknown name, a stochastic method without a key, and tolerances for others than adaptive.
    """
    if name not in NAMES:
        raise ValueError(f"method {name!r} must be one of {', '.join(NAMES)}")
    if name in ADAPTIVE:
        return tolerances.replace(ADAPTIVE[name], rtol, atol)
    if rtol is not None or atol is not None:
        raise ValueError(f"rtol and atol are for the adaptive methods, {', '.join(ADAPTIVE)}; {name} is none")
    if name in STOCHASTIC:
        if key is None:
            raise ValueError(f"{name} draws noise at every step and needs a key")
        return STOCHASTIC[name](key)
    return MEAN[name] if name in MEAN else METHODS[name]
