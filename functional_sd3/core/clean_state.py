"""Tests of the installed PyTorch whose results hold for the whole process, computed in a clean state.

An operation may first be called anywhere: mapped by vmap, under a dispatch mode that refuses operators, in a tracer. A
test that computes there can fail for reasons of that place, and its result, which is cached, would slow down everything
that follows. PyTorch's transforms, modes and settings of gradients belong to one thread, so a test runs in a new one.
"""

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class NoThreadError(RuntimeError):
    """The system, or an interpreter that is shutting down, starts no thread."""


def once_per_process(function: Callable[[], Result]) -> Callable[[], Result]:
    """A function without arguments that runs once, by `in_clean_state`; its result is cached.

    An exception is not cached, nor is a result that had to be computed in the caller's state. The attribute `cached` is
    the function of `functools.cache`.
    """
    cached = functools.cache(lambda: in_clean_state(function))

    @functools.wraps(function)
    def result() -> Result:
        if torch.compiler.is_dynamo_compiling():
            return function()
        try:
            return cached()
        except NoThreadError:
            return function()

    result.cached = cached  # type: ignore[attr-defined]
    return result


def in_clean_state(call: Callable[[], Result]) -> Result:
    """The result of `call`, run in a new thread: outside of the transforms of torch.func, modes, autocast, hooks of
    saved tensors, tracers and settings of gradients that are active here. Its exception is raised here.

    Levels of `forward_ad.dual_level` belong to the process and stay, and so does the current CUDA device. Raises
    NoThreadError where no thread starts. The compiler's tracing reads `call` itself.
    """
    if torch.compiler.is_dynamo_compiling():
        return call()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            # A thread starts on the first device, where it would take memory.
            if device is not None:
                torch.cuda.set_device(device)
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="clean state", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise NoThreadError(str(error)) from error
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
