"""Orders of a set as functions of the step: the rows of every batch, where samples are of several sizes or views.

The rows of a step are those of the whole batch, whatever number of processes share it: each takes its own part of them,
so that a run is the same on any number of processes. `loop.order` is the order of samples of one size.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key
from functional_sd3.training import loop

_MAX_NAMED = 3


class Rows(NamedTuple):
    """Rows of a batch and, for each, how often the order went through its bucket before; both int64 (batch,)."""

    rows: Tensor
    passes: Tensor


def of_one_size(key: Key, batch: int, count: int) -> Callable[[int], Rows]:
    """step -> `Rows` of the whole batch: the rows of `loop.order`, with their epochs."""
    order = loop.order(key, batch, count)
    places = torch.arange(batch, dtype=torch.int64, device="cpu")
    return lambda step: Rows(order(step), (step * batch + places) // count)


def of_buckets(key: Key, batch: int, buckets: Sequence[int]) -> Callable[[int], Rows]:
    """step -> `Rows` of the whole batch, all of one bucket. buckets: the number of every row's.

    - Each bucket goes through its rows in passes, each an order of its own: no row comes again before all others of its
      bucket have come. A batch that reaches the end of a pass continues with the next and holds no row twice.
    - Epoch e has, of a bucket of n rows, floor((e + 1) n / batch) - floor(e n / batch) batches, in a random order.
      So after e epochs every row has come e or e - 1 times, whatever the size of its bucket.

    A function of the key and the step alone. Raises ValueError for a bucket with fewer rows than a batch.
    """
    members = _members(buckets)
    _check_rows(members, batch)
    counts = [len(rows) for rows in members]
    passes = [_passes(prng.fold_in(key, index + 1), batch, len(rows)) for index, rows in enumerate(members)]
    mixing = prng.fold_in(key, 0)

    def batches_before(epoch: int) -> list[int]:
        return [epoch * count // batch for count in counts]

    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> list[tuple[int, int]]:
        """(bucket, number of its batch) of the steps of an epoch."""
        starts, ends = batches_before(epoch), batches_before(epoch + 1)
        turns = [index for index, (start, end) in enumerate(zip(starts, ends, strict=True)) for _ in range(start, end)]
        mixed = [turns[place] for place in prng.permutation(prng.fold_in(mixing, epoch), len(turns)).tolist()]
        seen = list(starts)
        order = []
        for bucket in mixed:
            order.append((bucket, seen[bucket]))
            seen[bucket] += 1
        return order

    def rows_of(step: int) -> Rows:
        epoch = _last(lambda epoch: sum(batches_before(epoch)) <= step, step * batch // sum(counts))
        bucket, number = epoch_order(epoch)[step - sum(batches_before(epoch))]
        places = torch.arange(number * batch, (number + 1) * batch, dtype=torch.int64, device="cpu")
        turns, within = places // counts[bucket], places % counts[bucket]
        parts = [passes[bucket](turn)[within[turns == turn]] for turn in turns.unique().tolist()]
        return Rows(members[bucket][torch.cat(parts)], turns)

    return rows_of


def with_views(order: Callable[[int], Rows], key: Key, views: int) -> Callable[[int], Tensor]:
    """step -> samples, int64 (batch,), where each row is stored in `views` views, crops or mirror images: number
    row * views + view. A row comes in all of its views, one a pass, before it comes in one again."""
    if views == 1:
        return lambda step: order(step).rows

    def samples(step: int) -> Tensor:
        rows, passes = order(step)
        # Rows start with different views, each at random.
        start = prng.randint(prng.fold_in(key, rows), (), 0, views)
        return rows * views + (start + passes) % views

    return samples


def _members(buckets: Sequence[int]) -> list[Tensor]:
    numbers = torch.tensor(list(buckets), dtype=torch.int64, device="cpu")
    return [torch.nonzero(numbers == bucket)[:, 0] for bucket in sorted(set(buckets))]


def _check_rows(members: Sequence[Tensor], batch: int) -> None:
    small = [f"{len(rows)} in bucket {index}" for index, rows in enumerate(members) if len(rows) < batch]
    if small or not members:
        more = f" and {len(small) - _MAX_NAMED} more" if len(small) > _MAX_NAMED else ""
        raise ValueError(
            f"--batch-size {batch} is more than the images of a bucket ({', '.join(small[:_MAX_NAMED]) or 'none'}"
            f"{more}): a batch is of one bucket and holds no image twice. A smaller --batch-size, or a larger "
            "--bucket-min where the buckets are made, lets every bucket fill a batch"
        )


def _passes(key: Key, batch: int, count: int) -> Callable[[int], Tensor]:
    """number of a pass -> its order of range(count), count >= batch, int64 (count,).

    A batch that spans two passes holds no row twice: the rows that it has from the first are moved,
    in the second, behind those that it takes.
    So a pass depends on the end of the one before, and that on the one before it only where the bucket has less than
    two batches; then up to the last pass that began with a batch.
    """

    def independent(number: int) -> Tensor:
        return prng.permutation(prng.fold_in(key, number), count)

    @functools.lru_cache(maxsize=2)
    def order(number: int) -> Tensor:
        aligned = number - number % (batch // math.gcd(batch, count))
        first = aligned if count < 2 * batch else max(aligned, number - 1)
        current = independent(first)
        for later in range(first + 1, number + 1):
            tail = current[count - (later * count) % batch :] if (later * count) % batch else current[:0]
            current = _moved_behind(independent(later), tail, batch - len(tail))
        return current

    return order


def _moved_behind(order: Tensor, tail: Tensor, head: int) -> Tensor:
    """`order` with none of `tail` among the first `head`."""
    if not len(tail):
        return order
    allowed = torch.nonzero(~torch.isin(order, tail))[:head, 0]
    rest = torch.ones(len(order), dtype=torch.bool, device=order.device)
    rest[allowed] = False
    return torch.cat((order[allowed], order[rest]))


def _last(holds: Callable[[int], bool], start: int) -> int:
    """The last number for which a condition holds, that holds up to some number and from there on no more; near
    `start`."""
    number = start
    while not holds(number):
        number -= 1
    while holds(number + 1):
        number += 1
    return number
