"""Tests of the installed PyTorch have the result of a clean state, wherever they are first called."""

import ast
import importlib
import pkgutil
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import functional_sd3
from functional_sd3 import kernels
from functional_sd3.core import clean_state, dispatch

MODULES = [importlib.import_module(f"functional_sd3.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
FUNCTIONS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": value
    for module in MODULES
    for name, value in vars(module).items()
    if hasattr(value, "cached") and value.__module__ == module.__name__
}
# The one about levels of `forward_ad.dual_level`, which belong to the process; called within one alone.
FUNCTIONS.pop("single_level._is_correct_in_dual_level")
X = torch.ones(2, 3)


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        raise RuntimeError(f"{operator} is not allowed here")


def within(*contexts):
    def run(call):
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            call(None)

    return run


def under_autograd(call):
    x = X.clone().requires_grad_()
    x.register_hook(call)
    (x * x).sum().backward()


def traced(call):
    torch.jit.trace(lambda x: (call(x), 2 * x)[1], (X,), check_trace=False)


STATES = {
    "vmap": torch.func.vmap,
    "grad of vmap": lambda call: torch.func.grad(lambda x: torch.func.vmap(call)(x).sum()),
    "functionalize": torch.func.functionalize,
    "jvp of grad": lambda call: lambda x: torch.func.jvp(torch.func.grad(lambda x: call(x).sum()), (x,), (x,)),
    "a tracer": lambda call: torch.fx.experimental.proxy_tensor.make_fx(call),
    "a mode that refuses": lambda call: lambda x: within(Refusing)(lambda _: call(X)),
    "fake tensors": lambda call: lambda x: within(FakeTensorMode)(lambda _: call(None)),
    "hooks of saved tensors": lambda call: lambda x: within(lambda: saved_tensors_hooks(str, str))(lambda _: call(X)),
    "inference, autocast, a default device": lambda call: (
        lambda x: within(
            torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")
        )(lambda _: call(X))
    ),
    "a hook of a backward pass": lambda call: lambda x: under_autograd(call),
    "TorchScript's tracer": lambda call: lambda x: traced(call),
}


def test_every_kind_is_here():
    assert {
        "single_level._is_correct_under_transforms",
        "products.pointwise",
        "int8_functions.product",
    } <= FUNCTIONS.keys()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.parametrize("state", STATES)
def test_a_first_call_in_any_state_has_the_result_of_a_clean_one(state):
    results = {}

    def record(x):
        for name, function in FUNCTIONS.items():
            function.cached.cache_clear()
            try:
                results.setdefault(name, function())
            except (RuntimeError, AssertionError) as error:  # Without CUDA there are no tensors of its own.
                results.setdefault(name, type(error))
        return x

    within()(record)
    expected, results = results, {}
    STATES[state](record)(X)
    assert results == expected and results["single_level._is_correct_under_transforms"] is True


def test_a_clean_state_has_none_of_what_is_active_where_it_is_called():
    def state():
        return (
            dispatch.tracking(torch.ones(1)),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.ones(1).device.type,
        )

    states = []

    def record(x):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"), Refusing():
            states.append(clean_state.in_clean_state(state))
        return x

    torch.func.vmap(record)(X)
    with torch.inference_mode():
        states.append(clean_state.in_clean_state(state))
    assert states == 2 * [("none", True, False, "cpu")]


def test_an_exception_is_raised_where_the_function_was_called_and_not_cached():
    calls = []

    @clean_state.once_per_process
    def function():
        calls.append(threading.current_thread())
        if len(calls) == 1:
            raise KeyError("once")
        return len(calls)

    with pytest.raises(KeyError, match="once"):
        function()
    assert [function(), function()] == [2, 2] and threading.current_thread() not in calls


def test_without_threads_a_result_is_computed_in_place_and_not_cached(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    calls = []
    function = clean_state.once_per_process(lambda: calls.append(1) or len(calls))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert [function(), function()] == [1, 2]
    with pytest.raises(clean_state.NoThreadError, match="can't start new thread"):
        clean_state.in_clean_state(len)
    assert dispatch.private("torch._C._is_any_autocast_enabled") is not None
    monkeypatch.undo()
    assert [function(), function()] == [3, 3]


def test_a_name_is_not_missing_because_of_the_mode_that_it_was_tried_in():
    ones = torch.ones(1)
    with Refusing():
        assert dispatch.private("torch.sin", ones) is not None
    assert dispatch.private("torch.sin", "no tensor") is None


def test_levels_of_forward_mode_belong_to_the_process():
    with forward_ad.dual_level():
        assert clean_state.in_clean_state(dispatch.in_forward_mode)


def test_the_compiler_reads_the_function_itself():
    function = clean_state.once_per_process(lambda: torch.ones(()).item() == 1)
    run = torch.compile(lambda x: 2 * x if function() else x, backend="eager")
    assert torch.equal(run(X), 2 * X)


@pytest.mark.parametrize("package", ["core", "kernels"])
def test_what_is_cached_for_the_process_and_computes_with_pytorch_does_so_in_a_clean_state(package):
    """A cached function without arguments computes in the state of its first call."""
    for path in sorted((Path(functional_sd3.__file__).parent / package).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.args.args:
                if any("cache" in ast.unparse(decorator) for decorator in node.decorator_list):
                    names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                    assert not names & {"torch", "dispatch", "private"}, (
                        f"{path.name}: {node.name} is for `once_per_process`"
                    )
