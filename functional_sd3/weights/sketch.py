"""Sketches of components: digests of their shapes and of the first values of every parameter.

A sketch tells models apart at the cost of a page of each tensor, where a digest of all bytes reads gigabytes: training,
merging a LoRA and pruning change the first rows of some matrix. It does not depend on layout or dtype, as far as the
dtype holds the values, and is no proof against damage within a file.
"""

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from functional_sd3.core import spec as specs
from functional_sd3.formats import files, trees
from functional_sd3.formats.trees import TreePlan
from functional_sd3.weights import assemble

VALUES = 64
"""Values of each parameter that a sketch reads."""
LENGTH = 32
"""Hexadecimal digits of a sketch."""


def sketch(paths: Sequence[str | os.PathLike], *, only: Collection[str], variant: str | None = None) -> dict[str, str]:
    """Component -> sketch, of those of `only` that the paths hold; no component is loaded.

    Raises WeightsError as `weights.load` does, but for values that are not finite.
    """
    _, plans = assemble.plan([Path(path) for path in paths], only, variant)
    return {name: _sketch(plan.tree) for name, plan in plans.items()}


def _sketch(plan: TreePlan) -> str:
    digest = hashlib.sha256()
    for path, param in sorted(specs.paths(plan.spec).items()):
        # Tables that are computed and not learned are stored in some layouts only.
        values = trees.first_values(plan, path, VALUES) if param.trainable else None
        if values is not None:
            digest.update(f"{path} {tuple(param.shape)}\n".encode())
            digest.update(files.raw(values))
    return digest.hexdigest()[:LENGTH]
