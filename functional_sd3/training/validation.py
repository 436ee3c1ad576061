"""Validation: the flow loss of held-out rows at fixed times and fixed noise, so that it is comparable between steps."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Params, Tree
from functional_sd3.training.objectives.types import Loss, Metrics

TIMES = tuple((index + 0.5) / 10 for index in range(10))
"""Times of the loss: the middles of the intervals whose training losses the log has as `bin_0` and on."""
NAMES = ("validation", *(f"validation_{index}" for index in range(len(TIMES))))
"""Columns of the log: the mean over `TIMES`, and the loss at each."""
ABSENT: dict[str, Tensor | float] = dict.fromkeys(NAMES, math.nan)
"""The columns of a step that is not validated."""


def validator(
    loss: Loss, inputs: Callable[[Tensor], Tree], buckets: Sequence[int], batch: int, key: Key, *, views: int = 1
) -> Callable[[Params], Metrics]:
    """params -> the mean loss of a set of images at every one of `TIMES`, and the mean of those, by `NAMES`.

    inputs: samples, as in `training_set.Latents.fetch` -> their batch, of one bucket, of at most `batch` samples.
    buckets: the number of each image's bucket; views: of each image, of which the first is taken. Image i has the noise
    of `fold_in(fold_in(key, time), i)` at every call, whatever the batch.
    """
    count = len(buckets)
    parts = [
        rows[start : start + batch]
        for bucket in sorted(set(buckets))
        for rows in [[row for row in range(count) if buckets[row] == bucket]]
        for start in range(0, len(rows), batch)
    ]

    def validate(params: Params) -> Metrics:
        sums = [torch.zeros((), dtype=torch.float32, device="cpu")] * len(TIMES)
        with torch.no_grad():
            for part in parts:
                rows = torch.tensor(part, dtype=torch.int64, device="cpu")
                entries = inputs(rows * views)
                device = entries["latents"].device
                for index, time in enumerate(TIMES):
                    keys = prng.fold_in(prng.fold_in(key, index), rows).to(device)
                    t = torch.full((len(part),), time, dtype=torch.float32, device=device)
                    value, _ = loss(params, {**entries, "t": t}, keys)
                    sums[index] = sums[index].to(value) + len(part) * value
        losses = [total / count for total in sums]
        return dict(zip(NAMES, [torch.stack(losses).mean(), *losses], strict=True))

    return validate
