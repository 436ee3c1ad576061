"""The function and arguments that a guidance was made with, kept in it for a record of a run."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

from functional_sd3.flow.guidance.compose import Call, Guidance

P = ParamSpec("P")


def recorded(function: Callable[P, Guidance]) -> Callable[P, Guidance]:
    """The function whose guidances have its call as `Guidance.made_by`; a call that they have already is kept."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Guidance:
        guidance = function(*args, **kwargs)
        if guidance.made_by is not None:
            return guidance
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return guidance._replace(made_by=Call(function.__name__, bound.arguments))

    return make
