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
import importlib
from pathlib import Path
from types import ModuleType

__version__ = "0.1.0"


def _modules() -> dict[str, str]:
    """Name -> the module it stands for, as the stub beside this file imports them."""
    statements = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    imports = [statement for statement in statements if isinstance(statement, ast.ImportFrom)]
    return {alias.asname: f"{each.module}.{alias.name}" for each in imports for alias in each.names if alias.asname}


_MODULES = _modules()
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(_MODULES[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
