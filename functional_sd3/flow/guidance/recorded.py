"""The function and arguments that a guidance was made with, kept in it for a record of a run."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

from functional_sd3.flow.guidance.compose import Guidance, Made

P = ParamSpec("P")


def recorded(function: Callable[P, Guidance]) -> Callable[P, Guidance]:
    """The function with a record in its guidances, `Guidance.made`; one that is recorded already is kept as it is."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Guidance:
        guidance = function(*args, **kwargs)
        if guidance.made is not None:
            return guidance
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return guidance._replace(made=Made(function.__name__, bound.arguments))

    return make
