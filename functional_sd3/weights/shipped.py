"""Where the weights that come with the program are."""

from pathlib import Path


def folder(name: str = "tiny") -> Path:
    """The folder of shipped weights: inside an installed package, or in `params/` of a checkout.

    Raises FileNotFoundError where the installation lacks it.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "params" / name, package.parent / "params" / name):
        if (candidate / "model_index.json").is_file():
            return candidate
    raise FileNotFoundError(
        2, f"the shipped weights {name!r} are not installed; pass --params DIR", None
    )
