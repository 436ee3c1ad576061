"""One switch for speed: which kernel, if any, computes an operation.

An operation is written as its formula and decorated with `@op`. When it is called, `tracking` determines once what
tracks its tensors, and the first kernel of `kernels.TABLE` that accepts this and fits the arguments runs; else the
formula does.
`with plain():` turns every kernel off.

This module and `kernels/` are the only places that use private names of PyTorch. A missing one costs speed, never a
result.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from functional_sd3.core.clean_state import NoThreadError, in_clean_state

Tracking = Literal["none", "autograd", "compiler", "other"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Kernel(NamedTuple):
    """A faster form of an operation.

    run: called with the operation's arguments. fits: True if it supports these arguments (device, dtype, sizes) and is
    faster. tracking: the kinds of `tracking` under which it may run. tolerance: the largest relative error against the
    formula, norm over norm, at the sizes of its test.
    """

    run: Callable[..., Any]
    fits: Callable[..., bool]
    tracking: frozenset[Tracking]
    tolerance: float = 2e-6

    @property
    def name(self) -> str:
        """Module and function, such as "onednn.linear"."""
        return f"{self.run.__module__.rpartition('.')[2]}.{self.run.__name__}"


UNTRACKED: frozenset[Tracking] = frozenset({"none"})
DIFFERENTIABLE: frozenset[Tracking] = frozenset({"none", "autograd"})
COMPILED: frozenset[Tracking] = frozenset({"compiler"})
TRANSFORMED: frozenset[Tracking] = frozenset({"autograd", "other"})
TRANSFORMS: frozenset[Tracking] = frozenset({"other"})
_table: dict[str, tuple[Kernel, ...]] | None = None


class _Depths(threading.local):
    """The depth of the running thread in `plain` and in `watched`.

    Of a thread's own, as in one that serves another request; a compiler reads these, and guards on the values of the
    thread that calls, which it does not do for a ContextVar.
    """

    plain = 0
    watched = 0


_depths = _Depths()


class Operation(Protocol[Arguments, Result]):
    """A function made by `op`: called like its formula, which stays as `formula`."""

    formula: Callable[Arguments, Result]

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result: ...


def op(formula: Callable[Arguments, Result]) -> Operation[Arguments, Result]:
    """The operation of a formula: it runs the first kernel that fits, else the formula, which stays as `.formula`.

    Its name in `kernels.TABLE` is that of its module and its own, such as "layers.linear".
    """
    name = f"{formula.__module__.rpartition('.')[2]}.{formula.__name__}"

    @functools.wraps(formula)
    def operation(*arguments: Any, **options: Any) -> Any:
        kernels = () if _depths.plain else _kernel_table().get(name, ())
        # Sizes are read only outside of transforms and compilers: under some they are unknown or enter the graph.
        surroundings = _surroundings() if kernels else None
        for kernel in kernels:
            if surroundings is None or surroundings in kernel.tracking:
                if kernel.fits(*arguments, **options):
                    if surroundings is None:
                        surroundings = _tracked_by(_tensors(arguments))
                    if surroundings in kernel.tracking:
                        return kernel.run(*arguments, **options)
        return formula(*arguments, **options)

    typed = cast(Operation[Arguments, Result], operation)
    typed.formula = formula
    return typed


@contextmanager
def plain() -> Iterator[None]:
    """Context manager in which every operation of this thread computes its formula.

    On a GPU autograd runs backward passes in threads of its own: what they compute again (`transform.remat`) is
    outside.
    """
    _depths.plain += 1
    try:
        yield
    finally:
        _depths.plain -= 1


@contextmanager
def watched() -> Iterator[None]:
    """Context manager in which dispatch and function modes of this thread only watch: they do not change which kernels
    run."""
    _depths.watched += 1
    try:
        yield
    finally:
        _depths.watched -= 1


def private(path: str, *trial: Any, missing: Any = None, **options: Any) -> Any:
    """The function of PyTorch at `path` ("torch._C.name"); `missing` where there is none or where it raises when called
    with `trial` and `options`.

    PyTorch promises none of these names, nor what they take, so each is called once before it is relied on.
    """
    try:
        function: Any = functools.reduce(getattr, path.split(".")[1:], torch)
        try:
            in_clean_state(lambda: function(*trial, **options))
        except NoThreadError:
            function(*trial, **options)
    except Exception:  # A changed function may raise anything.
        return missing
    return function


def private_operator(path: str, arguments: str) -> Any:
    """The operator of PyTorch at `path` ("torch.ops.aten._name") if its schema has these arguments, named in order.

    Else None. For operators of devices that may be absent, which `private` cannot call.
    """
    try:
        operator: Any = functools.reduce(getattr, path.split(".")[1:], torch)
        names = [argument.name for argument in operator.default._schema.arguments]
    except Exception:  # A changed operator may raise anything.
        return None
    return operator if names == arguments.split() else None


def tracking(*tensors: Tensor) -> Tracking:
    """Tracking of these tensors: "none"; "autograd", eager reverse mode only; "compiler"; or "other".

    "other" is everything with rules of its own: a transform of torch.func, forward-mode derivatives, mapped backward
    passes, autocast, any dispatch mode (FlopCounterMode) or function mode, tensor subclasses.
    """
    return _surroundings() or _tracked_by(tensors)


def _surroundings() -> Tracking | None:
    """Tracking that follows from the context of the call, "compiler" or "other"; None where the tensors decide."""
    if torch.compiler.is_compiling():
        return "compiler"
    if in_transform() or in_mode() or in_forward_mode() or _autocast():
        return "other"
    return None


def _tracked_by(tensors: Iterable[Tensor]) -> Tracking:
    result: Tracking = "none"
    differentiable = torch.is_grad_enabled()
    for x in tensors:
        if type(x) not in _ORDINARY or _is_mapped(x):
            return "other"
        if differentiable and x.requires_grad:
            result = "autograd"
    return result


def is_plain(*tensors: Tensor | None) -> bool:
    """True if an operator without rules of its own may compute with these, inside of a function that has rules.

    None aside they are ordinary tensors, or the compiler's stand-ins for them, that nothing differentiates or maps at
    this level; transforms outside of the function may be active.
    """
    if _autocast():
        return False
    ordinary = _TRACED if torch.compiler.is_compiling() else () if in_mode() else _ORDINARY
    differentiable = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (type(x) not in ordinary or _is_wrapped(x) or _is_mapped(x)):
            return False
        if x is not None and differentiable and x.requires_grad:
            return False
    return True


def in_transform() -> bool:
    """True inside a transform of torch.func."""
    return _transforms() is not None


def in_forward_mode() -> bool:
    """True under forward-mode differentiation: `torch.func.jvp` and its derivatives, `forward_ad.dual_level`."""
    return _dual_level() >= 0


def in_mode() -> bool:
    """True if a dispatch mode (`FlopCounterMode`, a tracer) or a function mode is active, which must see PyTorch's own
    operations.

    The function mode of a default device is none of these: it changes where tensors are created, no result. Nor are
    those under `watched`.
    """
    if _depths.watched:
        return False
    if _dispatch_modes():
        return True
    depth = _function_modes()
    if depth == 0:
        return False
    return depth is None or not all(isinstance(_function_mode(index), DeviceContext) for index in range(depth))


def is_concrete(x: Tensor) -> bool:
    """True if the values of x may be read: it is neither traced nor wrapped by a transform of torch.func."""
    return not torch.compiler.is_compiling() and not _is_wrapped(x)


def can_replace_saved_tensors() -> bool:
    """True if the tensors saved for a backward pass can be replaced, as checkpointing does."""
    return _hooks_enabled()


def _always(*_: Any) -> bool:
    """Stands in for a function that this PyTorch lacks: everything then counts as tracked."""
    return True


def _compilers_tensors() -> tuple[type, ...]:
    """The compiler's stand-ins for ordinary tensors."""
    try:
        from torch._subclasses.functional_tensor import FunctionalTensor
    except ImportError:
        return ()
    return (FunctionalTensor,)


_ORDINARY = (Tensor, torch.nn.Parameter)
_TRACED = _compilers_tensors()
_NUMBER = torch.zeros((), dtype=torch.float32, device="cpu")
_transforms = private("torch._C._functorch.peek_interpreter_stack", missing=_always)
_dispatch_modes = private("torch._C._len_torch_dispatch_stack", missing=_always)
_function_modes = private("torch._C._len_torch_function_stack", missing=lambda: None)
_function_mode = getattr(torch._C, "_get_function_stack_at", _always)
_autocast = private("torch._C._is_any_autocast_enabled", missing=_always)
_is_wrapped = private("torch._C._functorch.is_functorch_wrapped_tensor", _NUMBER, missing=_always)
# Tensors mapped by is_grads_batched of autograd.grad.
_is_mapped = private("torch._C._functorch.is_legacy_batchedtensor", _NUMBER, missing=_always)
_hooks_enabled = private("torch._C._autograd._saved_tensors_hooks_is_enabled", missing=_always)
_dual_level = (lambda: forward_ad._current_level) if hasattr(forward_ad, "_current_level") else (lambda: 0)


def _kernel_table() -> dict[str, tuple[Kernel, ...]]:
    """`kernels.TABLE`, imported by the first operation.

    A compiler reads the module: it would compile a graph again that depends on `_table` being None, as it is before.
    """
    global _table
    if torch.compiler.is_dynamo_compiling():
        import functional_sd3.kernels

        return functional_sd3.kernels.TABLE
    if _table is None:
        import functional_sd3.kernels

        _table = functional_sd3.kernels.TABLE
    return _table


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """Every tensor in nested arguments."""
    tensors: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, dict):
            tensors += _tensors(argument.values())
        elif isinstance(argument, list | tuple):
            tensors += _tensors(argument)
    return tensors
