"""Functions as operators of PyTorch: one node of a compiled graph.

They have no derivatives of their own, which would silently be zero: only autograd functions with rules call them, below
autograd. Not by `torch.library.custom_op`, whose first call imports the compiler.
"""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("functional_sd3", "DEF")


def define(name: str, signature: str, function: Callable[..., object], like: Callable[..., object]) -> Any:
    """The operator of a function; `like` gives empty tensors of its results' shapes for its arguments."""
    _library.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"functional_sd3::{name}", like, lib=_library)
    return getattr(torch.ops.functional_sd3, name)
