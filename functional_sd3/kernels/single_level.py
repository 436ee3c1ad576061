"""Autograd functions under the transforms of torch.func, without the cost of PyTorch's general rule.

Inside `torch.func.grad` or `jvp` PyTorch makes a class for every call of a `torch.autograd.Function`, and flattens and
restores all its arguments as trees: 0.4 to 0.9 ms for one attention and its gradient. Here a function's class is made
once, and its arguments are a flat sequence, which takes a third of that. As in `torch._functorch.autograd_function`,
the class takes the tensors of one level of transforms, and its forward calls the function at the level below.
"""

import functools
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from functional_sd3.core.clean_state import once_per_process
from functional_sd3.core.dispatch import in_forward_mode, private

_is_reverse_wanted: ContextVar[bool] = ContextVar("is_reverse_wanted", default=True)


class FlatFunction(Function):
    """A Function whose arguments are tensors and settings, not trees, and whose result is a tuple of new tensors."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if not _is_complete:
            return super().apply(*arguments)
        # A pullback that is called after its transform has ended saved tensors of a level that is no more.
        arguments = tuple([_unwrap_dead(x) if isinstance(x, Tensor) else x for x in arguments])
        transform = _current_transform()
        if transform is None:
            return super(Function, cls).apply(*arguments)  # type: ignore[misc]
        if transform.key() in _DIFFERENTIATING and is_available():
            return _apply_single_level(cls, arguments)
        return super().apply(*arguments)

    @staticmethod
    def save_for_both(ctx: Any, *tensors: Tensor | None) -> None:
        """Saves tensors for derivatives of both modes, which get None for what does not vary."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


def is_available() -> bool:
    """True if functions have classes of one level here. By PyTorch's general rule plain operations in a function's jvp
    lose the tangents of outer levels, as those of jvp(jvp): such functions are for where this is True."""
    return _is_complete and (torch.compiler.is_compiling() or _is_correct())


def fits_forward_mode(x: Tensor) -> bool:
    """True where functions for forward mode may run: under it, and without autocast, which goes by the names of
    PyTorch's functions."""
    return in_forward_mode() and not torch.is_autocast_enabled(x.device.type) and is_available()


def first_mapped(x: Tensor, dim: int | None) -> Tensor:
    """x with its mapped dimension first; unchanged, to broadcast, where it has none."""
    return x if dim is None else x.movedim(dim, 0)


def _apply_single_level(function: type[Function], arguments: tuple[Any, ...]) -> Any:
    allowed = _is_allowed()
    _set_allowed(True)
    # A function's forward runs without gradients: whether they are wanted is known here alone.
    token = _is_reverse_wanted.set(torch.is_grad_enabled())
    try:
        return _single_level(function).apply(*arguments)
    finally:
        _is_reverse_wanted.reset(token)
        _set_allowed(allowed)


@functools.cache
def _single_level(function: type[Function]) -> Any:
    """The function at one level of transforms."""

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        level = _current_transform().level()
        outputs = _below(lambda: function.apply(*_unwrap_all(arguments, level)))
        return tuple([_wrap(x, level) for x in outputs])

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # Forward mode is off in a rule, at the levels below too, whose tangents a rule at this level would lose.
        level = _current_transform().level()
        outputs = _below(lambda: function.jvp(_Unwrapped(ctx, level), *_unwrap_all(tangents, level)))
        return tuple([None if x is None else _wrap(x, level) for x in outputs])

    rules = {name: staticmethod(getattr(function, name)) for name in ("setup_context", "backward")}
    rules |= {"forward": staticmethod(forward), "jvp": staticmethod(jvp)}
    return type(f"{function.__name__}Level", (_SingleLevelFunction,), rules)


class _Unwrapped:
    """The context of a function, with its saved tensors at the level below `level`."""

    def __init__(self, ctx: Any, level: int) -> None:
        self._ctx, self.saved_tensors = ctx, _unwrap_all(ctx.saved_tensors, level)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _unwrap_all(values: Iterable[Any], level: int) -> tuple[Any, ...]:
    return tuple([_unwrap(x, level) if isinstance(x, Tensor) else x for x in values])


def _below(call: Callable[[], Any]) -> Any:
    """The result of a call at the level below the current one, with derivatives of both modes unless off outside."""
    reverse, forward = torch.is_grad_enabled(), _is_forward_enabled()
    transform = _current_transform()
    is_jvp = transform.key() == _DIFFERENTIATING[1]
    popped = _pop()
    try:
        _set_reverse_enabled(_is_reverse_wanted.get() if is_jvp else _GradPointer(transform).prevGradMode())
        _set_forward_enabled(not is_jvp or _JvpPointer(transform).prevFwdGradMode())
        return call()
    finally:
        _push(popped)
        _set_reverse_enabled(reverse)
        _set_forward_enabled(forward)


def _is_correct() -> bool:
    """True if x^3 has the right derivatives: PyTorch promises none of the names that are used here."""
    try:
        return _is_correct_under_transforms()
    except RuntimeError:
        # Within `forward_ad.dual_level` PyTorch refuses jvp: it is not wrong, and is tried again outside.
        return _is_correct_in_dual_level()


@once_per_process
def _is_correct_under_transforms() -> bool:
    x = torch.full((), 2.0, dtype=torch.float64, device="cpu")
    along = (torch.ones_like(x),)
    if getattr(forward_ad, "_current_level", -1) >= 0:
        torch.func.jvp(torch.sin, (x,), along)
    try:
        second = torch.func.grad(torch.func.grad(_cube))(x)
        mixed = torch.func.jvp(torch.func.grad(_cube), (x,), along)[1]
        forward = torch.func.jvp(lambda x: torch.func.jvp(_cube, (x,), along)[1], (x,), along)[1]
    except Exception:  # A changed function may raise anything.
        return False
    return second.item() == mixed.item() == forward.item() == 12.0


@once_per_process
def _is_correct_in_dual_level() -> bool:
    x = torch.full((), 2.0, dtype=torch.float64, device="cpu")
    try:
        second = torch.func.grad(torch.func.grad(_cube))(x)
        mixed = forward_ad.unpack_dual(torch.func.grad(_cube)(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
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
    """The attribute of PyTorch at `path`; None where there is none."""
    try:
        return functools.reduce(getattr, path.split(".")[1:], torch)
    except AttributeError:
        return None


_current_transform = private("torch._C._functorch.peek_interpreter_stack")
_unwrap_dead: Callable[[Tensor], Tensor] = _find("torch._C._functorch.unwrap_if_dead")
_unwrap: Callable[[Tensor, int], Tensor] = _find("torch._C._functorch._unwrap_for_grad")
_wrap: Callable[[Tensor, int], Tensor] = _find("torch._C._functorch._wrap_for_grad")
_is_allowed = private("torch._C._functorch.get_single_level_autograd_function_allowed")
_set_allowed = _find("torch._C._functorch.set_single_level_autograd_function_allowed")
_pop = _find("torch._C._functorch.pop_dynamic_layer_stack")
_push = _find("torch._C._functorch.push_dynamic_layer_stack")
_GradPointer = _find("torch._C._functorch.CGradInterpreterPtr")
_JvpPointer = _find("torch._C._functorch.CJvpInterpreterPtr")
_DIFFERENTIATING = _find("torch._C._functorch.TransformType.Grad"), _find("torch._C._functorch.TransformType.Jvp")
_is_forward_enabled = private("torch._C._is_fwd_grad_enabled")
_set_forward_enabled = _find("torch._C._set_fwd_grad_enabled")
_set_reverse_enabled = _find("torch._C._set_grad_enabled")
_SingleLevelFunction = _find("torch.autograd.function._SingleLevelFunction")
_is_complete = None not in (
    *(_current_transform, _unwrap_dead, _unwrap, _wrap, _is_allowed, _set_allowed, _pop, _push),
    *(_GradPointer, _JvpPointer, *_DIFFERENTIATING, _is_forward_enabled, _set_forward_enabled),
    *(_set_reverse_enabled, _SingleLevelFunction),
)
