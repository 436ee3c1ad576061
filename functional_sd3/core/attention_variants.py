"""Forms of joint attention for `attend=` of `mmdit.apply`: over a window, linear, with cached keys and values.

Each is a function of streams, of which the first is the image, to one tensor (batch, heads, tokens, head_dim) a stream,
None for one without queries, as `attention.joint_attention` is; for a block's second attention there is one stream.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sd3.core.attention import Stream, joint_attention

Attend = Callable[[Sequence[Stream]], list[Tensor | None]]


def windowed(size: tuple[int, int], radius: int) -> Attend:
    """Joint attention in which an image token attends, of the image, only to tokens within `radius` rows and columns.

    size: height and width of the image in tokens. The image attends to all tokens of the other streams, and these to
    all. Local attention (Parmar et al. 2018, "Image Transformer", arXiv:1802.05751) by a mask over all tokens.
    """
    if radius < 0:
        raise ValueError(f"radius {radius} of windowed attention must be at least 0")
    return partial(_windowed, size, radius)


def linear(streams: Sequence[Stream]) -> list[Tensor | None]:
    """Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236): f(q) (f(k)^T v) / (f(q) sum f(k)), f = elu + 1.

    Time and memory linear in the tokens. Not what a model with softmax attention was trained with.
    """
    key = torch.cat([stream.key for stream in streams], dim=2)
    value = torch.cat([stream.value for stream in streams], dim=2)
    features = F.elu(key) + 1
    summary, total = features.transpose(-1, -2) @ value, features.sum(2, keepdim=True).transpose(-1, -2)

    def attended(query: Tensor) -> Tensor:
        features = F.elu(query) + 1
        return (features @ summary) / (features @ total)

    return [None if stream.query is None else attended(stream.query) for stream in streams]


def cached(memory: Stream) -> Attend:
    """Joint attention to the keys and values of `memory` too, each (1 or batch, heads, tokens, head_dim).

    Of another image, for a shared style (Hertz et al. 2023, arXiv:2312.02133), or of an earlier step.
    """
    return partial(_cached, memory)


def _windowed(size: tuple[int, int], radius: int, streams: Sequence[Stream]) -> list[Tensor | None]:
    height, width = size
    image, *others = streams
    if image.key.shape[2] != height * width:
        raise ValueError(f"windowed attention is for {height} x {width} tokens, but the image has {image.key.shape[2]}")
    index = torch.arange(height * width, dtype=torch.int64, device=image.key.device)
    rows, columns = index // width, index % width
    near = ((rows[:, None] - rows).abs() <= radius) & ((columns[:, None] - columns).abs() <= radius)
    queries = sum(stream.query.shape[2] for stream in others if stream.query is not None)
    keys = sum(stream.key.shape[2] for stream in others)
    return joint_attention(streams, mask=F.pad(near, (0, keys, 0, queries), value=True))


def _cached(memory: Stream, streams: Sequence[Stream]) -> list[Tensor | None]:
    batch = streams[0].key.shape[0]
    key, value = (x.expand(batch, *x.shape[1:]) for x in (memory.key, memory.value))
    return joint_attention([*streams, Stream(None, key, value)])[:-1]
