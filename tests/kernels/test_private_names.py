"""Private names of PyTorch occur in kernels/ and core/dispatch.py alone; a missing one costs speed, never an answer."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import functional_sd3

PACKAGE = Path(functional_sd3.__file__).parent
# The compiler's collectives are in no public module; `traced.is_available` says whether they are there. Operations are
# watched by a class of a private module, for an estimate of memory alone, which no result depends on.
EXCEPT = tuple(PACKAGE / path for path in ("core/dispatch.py", "core/live_bytes.py", "parallel/traced.py"))
OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if path not in EXCEPT and path.parent != PACKAGE / "kernels"]
OPERATORS = ("torch.ops.", "torch.cuda.jiterator")


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("torch.") and (is_private(name) or name.startswith(OPERATORS)):
                found.append(name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if is_private(name)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("torch") and is_private(alias.name)]
    return found


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_pytorch_are_for_kernels_and_the_dispatch(path):
    assert private_names(path) == []


def test_private_names_are_seen():
    names = private_names(PACKAGE / "core" / "dispatch.py")
    assert any(name.startswith("torch.utils._device") for name in names)


SCRIPT = '''
import functools, os, sys, traceback
import torch
import torch._dynamo, torch._functorch.vmap, torch._functorch.eager_transforms
from torch.autograd import forward_ad
from torch.utils import _device, _python_dispatch

# PyTorch scripts its own forward-mode derivatives when they are first used: once, before the processes are forked.
torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))

def smoke():
    """Layers, noise, gradients, transforms and an optimiser's step with what is left of PyTorch."""
    from functional_sd3.core import attention, layers, leafwise, prng, transform, tree
    from functional_sd3.training import optim
    layer = {"weight": prng.normal(prng.key(1), (8, 16)), "bias": prng.normal(prng.key(2), (8,))}
    x = prng.normal(prng.key(3), (40, 16))
    y = torch.nn.functional.linear(x, layer["weight"], layer["bias"])
    torch.testing.assert_close(layers.linear(layer, x), y, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(layers.linear_activation(layer, x, "gelu_tanh"),
                               torch.nn.functional.gelu(y, approximate="tanh"), rtol=2e-5, atol=2e-6)
    norm = {"weight": torch.ones(16)}
    torch.testing.assert_close(layers.rms_norm(norm, x, 1e-6), layers.rms_norm.formula(norm, x, 1e-6))
    loss = lambda layer: layers.linear(layer, x).square().mean()
    first, _ = transform.value_and_grad(loss)(layer)
    second = torch.func.grad(loss)(layer)
    assert tree.allclose(first, second, rtol=1e-4, atol=1e-5)
    value, tangent = torch.func.jvp(lambda x: layers.linear(layer, x), (x,), (x,))
    torch.testing.assert_close(tangent, x @ layer["weight"].t(), rtol=1e-4, atol=1e-5)
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    state = optimizer.init(layer)
    updates, _ = optimizer.update(first, state, layer)
    expected = optim.apply_updates(layer, updates)
    donated, _ = optim.donate(optimizer, tree.map(torch.clone, first), state, tree.map(torch.clone, layer))
    assert tree.allclose(donated, expected, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(optim.ema_update(layer, expected, 0.9, torch.tensor(5))["weight"]).all()
    heads = prng.normal(prng.key(4), (1, 2, 5, 8))
    for derivative in (torch.func.grad, lambda f: lambda x: torch.func.jvp(torch.func.grad(f), (x,), (x.cos(),))[1]):
        ours, formula = (
            derivative(lambda x: attention.attention(x, heads, x, implementation=how).square().sum())(heads)
            for how in ("sdpa", "math")
        )
        torch.testing.assert_close(ours, formula, rtol=1e-4, atol=1e-5)

# Names that this program looks up; each is taken away in a process of its own, forked after PyTorch was imported.
failed = []
for path in [None, *sys.argv[1:]]:
    child = os.fork()
    if child == 0:
        try:
            if path is not None:
                *parents, name = path.split(".")
                owner = functools.reduce(getattr, parents[1:], torch)
                if hasattr(owner, name):
                    delattr(owner, name)
                    # Operators are found anew when asked for.
                    if type(owner).__name__ == "_OpNamespace":
                        def look_up(self, wanted, look_up=type(owner).__getattr__, missing=(owner, name)):
                            if (self, wanted) == missing:
                                raise AttributeError(wanted)
                            return look_up(self, wanted)
                        type(owner).__getattr__ = look_up
            smoke()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(path)
print("failed without:", failed)
sys.exit(bool(failed))
'''


USED_BY_EVERY_FUNCTION = {
    "torch._C._functorch.CGradInterpreterPtr",
    "torch._C._functorch.CJvpInterpreterPtr",
    "torch._C._functorch.TransformType.Grad",
    "torch._C._functorch.TransformType.Jvp",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._functorch.pop_dynamic_layer_stack",
    "torch._C._functorch.push_dynamic_layer_stack",
    "torch._C._functorch.unwrap_if_dead",
    "torch._C._set_fwd_grad_enabled",
    "torch._C._set_grad_enabled",
    "torch.autograd.function._SingleLevelFunction",
}
"""Without these PyTorch's own functions fail; `tests/kernels/test_single_level.py` does without all of them."""


def looked_up_names() -> list[str]:
    """Every name given to `dispatch.private`, and those read with getattr."""
    names = set()
    for path in (PACKAGE / "core" / "dispatch.py", *sorted((PACKAGE / "kernels").glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("torch."):
                names.add(node.value)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("_foreach_"):
                names.add(f"torch.{node.value}")
    return sorted(name for name in names - USED_BY_EVERY_FUNCTION if " " not in name and is_private(name))


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")
def test_without_any_one_of_them_the_program_computes_the_same():
    names = looked_up_names()
    assert len(names) > 12 and "torch.ops.mkldnn._linear_pointwise" in names
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *names]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
