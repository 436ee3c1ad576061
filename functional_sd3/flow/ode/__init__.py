"""ODE solvers of the flow: a fold of a method's step over a grid of times.

    x = integrate(EULER, velocity, noise, schedule.sigmas(28))
    x = integrate(DOPRI5, velocity, noise, [1.0, 0.0], rtol=1e-5, atol=1e-6)

The state is float32 (float64 for a float64 x) whatever the velocity's dtype. Runs share nothing. To pause and resume a
run use `start`, `step` or `run`, and `finish`.

A method of fixed steps reads no value on the host: its run can be compiled whole, captured, vmapped, and differentiated
with respect to x, the times and all that the velocity closes over. An adaptive one chooses its steps by values and can
be differentiated, but neither vmapped nor compiled whole: see `adaptive`, which also counts evaluations.
"""

from functional_sd3.flow.ode.embedded import BOSH3, DOPRI5, TSIT5, Adaptive
from functional_sd3.flow.ode.integration import (
    NonFiniteError,
    Save,
    evaluation_ends,
    evaluation_times,
    evaluations,
    finish,
    from_tensors,
    integrate,
    run,
    start,
    step,
    to_tensors,
)
from functional_sd3.flow.ode.mean_velocity import MEANFLOW, ignore_end
from functional_sd3.flow.ode.method import Advance, Method, State, StepInfo, Transition, no_carry
from functional_sd3.flow.ode.multistep import AB2, AB3, AB4, DPMPP_2M, adams_bashforth
from functional_sd3.flow.ode.predictor_corrector import UNIPC, unipc
from functional_sd3.flow.ode.probabilities import log_prob, log_probs, transition, with_log_prob
from functional_sd3.flow.ode.registry import ADAPTIVE, MEAN, METHODS, NAMES, STOCHASTIC, named
from functional_sd3.flow.ode.runge_kutta import EULER, HEUN, HEUN_EDM, MIDPOINT, RALSTON, RK4, Tableau, explicit
from functional_sd3.flow.ode.stochastic import ancestral, churn, cps, dance, flow_sde, renoised
from functional_sd3.flow.stepwise import RunVelocity, Stepwise, at_step, map_steps
from functional_sd3.flow.times import Times

__all__ = [
    "AB2",
    "AB3",
    "AB4",
    "ADAPTIVE",
    "Adaptive",
    "Advance",
    "BOSH3",
    "DOPRI5",
    "DPMPP_2M",
    "EULER",
    "HEUN",
    "HEUN_EDM",
    "MEAN",
    "MEANFLOW",
    "METHODS",
    "MIDPOINT",
    "Method",
    "NAMES",
    "NonFiniteError",
    "RALSTON",
    "RK4",
    "RunVelocity",
    "STOCHASTIC",
    "Save",
    "State",
    "StepInfo",
    "Stepwise",
    "TSIT5",
    "Tableau",
    "Times",
    "Transition",
    "UNIPC",
    "adams_bashforth",
    "ancestral",
    "at_step",
    "churn",
    "cps",
    "dance",
    "evaluation_ends",
    "evaluation_times",
    "evaluations",
    "explicit",
    "finish",
    "flow_sde",
    "from_tensors",
    "ignore_end",
    "integrate",
    "log_prob",
    "log_probs",
    "map_steps",
    "named",
    "no_carry",
    "renoised",
    "run",
    "start",
    "step",
    "to_tensors",
    "transition",
    "unipc",
    "with_log_prob",
]
