"""Stable Diffusion 3.5 as composable pure functions over explicit parameter trees.

    import functional_sd3 as sd3

    model = sd3.weights.load(sd3.weights.shipped.folder())
    images = sd3.pipeline.generate(
        model.params, model.config, model.tokenizers, "a large red circle on a white background", sd3.prng.key(0)
    )

A module is imported when its name is first used, so that a program pays for what it uses. The names are those that
`__init__.pyi` imports.

Every component has a frozen `Config`, `spec(config)`, `init(key, config)` and a pure `apply(params, config, ...)`.
"""

import ast
import functools
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

__version__ = "0.1.0"


def _modules() -> dict[str, str]:
    """Name -> the module that it is an alias of, as the stub beside this file imports them."""
    statements = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    imports = [statement for statement in statements if isinstance(statement, ast.ImportFrom)]
    return {alias.asname: f"{each.module}.{alias.name}" for each in imports for alias in each.names if alias.asname}


_MODULES = _modules()
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        # With name and obj an interpreter suggests the nearest name.
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    module = importlib.import_module(_MODULES[name])
    # Bound from now on, as Python binds the modules of a package itself: `_Package.__setattr__`.
    setattr(sys.modules[__name__], name, module)
    return module


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _with_public_dir(module: ModuleType) -> ModuleType:
    """The module, whose `dir` and `help` have its public names alone, those that it exports again too."""
    vars(module)["__dir__"] = functools.partial(_public_names, module)
    if not hasattr(module, "__all__") and "__getattr__" not in vars(module):
        vars(module)["__getattr__"] = functools.partial(_public_attribute, module)
    return module


def _public_attribute(module: ModuleType, name: str) -> list[str]:
    """`__all__`, which `help` reads, from the source when it is first needed."""
    if name != "__all__":
        message = f"module {module.__name__!r} has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=module)
    return _public_names(module)


def _public_names(module: ModuleType) -> list[str]:
    """`__all__`, or the names that a module binds itself or imports as themselves, without the private ones."""
    if "__all__" in vars(module):
        return sorted(vars(module)["__all__"])
    names = set()
    for statement in _statements(module.__name__):
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            names |= {alias.asname for alias in statement.names if alias.asname and alias.asname == alias.name}
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return sorted(name for name in names if not name.startswith("_"))


def _statements(module: str) -> list[ast.stmt]:
    """The top level of a module's source; nothing is imported but the packages it is in."""
    spec = find_spec(module)
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    return ast.parse(source).body


class _Package(ModuleType):
    """This package; its docstring ends with a line for each module, read from theirs on access."""

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return f"{_DOC}\nModules\n\n" + "".join(f"    {name}: {_summary(name)}\n" for name in __all__)

    def __setattr__(self, name: str, value: object) -> None:
        # Python sets a package that was imported as an attribute, without `__getattr__`.
        super().__setattr__(name, _with_public_dir(value) if isinstance(value, ModuleType) else value)


def _summary(name: str) -> str:
    """The first sentence or line of a module's docstring."""
    text = ast.get_docstring(ast.Module(_statements(_MODULES[name]), [])) or ""
    return " ".join(text.split("\n\n")[0].split())


_DOC = __doc__
sys.modules[__name__].__class__ = _Package
