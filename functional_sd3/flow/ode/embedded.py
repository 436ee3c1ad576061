"""Embedded Runge-Kutta pairs: two orders from the same slopes, whose difference estimates the error of a step.

Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section II.4. All three pairs continue with the
higher order, and their last stage is the first of the next step. Their values are `adaptive`'s and `ode`'s methods.
"""

from typing import NamedTuple

from torch import Tensor

from functional_sd3.flow.ode.runge_kutta import Tableau


class Control(NamedTuple):
    """Step-size control, of `step_size.factor`: from the error of a step to the length of the next."""

    safety: float = 0.9
    min_factor: float = 0.2
    """Least factor of a step's length to the next."""
    max_factor: float = 10.0
    """Greatest factor of a step's length to the next."""
    beta_q: float = 0.2
    """beta q of the PI controller; 0 is the elementary one."""


class Adaptive(NamedTuple):
    """An integrator that chooses its own steps. Options by `_replace`: `DOPRI5._replace(rtol=1e-3)`."""

    name: str
    order: int
    """p: the error of the whole falls with the p-th power of the steps, and about linearly with the tolerance."""
    estimate: int
    """q: the estimated error of a step falls with the q-th power of its length."""
    tableau: Tableau
    errors: tuple[float, ...]
    """b - b': h times the sum of the slopes with these weights is the estimated error of a step."""
    interpolant: tuple[tuple[float, ...], ...]
    """Dense output: at t + theta h, the weight of slope i is the sum over k of interpolant[i, k] theta^(k + 1)."""
    rtol: float | Tensor = 1e-5
    """A step is accepted when the root of the mean of (error / (atol + rtol max(|x|, |x_next|)))^2 over the elements
    of a sample is at most 1. A number, or (batch,) a tolerance for each sample."""
    atol: float | Tensor = 1e-6
    max_steps: int = 1000
    """Attempts, accepted or not, after which a sample has failed."""
    control: Control = Control()


BOSH3 = Adaptive(
    "bosh3",
    order=3,
    estimate=3,
    tableau=Tableau(
        (0.0, 1 / 2, 3 / 4, 1.0), ((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)), (2 / 9, 1 / 3, 4 / 9, 0.0)
    ),
    errors=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    interpolant=((1.0, -4 / 3, 5 / 9), (0.0, 1.0, -2 / 3), (0.0, 4 / 3, -8 / 9), (0.0, -1.0, 1.0)),
)
"""Bogacki and Shampine 1989, of order 3(2): MATLAB's ode23, scipy's RK23. Dense output: a cubic, Hermite's."""

DOPRI5 = Adaptive(
    "dopri5",
    order=5,
    estimate=5,
    tableau=Tableau(
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    ),
    errors=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    interpolant=(
        (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
        (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
        (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
        (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
        (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
    ),
)
"""Dormand and Prince 1980, of order 5(4): MATLAB's ode45, scipy's RK45. Dense output of order 4: Shampine 1986."""

TSIT5 = Adaptive(
    "tsit5",
    order=5,
    estimate=5,
    tableau=Tableau(
        (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
        (
            (),
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
            (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
        ),
        (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0),
    ),
    errors=(
        0.00178001105222577714,
        0.0008164344596567469,
        -0.007880878010261995,
        0.1447110071732629,
        -0.5823571654525552,
        0.45808210592918697,
        -1 / 66,
    ),
    interpolant=(
        (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
        (0.0, 0.1317, -0.2234, 0.1017),
        (0.0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
        (0.0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
        (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
        (0.0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
        (0.0, 1.5, -4.0, 2.5),
    ),
)
"""Tsitouras 2011, of order 5(4), a smaller error than Dormand and Prince's per evaluation. Dense output of order 4."""
