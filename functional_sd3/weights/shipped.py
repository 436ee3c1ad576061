"""Location of the weights that are shipped with the package."""

import os
from pathlib import Path

NAME = "tiny"
"""The model that is loaded where none is named."""
NAMES = (NAME, "tiny-4")
"""The words that are accepted wherever a model's path is; "tiny-4" draws in four steps without guidance."""


def folder(name: str = NAME) -> Path:
    """The folder of shipped weights: inside an installed package, or in `params/` of a checkout.

    Raises FileNotFoundError where the installation lacks it.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "params" / name, package.parent / "params" / name):
        if (candidate / "model_index.json").is_file():
            return candidate
    raise FileNotFoundError(2, f"the shipped weights {name!r} are not installed; pass --params DIR", None)


def resolve(path: str | os.PathLike) -> Path:
    """The path, or the folder of a shipped model where it is one of `NAMES` and nothing of that name lies here."""
    name = os.fspath(path)
    return folder(name) if name in NAMES and not os.path.lexists(path) else Path(path)
