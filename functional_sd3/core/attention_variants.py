"""Forms of joint attention for `attend=` of `mmdit.apply`: windowed, linear, cached keys and values, given weights.

Each is a function of streams, of which the first is the image, to one tensor (batch, heads, tokens, head_dim) a stream,
None for one without queries, as `attention.joint_attention` is; for a block's second attention there is one stream.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core.attention import Map, Stream, joint_attention
from functional_sd3.core.replayed import Replayed

Attend = Callable[[Sequence[Stream]], list[Tensor | None]]


@dataclass(frozen=True)
class Windowed:
    """Joint attention in which an image token attends, of the image, only to tokens within `radius` rows and columns.

    size: height and width of the image in tokens. The image attends to all tokens of the other streams, and these to
    all. Local attention (Parmar et al. 2018, "Image Transformer", arXiv:1802.05751) by a mask over all tokens.
    """

    size: tuple[int, int]
    radius: int

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size {self.size} of windowed attention must be (height, width) in tokens")
        if self.radius < 0:
            raise ValueError(f"radius {self.radius} of windowed attention must be at least 0")

    def __call__(self, streams: Sequence[Stream]) -> list[Tensor | None]:
        height, width = self.size
        image, *others = streams
        tokens = image.key.shape[2]
        if tokens != height * width:
            raise ValueError(f"windowed attention is for {height} x {width} tokens, but the image has {tokens}")
        index = torch.arange(tokens, dtype=torch.int64, device=image.key.device)
        rows, columns = index // width, index % width
        near = ((rows[:, None] - rows).abs() <= self.radius) & ((columns[:, None] - columns).abs() <= self.radius)
        queries = sum(stream.query.shape[2] for stream in others if stream.query is not None)
        keys = sum(stream.key.shape[2] for stream in others)
        return joint_attention(streams, mask=F.pad(near, (0, keys, 0, queries), value=True))


def windowed(size: tuple[int, int], radius: int) -> Attend:
    """`Windowed`: joint attention over a window of the image's tokens and all others."""
    height, width = size
    return Windowed((height, width), radius)


def linear(streams: Sequence[Stream]) -> list[Tensor | None]:
    """Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236): f(q) (f(k)^T v) / (f(q) sum f(k)), f = elu + 1.

    Time and memory linear in the tokens. Not what a model with softmax attention was trained with. Sums are at least
    float32: over some thousand tokens those of float16 overflow.
    """
    key = torch.cat([stream.key for stream in streams], dim=2)
    value = torch.cat([stream.value for stream in streams], dim=2)
    dtype = torch.promote_types(value.dtype, torch.float32)
    features = F.elu(key.to(dtype)) + 1
    summary, total = features.transpose(-1, -2) @ value.to(dtype), features.sum(2, keepdim=True).transpose(-1, -2)

    def attended(query: Tensor) -> Tensor:
        features = F.elu(query.to(dtype)) + 1
        return ((features @ summary) / (features @ total)).to(value.dtype)

    return [None if stream.query is None else attended(stream.query) for stream in streams]


@dataclass(frozen=True, eq=False)
class Cached:
    """Joint attention to the keys and values of `memory` too, each (rows, heads, tokens, head_dim).

    Of another image, for a shared style (Hertz et al. 2023, arXiv:2312.02133), or of an earlier step. rows: of the
    batch, or a divisor of it: 1, or those of the prompts alone, which serve each conditioning that guidance evaluates.
    """

    memory: Stream

    def __call__(self, streams: Sequence[Stream]) -> list[Tensor | None]:
        like = streams[0]
        key = _of_batch("cached keys", self.memory.key, like.key).to(like.key.dtype)
        value = _of_batch("cached values", self.memory.value, like.value).to(like.value.dtype)
        if key.shape[3] != like.key.shape[3]:
            raise ValueError(f"cached keys are {key.shape[3]} wide, and those of the streams {like.key.shape[3]}")
        return joint_attention([*streams, Stream(None, key, value)])[:-1]


def cached(memory: Stream) -> Attend:
    """`Cached`: joint attention to the keys and values of `memory` too."""
    return Cached(memory)


def weighted(weights: Map) -> Attend:
    """Attention by given weights to the values of the streams: the queries and keys are not compared.

    weights: of another prompt or step (`attention.maps`), for the same layout with other content (Hertz et al. 2022,
    "Prompt-to-Prompt", arXiv:2208.01626); rows as in `Cached`.
    """
    return partial(_weighted, weights)


def replay(
    run: Callable[[Mapping[int, Attend]], Any],
    recorded: Mapping[int, Sequence[Any]],
    *,
    use: Callable[[Any], Attend] = cached,
) -> Any:
    """run(attend), in which the n-th attention of a block is `use` of the n-th that was recorded of it.

    recorded: of `attention.record` for `cached`, of `attention.maps` for `weighted`. Raises ValueError where the run
    calls a block more or less often than the recorded one did.
    """
    replayed = Replayed(recorded, "attentions")

    def replaying(block: int) -> Attend:
        return lambda streams: use(replayed.next_of(block))(streams)

    result = run({block: replaying(block) for block in recorded})
    replayed.check_used()
    return result


def _weighted(weights: Map, streams: Sequence[Stream]) -> list[Tensor | None]:
    value = torch.cat([stream.value for stream in streams], dim=2)
    tokens = sum(stream.query.shape[2] for stream in streams if stream.query is not None), value.shape[2]
    if weights.weights.shape[-2:] != tokens:
        given, wanted = (" x ".join(map(str, sizes)) for sizes in (weights.weights.shape[-2:], tokens))
        raise ValueError(f"attention weights of {given} tokens are given for {wanted}: encode prompts to one length")
    rows = _of_batch("attention weights", weights.weights, value)
    attended = rows.to(value.dtype) @ value
    return [None if rows is None else attended[:, :, rows] for rows in weights.queries]


def _of_batch(name: str, given: Tensor, like: Tensor) -> Tensor:
    """The rows of `given` (rows, heads, ...) repeated to the batch of `like`, whose heads it must have."""
    rows, batch = len(given), len(like)
    if batch % max(rows, 1) or given.shape[1] != like.shape[1]:
        raise ValueError(
            f"{name} of {rows} rows and {given.shape[1]} heads are given for a batch of {batch} rows (of all that "
            f"guidance evaluates at once) and {like.shape[1]} heads; give 1 row, or those of all the prompts"
        )
    return given if rows == batch else given.repeat(batch // rows, *(1,) * (given.ndim - 1))
