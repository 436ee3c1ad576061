"""Components whose blocks stay on the host, or in their file, and are copied to the device when they are computed."""

from dataclasses import replace

import torch

from functional_sd3.core import tree
from functional_sd3.core.computation import Computation
from functional_sd3.core.types import Params
from functional_sd3.formats import default_dtype
from functional_sd3.formats.default_dtype import Dtype
from functional_sd3.layouts.components import SPECS, Config
from functional_sd3.parallel import offload
from functional_sd3.pipeline.components import Components, fetch

NAMES = ("clip_l", "clip_g", "t5", "transformer")
"""The components that have blocks."""
ONCE = "*.modulation.*"
"""A third of a transformer, which a run needs once (`mmdit.modulations`)."""


def swap_blocks(
    components: Components,
    config: Config,
    count: int,
    device: torch.device | str,
    *,
    dtype: Dtype = None,
) -> tuple[Components, Config]:
    """Components on the device but for the last `count` blocks of each, and a config by which these are copied there.

    components: on the host, of `weights.fetcher(path, dtype="stored")` mapped from their files: only one is held at a
    time, so `generate` is given `offload=True`. count: at most the blocks of the deepest component; one that has fewer
    keeps none on the device. The layers that make the transformer's modulations stay on the host with 0 blocks too.
    dtype: of the computation, as in `weights.load`. On a CPU weights stored in it are computed where they are mapped,
    and others are converted a block at a time. On a GPU the next block is copied while one is computed.

        mapped = weights.fetcher(path, dtype="stored")
        components, config = swap_blocks(mapped, weights.outline(path).config, 24, "cuda")
        generate(components, config, tokenizers, prompts, key, offload=True)

    Raises ValueError for a count that is negative or more than the blocks of every component.
    """
    check_count(config, count)
    device = torch.device(device)
    copies = {name: offload.Copies(device, device.type == "cuda") for name in NAMES}

    def swapped(name: str) -> Params:
        for each in copies.values():
            # Its blocks are dropped before the next component is read; a caller that holds them may still use them.
            each.follow((), each.dtype)
        params = fetch(components, name)
        computed = _computed(params, dtype, device)
        if name not in copies:
            return tree.to(tree.cast(params, computed) if computed else params, device)
        once = name == "transformer"
        kept = offload.keep(
            params, min(count, len(params["blocks"])), device, dtype=computed, host=ONCE if once else (), pin=once
        )
        copies[name].follow(kept["blocks"], computed)
        return kept

    computations = {name: replace(_of(config, name), materialize=each) for name, each in copies.items()}
    return swapped, replace(config, computations={**config.computations, **computations})


def check_count(config: Config, count: int, name: str = "count") -> None:
    """Raises ValueError unless the last `count` blocks of a component can stay on the host, by its deepest component.

    name: of the argument or option that gives the count.
    """
    depths = {
        component: len(SPECS[component](sizes)["blocks"])
        for component in NAMES
        if (sizes := getattr(config, component))
    }
    offload.check_count(count, depths, name)


def _of(config: Config, name: str) -> Computation:
    return config.computations.get(name, Computation())


def _computed(params: Params, dtype: Dtype, device: torch.device) -> torch.dtype | None:
    """The dtype that floats of 16 or more bits are computed in; None for their own."""
    kinds = {leaf.dtype for leaf in tree.leaves(params) if leaf.is_floating_point() and leaf.dtype.itemsize > 1}
    return default_dtype.choose(dtype, kinds, device)
