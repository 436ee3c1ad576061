"""Caches of a network's blocks: the change that they make to the image is reused where it would hardly differ.

First-block cache (ParaAttention, and diffusers' `FirstBlockCacheConfig`) and TeaCache (Liu et al. 2024,
arXiv:2411.19108), as a `block_transform` of one evaluation: the network itself does not know of them. The reused value
is the sum of the changes of the blocks, so the residuals of ControlNets, which are added between blocks, stay exact.

The decision is that of each sample, over all its rows (the prompt's and the negative prompt's). Where samples differ
all are computed, and `torch.where` chooses: a sample does not depend on its batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3.core import decisions, layers
from functional_sd3.core.decisions import Decision
from functional_sd3.core.types import Tree
from functional_sd3.transformer import joint_block

BlockTransform = Callable[[Callable], Callable]


class Evaluation:
    """One evaluation of a network: `transform` is its block transform, and `state` its state afterwards.

    state: {} before the first evaluation. after_first: True to decide by the change of the first block (first-block
    cache), False by its modulated input (TeaCache). is_computed: True to compute the blocks whatever the values.
    samples: the rows of the batch are that many samples, once for each branch of guidance. An object is used once.
    """

    def __init__(
        self,
        state: Tree,
        threshold: float,
        *,
        after_first: bool,
        samples: int,
        is_computed: bool,
        polynomial: Sequence[float] = (1.0, 0.0),
    ) -> None:
        self._before, self._threshold, self._after_first = state, threshold, after_first
        self._samples, self._is_computed, self._polynomial = samples, is_computed or not state, polynomial
        self._calls = 0
        self._skip: Tensor | None = None
        self._decision: Decision = decisions.NONE
        self._signal: Tensor | None = None
        self._moved: Tensor | None = None
        self._change: Tensor | None = None

    def transform(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """`apply` of `joint_block.apply` with the blocks that are skipped left out."""

        def block(params: Tree, heads: int, streams: Tree, modulation: Tree, *rest: Any, **options: Any) -> Tree:
            is_first, self._calls = self._calls == 0, self._calls + 1
            run = lambda: apply(params, heads, streams, modulation, *rest, **options)  # noqa: E731
            if is_first and self._after_first:
                after = run()
                self._decide(after["image"] - streams["image"])
                return self._reused(after)
            if is_first:
                self._decide(modulated_input(params, streams["image"], modulation))
                streams = self._reused(streams)
            if self._decision.all:
                return streams
            after = run()
            change = after["image"] - streams["image"]
            self._change = change if self._change is None else self._change + change
            if self._decision.any:
                after = {**after, "image": torch.where(_rows(self._skip, change), streams["image"], after["image"])}
            return after

        return block

    @property
    def state(self) -> Tree:
        """The state after the evaluation; as before where no block was called."""
        if self._signal is None:
            return self._before
        change = torch.zeros_like(self._signal) if self._change is None else self._change
        none_moved = self._signal.new_zeros(len(change), dtype=torch.float32)
        after = {"signal": self._signal, "moved": none_moved, "change": change}
        if not self._decision.any:
            return after
        # The modulated input is compared with that of the evaluation before, the first block's change with that of the
        # last whole one.
        kept = {**self._before, "moved": self._moved, **({} if self._after_first else {"signal": self._signal})}
        if self._decision.all:
            return kept
        return {name: torch.where(_rows(self._skip, after[name]), kept[name], after[name]) for name in after}

    def _decide(self, signal: Tensor) -> None:
        self._signal = signal
        if not self._before:
            return
        distance = _of_samples(relative_distance(signal, self._before["signal"]), self._samples)
        if not self._after_first:
            distance = self._before["moved"] + evaluate_polynomial(self._polynomial, distance)
        self._moved = distance
        if not self._is_computed:
            self._skip = distance < self._threshold
            self._decision = decisions.read(self._skip)

    def _reused(self, streams: Tree) -> Tree:
        """The streams with the change of the last whole evaluation in the rows that are skipped."""
        if not self._decision.any:
            return streams
        image, change = streams["image"], self._before["change"]
        return {**streams, "image": torch.where(_rows(self._skip, image), image + change, image)}


def modulated_input(params: Tree, image: Tensor, modulation: Tree) -> Tensor:
    """Input (batch, tokens, width) of a block's attention: the image's layer norm, shifted and scaled.

    A modulation that is a conditioning vector (batch, width) goes through the block's layer "modulation" first.
    """
    if isinstance(modulation, Tensor):
        modulation = joint_block.modulate({"image": params["image"]}, modulation)
    shift, scale = joint_block.split_modulation(modulation["image"], image.shape[-1])[:2]
    return layers.modulate(joint_block.norm(image), shift, scale)


def relative_distance(values: Tensor, before: Tensor) -> Tensor:
    """sum |values - before| / sum |before| of each row, (rows,) float32, without derivative."""
    values, before = values.detach().float(), before.detach().float()
    return (values - before).abs().flatten(1).sum(1) / before.abs().flatten(1).sum(1).clamp(min=1e-20)


def evaluate_polynomial(coefficients: Sequence[float], d: Tensor) -> Tensor:
    """The polynomial at d (rows,), by Horner's rule, at least 0: a fitted one may fall below where it was not
    fitted."""
    total = torch.zeros_like(d)
    for coefficient in coefficients:
        total = total * d + coefficient
    return total.clamp(min=0)


def fit(distances: Tensor, changes: Tensor, degree: int = 2) -> tuple[float, ...]:
    """Coefficients, the highest power first and 0 for the constant, of the least-squares polynomial from distances of
    modulated inputs to relative changes of the output, both (n,); at least 0, so that it never falls.

    Raises ValueError for fewer pairs than `degree`.
    """
    from scipy import optimize  # slow to import, and needed here alone

    if len(distances) < degree:
        raise ValueError(f"{len(distances)} pairs are too few for a polynomial of degree {degree}")
    d = distances.double().cpu()
    powers = torch.stack([d**power for power in range(degree, 0, -1)], 1)
    solution, _ = optimize.nnls(powers.numpy(), changes.double().cpu().numpy())
    return (*solution.tolist(), 0.0)


def _of_samples(distance: Tensor, samples: int) -> Tensor:
    """The largest distance among the rows of each sample, for all its rows: (rows,) -> (rows,)."""
    branches = len(distance) // samples
    return distance.reshape(branches, samples).amax(0).repeat(branches)


def _rows(condition: Tensor | None, like: Tensor) -> Tensor:
    assert condition is not None
    return condition.reshape(-1, *(1,) * (like.ndim - 1))
