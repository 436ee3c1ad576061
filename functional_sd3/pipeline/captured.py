"""A sampler's whole run as one CUDA graph, replayed for any prompts, noise and guidance scale of one size.

All steps, both branches of guidance and the modulations of all times are in the graph, so that the processor launches
one thing instead of some ten thousand kernels. A graph reads and writes memory of its own: inputs are copied there, and
the result from there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import computation, tree
from functional_sd3.core.types import Params
from functional_sd3.flow.guidance import Guidance
from functional_sd3.flow.ode.method import Method
from functional_sd3.layouts.components import Config
from functional_sd3.pipeline.fields import Conditions
from functional_sd3.pipeline.sampling import sample, sigmas

WARM_UPS = 2
"""Runs before the capture: kernels are chosen, and blocks compiled, in the first."""


def capture(
    params: Params,
    config: Config,
    conditions: Conditions,
    noise: Tensor,
    *,
    steps: int = 28,
    method: Method | str | None = None,
    guidance: Callable[[Tensor], Guidance] | None = None,
    skip_layers: Sequence[int] = (),
    block_transform: computation.BlockTransform | None = None,
) -> "Captured":
    """The run `sample(params, config, conditions, noise, ...)` as a function of (conditions, noise, cfg).

    conditions, noise: of the size that is captured; their values do not matter. guidance: of the scale, a tensor (),
    instead of `guidance.cfg`. method: one with fixed steps that draws no noise. The rest as in `sample`;
    block_transform=transform.compile compiles the blocks first. Where the noise is on a CPU nothing is captured, and
    the function computes the run. It holds `params`, whose memory the graph reads, and one run uses it at a time.
    """
    # Made before the capture, within which nothing is copied from the host.
    times = sigmas(config, noise, steps)
    options: dict[str, Any] = {"times": times, "method": method, "skip_layers": skip_layers}
    options |= {} if block_transform is None else {"block_transform": block_transform}

    def run(inputs: dict[str, Any]) -> Tensor:
        guiding = {"cfg": inputs["cfg"]} if guidance is None else {"guidance": guidance(inputs["cfg"])}
        return sample(params, config, inputs["conditions"], inputs["noise"], **guiding, **options)

    cfg = torch.ones((), dtype=torch.float32, device=noise.device)
    inputs = {"conditions": tree.map(torch.clone, conditions), "noise": noise.clone(), "cfg": cfg}
    return Captured(run, inputs)


class Captured:
    """A captured function of a tree of tensors, as `capture` returns it."""

    def __init__(self, run: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any]) -> None:
        self.run, self.inputs, self.graph = run, inputs, None
        if inputs["noise"].is_cuda:
            self.graph, self.result = _graph_of(run, inputs)

    @torch.no_grad()
    def __call__(self, conditions: Conditions, noise: Tensor, cfg: float | Tensor = 5.0) -> Tensor:
        """Latents, as in `sample`. cfg: a number, or a tensor (). Raises ValueError for tensors of another shape than
        those that were captured."""
        scale = cfg if isinstance(cfg, Tensor) else torch.tensor(cfg, dtype=torch.float32, device="cpu")
        given = {"conditions": conditions, "noise": noise, "cfg": scale}
        held, flat = tree.flatten_paths(self.inputs), tree.flatten_paths(given)
        for path, own in held.items():
            if flat[path].shape != own.shape:
                raise ValueError(
                    f"{path} has shape {list(flat[path].shape)}, and the run was captured for {list(own.shape)}: "
                    "capture another"
                )
        for path, own in held.items():
            own.copy_(flat[path])
        if self.graph is None:
            return self.run(self.inputs)
        self.graph.replay()
        return self.result.clone()


@torch.no_grad()
def _graph_of(run: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of a run, and the tensor in which it leaves its result."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run(inputs)
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(inputs)
    return graph, result
