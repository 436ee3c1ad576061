"""Autograd functions under the transforms of torch.func, without the cost of PyTorch's general rule.

Inside `torch.func.grad` or `jvp` PyTorch makes a class for every call of a `torch.autograd.Function`, and flattens and
restores all its arguments as trees: 0.4 to 0.9 ms for one attention and its gradient. Here a function's class is made
once, and its arguments are a flat sequence, which takes a third of that. As in `torch._functorch.autograd_function`,
the class takes the tensors of one level of transforms, and its forward calls the function at the level below.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from functional_sd3.core.dispatch import in_mode, private


class FlatFunction(Function):
    """A Function whose arguments are tensors and settings, not trees, and whose result is a tuple of new tensors."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if not _is_complete:
            return super().apply(*arguments)
        # A pullback that is called after its transform has ended saved tensors of a level that is no more.
        arguments = _unwrap_dead(arguments)
        transform = _current_transform()
        if transform is None:
            return super(Function, cls).apply(*arguments)  # type: ignore[misc]
        if transform.key().name in ("Grad", "Jvp") and (in_mode() or _is_correct()):
            return _apply_single_level(cls, arguments)
        return super().apply(*arguments)


def _apply_single_level(function: type[Function], arguments: tuple[Any, ...]) -> Any:
    with _allowed():
        return _single_level(function).apply(*arguments)


@functools.cache
def _single_level(function: type[Function]) -> Any:
    """The function at one level of transforms."""

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        interpreter = _interpreter()
        level = interpreter.level()
        below = [_unwrap(x, level) if isinstance(x, Tensor) else x for x in arguments]
        with torch.enable_grad(), _forward_mode(True), interpreter.lower():
            outputs = function.apply(*below)
        return tuple(_wrap(x, level) for x in outputs)

    rules = {name: staticmethod(getattr(function, name)) for name in ("setup_context", "backward", "jvp")}
    return type(f"{function.__name__}Level", (_SingleLevelFunction,), {"forward": staticmethod(forward), **rules})


@functools.cache
def _is_correct() -> bool:
    """True if x^3 has the right derivatives: PyTorch promises none of the names that are used here.

    Not called in a tracer's mode, where numbers cannot be read.
    """
    x = torch.full((), 2.0, dtype=torch.float64, device="cpu")
    try:
        second = torch.func.grad(torch.func.grad(_cube))(x)
        mixed = torch.func.jvp(torch.func.grad(_cube), (x,), (torch.ones_like(x),))[1]
    except Exception:  # A changed function may raise anything.
        return False
    return second.item() == mixed.item() == 12.0


def _cube(x: Tensor) -> Tensor:
    return _apply_single_level(_Cube, (x,))[0]


class _Cube(Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor]:
        return (x * x * x,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * g

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor]:
        (x,) = ctx.saved_tensors
        return (3 * x * x * tangent,)


def _find(path: str) -> Any:
    """What PyTorch has at `path`; None where there is nothing."""
    try:
        return functools.reduce(getattr, path.split(".")[1:], torch)
    except AttributeError:
        return None


_current_transform = private("torch._C._functorch.peek_interpreter_stack")
_unwrap_dead = private("torch._functorch.utils.unwrap_dead_wrappers", ())
_unwrap: Callable[[Tensor, int], Tensor] = _find("torch._C._functorch._unwrap_for_grad")
_wrap: Callable[[Tensor, int], Tensor] = _find("torch._C._functorch._wrap_for_grad")
_interpreter = _find("torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter")
_allowed = _find("torch._functorch.utils.enable_single_level_autograd_function")
_forward_mode = _find("torch.autograd.forward_ad._set_fwd_grad_enabled")
_SingleLevelFunction = _find("torch.autograd.function._SingleLevelFunction")
_is_complete = None not in (
    *(_current_transform, _unwrap_dead, _unwrap, _wrap, _interpreter),
    *(_allowed, _forward_mode, _SingleLevelFunction),
)
