"""Transforms of functions: lean gradients, rematerialisation, per-sample gradients, Hessians, compilation."""

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from functional_sd3.core import recompute, tree
from functional_sd3.core.dispatch import can_replace_saved_tensors, in_forward_mode, in_transform
from functional_sd3.core.types import Tree

# True while `value_and_grad` runs its function: gradients taken inside of it have to stay differentiable.
_differentiating: ContextVar[bool] = ContextVar("differentiating", default=False)


def value_and_grad(
    fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """`torch.func.grad_and_value` in half its memory, with room for `remat` and sharded leaves.

    The same arguments and results, gradients first: `(grads, value)`, or `(grads, (value, aux))` with `has_aux`; for a
    tuple of `argnums` a tuple of gradients. The arguments differentiated are trees of float tensors; leaves that `fn`
    does not use have zero gradients. Raises ValueError naming a leaf that is not float, or a value that is no scalar.

    At the top level it is one backward pass without a graph of its own (`torch.autograd.grad` on detached leaves).
    Where the gradient itself is differentiated, mapped or compiled, that is inside any transform, `value_and_grad` or
    `torch.compile`, or on arguments that require grad, it is `torch.func.grad_and_value`.
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    traced = torch.func.grad_and_value(fn, argnums if isinstance(argnums, int) else numbers, has_aux)

    @functools.wraps(fn)
    def differentiated(*args, **kwargs):
        if torch.compiler.is_compiling() or in_transform() or _is_differentiated((args, kwargs)):
            return traced(*args, **kwargs)
        chosen = [tree.map_with_path(_detach, args[number]) for number in numbers]
        inputs = list(args)
        for number, detached in zip(numbers, chosen, strict=True):
            inputs[number] = detached
        token = _differentiating.set(True)
        try:
            with torch.enable_grad():
                value, aux = fn(*inputs, **kwargs) if has_aux else (fn(*inputs, **kwargs), None)
                gradients = iter(_gradients(value, tree.leaves(chosen)))
        finally:
            _differentiating.reset(token)
        grads = [tree.map(lambda leaf: next(gradients), detached) for detached in chosen]
        value = value.detach()
        result = (value, tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, aux))
        return grads[0] if isinstance(argnums, int) else tuple(grads), result if has_aux else value

    return differentiated


def remat(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with its activations recomputed in the backward pass instead of saved: equal gradients, less memory.

    `fn` must be pure, which makes the second run equal to the first; its result is a tree of tensors. Saves memory
    under plain autograd and under every transform of torch.func, in any order (`core.recompute`), also of tensors that
    `fn` reads from closures. Under `torch.compile` it is `fn` itself.
    """

    @functools.wraps(fn)
    def rematerialised(*args, **kwargs):
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        if in_transform() or in_forward_mode() or not can_replace_saved_tensors():
            return recompute.call(fn, *args, **kwargs)
        return checkpoint(functools.partial(fn, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)

    return rematerialised


def per_sample_grads(loss: Callable[..., Tensor], chunk_size: int | None = None) -> Callable[..., Tree]:
    """The function `(params, *batch) -> gradients` of `loss(params, *sample) -> scalar`, leaves (batch, *leaf.shape).

    `batch` are tensors or trees with a leading batch axis, over which `loss` is mapped, `chunk_size` samples at a time
    (all by default). Raises ValueError for a loss of a
    sample that is no scalar.
    """

    def of_one(params: Tree, *sample: Tree) -> Tensor:
        value = loss(params, *sample)
        _check_scalar(value)
        return value

    grad = torch.func.grad(of_one)

    def grads(params: Tree, *batch: Tree) -> Tree:
        return torch.func.vmap(grad, in_dims=(None, *(0 for _ in batch)), chunk_size=chunk_size)(params, *batch)

    return grads


def hvp(fn: Callable[[Tree], Tensor], params: Tree, tangents: Tree) -> Tree:
    """Hessian of the scalar `fn` at `params` times `tangents`, a tree like `params`: forward over reverse mode.

    Raises ValueError naming the path where the trees differ in structure, or a leaf of `tangents` in shape.
    """
    tree.map_with_path(_check_tangent, params, tangents)
    return torch.func.jvp(torch.func.grad(fn), (params,), (tangents,))[1]


def _check_tangent(path: str, leaf: Tensor, tangent: Tensor) -> None:
    if leaf.shape != tangent.shape:
        shapes = f"{list(tangent.shape)}; it must be that of the parameter, {list(leaf.shape)}"
        raise ValueError(f"the tangent {path} has shape {shapes}")


def jvp(fn: Callable[[Any], Any], primal: Any, tangent: Any) -> tuple[Any, Any]:
    """`torch.func.jvp` of a function of one argument: its value and its derivative along `tangent`."""
    value, derivative = torch.func.jvp(fn, (primal,), (tangent,))[:2]
    return value, derivative


def vjp(fn: Callable[[Any], Any], primal: Any) -> tuple[Any, Callable[[Any], Any]]:
    """`torch.func.vjp` of a function of one argument: its value, and the function cotangent -> (gradient,)."""
    value, pullback = torch.func.vjp(fn, primal)[:2]
    return value, pullback


def compile(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:  # noqa: A001
    """`torch.compile(fn, fullgraph=True, **options)`: one graph or an error, never a silent fall back to eager parts.

    Compile outside and transform inside: `compile(torch.func.grad_and_value(loss))`; a transform of a compiled function
    runs eagerly. Raises RuntimeError where the default backend has no C++ compiler; see `compiler_available`.
    """
    if options.get("backend", "inductor") == "inductor":
        check_compiler()
    return torch.compile(fn, **{"fullgraph": True, **options})


def check_compiler() -> None:
    """Raises RuntimeError where the C++ compiler or Python's headers, which `compile` needs, are not installed."""
    if not compiler_available():
        raise RuntimeError(
            f"compiling needs the C++ compiler {_compiler()} and Python's headers ({_python_header()}); "
            "install them (Debian: g++ python3-dev), name another compiler in CXX, or run without compiling"
        )


def compiler_available() -> bool:
    """True if `torch.compile` can build its kernels: its C++ compiler and Python's headers are installed."""
    return shutil.which(_compiler()) is not None and _python_header().is_file()


def _compiler() -> str:
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return os.environ.get("CXX", default)


def _python_header() -> Path:
    return Path(sysconfig.get_path("include")) / "Python.h"


def _is_differentiated(arguments: Tree) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = (leaf for leaf in tree.leaves(arguments) if isinstance(leaf, Tensor))
    return _differentiating.get() or any(leaf.requires_grad for leaf in tensors)


def _detach(path: str, leaf: Tensor) -> Tensor:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
        raise ValueError(f"{path or 'the argument'} is {kind}; only float tensors have gradients (see tree.partition)")
    return leaf.detach().requires_grad_()


def _check_scalar(value: Any) -> None:
    if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
        kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the function returned {kind}; only a scalar float tensor can be differentiated")


def _gradients(value: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
    _check_scalar(value)
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(value, leaves, materialize_grads=True)
