"""Sequence parallelism: the tokens of one image divided over processes, which meet in the attention alone.

`gathered_attention` (keys and values of all tokens on every process; the scheme of Llama 3's context parallelism, Dubey
et al. 2024, section 3.3.2) works for any number of heads; `ulysses_attention` (Jacobs et al. 2023, "DeepSpeed Ulysses",
arXiv:2309.14509) exchanges tokens for heads and needs as many heads as processes, or a multiple.
The context is whole on every process: it is a tenth of the tokens, and everything but attention is token by token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from functional_sd3.core.attention import Implementation, Stream, joint_attention
from functional_sd3.parallel import collectives
from functional_sd3.parallel.replicated import join, own_part, part_sizes
from functional_sd3.parallel.transport import Group, group_size

Attend = Callable[[list[Stream]], list[Tensor | None]]
"""Attention of a list of streams: one tensor (batch, heads, tokens, head_dim) each, None for one without queries."""


def own(image: Tensor, group: Group) -> Tensor:
    """This process's tokens of an image (batch, tokens, ...) that is the same on all: of 5 on 2 processes, 3 and 2.

    The image must depend on its inputs through `replicated.enter` alone, which sums its gradients over the processes.
    Raises ValueError for fewer tokens than processes.
    """
    return image if group is None else own_part(image, group, 1, token_sizes(image.shape[1], group))


def token_sizes(tokens: int, group: Group) -> tuple[int, ...]:
    """Tokens of each process. Raises ValueError for fewer than processes."""
    count = group_size(group)
    if tokens < count:
        raise ValueError(
            f"an image of {tokens} token{'s' * (tokens != 1)} cannot be divided over sequence={count} processes: there "
            "must be a token for each"
        )
    return part_sizes(tokens, group)


def whole(image: Tensor, group: Group, tokens: int) -> Tensor:
    """The image (batch, tokens, ...) of all processes' tokens, on all of them."""
    return image if group is None else join(image, group, 1, token_sizes(tokens, group))


@dataclass(frozen=True)
class SequenceAttention:
    """Joint attention of streams of which the first, the image, is divided over the processes of a group.

    sizes: tokens of each process. attend: of whole streams instead of `joint_attention`, as which it is called.
    """

    group: Group
    sizes: Sequence[int]
    attend: Attend | None = None
    implementation: Implementation = "sdpa"

    def __call__(self, streams: list[Stream]) -> list[Tensor | None]:
        # Exchanging tokens for heads sends less, and keeps no keys of other heads.
        divides = streams[0].key.shape[1] % group_size(self.group) == 0
        make = ulysses_attention if divides else gathered_attention
        return make(self.group, self.sizes, self.attend, self.implementation)(streams)

    def without_attend(self) -> "SequenceAttention":
        """The same division of `joint_attention`."""
        return replace(self, attend=None)


def attention(
    group: Group, tokens: int, attend: Attend | None = None, implementation: Implementation = "sdpa"
) -> SequenceAttention:
    """Attention of an image of `tokens` divided by `own`: by Ulysses where the heads divide, else gathered."""
    return SequenceAttention(group, token_sizes(tokens, group), attend, implementation)


def gathered_attention(
    group: Group, sizes: Sequence[int], attend: Attend | None = None, implementation: Implementation = "sdpa"
) -> Attend:
    """Attention in which every process has the keys and values of all tokens of the image.

    With an `attend` of its own the queries are gathered too, and each process computes all of it.
    """

    def gathered(streams: list[Stream]) -> list[Tensor | None]:
        image, *others = streams

        def gather(x: Tensor) -> Tensor:
            return collectives.all_gather(x, group, 2, sizes=sizes)

        if attend is None:
            keys = _exchange(image._replace(query=None), gather)
            return joint_attention([keys._replace(query=image.query), *others], implementation=implementation)
        attended, *rest = attend([_exchange(image, gather), *others])
        return [None if attended is None else own_part(attended, group, 2, sizes), *rest]

    return gathered


def ulysses_attention(
    group: Group, sizes: Sequence[int], attend: Attend | None = None, implementation: Implementation = "sdpa"
) -> Attend:
    """Attention in which every process has all tokens of its part of the heads; any `attend` that is head by head.

    Raises ValueError where the number of heads is no multiple of the number of processes.
    """

    def exchanged(streams: list[Stream]) -> list[Tensor | None]:
        image, *others = streams
        heads, count = image.key.shape[1], group_size(group)
        if heads % count:
            raise ValueError(
                f"{heads} heads do not divide over {count} processes: gathered_attention takes any number of them"
            )
        parts = (heads // count,) * count
        own = [_exchange(image, lambda x: collectives.all_to_all(x, group, 1, 2, join_sizes=sizes))]
        for stream in others:
            own.append(_exchange(stream, lambda x: own_part(x, group, 1, parts)))
        attended, *rest = (attend or partial(joint_attention, implementation=implementation))(own)
        if attended is not None:
            attended = collectives.all_to_all(attended, group, 2, 1, split_sizes=sizes)
        return [attended, *(None if each is None else collectives.all_gather(each, group, 1) for each in rest)]

    return exchanged


def _exchange(stream: Stream, exchange: Callable[[Tensor], Tensor]) -> Stream:
    """Exchange of the tensors of a stream, one after the other: all in one would take three times the buffers."""
    query = None if stream.query is None else exchange(stream.query)
    return Stream(query, exchange(stream.key), exchange(stream.value))
