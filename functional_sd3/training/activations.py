"""Bytes that autograd keeps of a block for its backward pass, measured on small ones and scaled to any size.

Every tensor of a block has a size of samples x tokens x width, or samples x width, so that three measurements on two
heads give the bytes of a block of any width. Blocks of processes that divide heads or tokens are measured by what one
of them computes, its exchanges replaced by copies.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functional_sd3 import lora
from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.core.attention import Stream, joint_attention
from functional_sd3.core.types import Params, Tree
from functional_sd3.image import vae
from functional_sd3.parallel import tensor
from functional_sd3.parallel.mesh import Mesh
from functional_sd3.text import clip, t5
from functional_sd3.text.clip import block as clip_block
from functional_sd3.training import objectives
from functional_sd3.transformer import joint_block

Measured = dict[tuple, list[float]]
"""Bytes per sample and image token, per sample and context token, and per sample, of width 1, by kinds of blocks."""


class Kind(NamedTuple):
    """A joint block: with a second attention, the last one; what learns of it, a LoRA of a rank too; whether what its
    modulations are computed from has gradients; the dtype of the computation; and over how many processes its tokens
    and its heads are divided."""

    dual: bool
    last: bool
    learns: Literal["parameters", "lora", "nothing"]
    rank: int
    is_conditioned: bool
    dtype: torch.dtype
    sequence: int = 1
    tensor: int = 1


def of_block(sizes: Any, kind: Kind, counts: tuple[int, int, int], measured: Measured) -> int:
    """Bytes of a joint block of the transformer, or of a ControlNet, its parameters not counted.

    counts: samples, this process's tokens of the image and those of the context. measured: what is known already.
    """
    divides = sizes.heads % kind.sequence == 0
    name = (kind, sizes.head_dim, sizes.qk_norm, divides)
    if name not in measured:
        heads = kind.tensor * (2 * kind.sequence if divides else 2)
        width = heads * sizes.head_dim
        rows = torch.tensor([[b * i, b * c, b] for b, i, c in _PROBES], dtype=torch.float64, device="cpu")
        kept = [_joint_block(heads, sizes.head_dim, sizes.qk_norm, kind, divides, *probe) for probe in _PROBES]
        sums = torch.tensor(kept, dtype=torch.float64, device="cpu")
        measured[name] = (torch.linalg.solve(rows, sums) / width).tolist()
    batch, image, context = counts
    per_image, per_context, per_sample = measured[name]
    return int(batch * (image * per_image + context * per_context + per_sample) * sizes.width)


_PROBES = ((2, 64, 32), (2, 144, 32), (2, 64, 96))
"""Samples, image and context tokens of three measurements, from which the three factors follow."""


def of_encoder_block(sizes: clip.Config | t5.Config, batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a block of a text encoder through which gradients flow to what learns before it."""
    if isinstance(sizes, clip.Config):
        width = 2 * sizes.width // sizes.heads
        block = _zeros(clip_block.spec(width, width * sizes.mlp_width // sizes.width, 1), dtype)
        x = torch.zeros(1, tokens, width, dtype=dtype, device="cpu").requires_grad_()
        kept = saved_bytes(
            lambda: clip_block.apply(block, x, 2, sizes.activation, sizes.eps, causal=True), tree.leaves(block)
        )
    else:
        width = 2 * sizes.head_dim
        small = replace(sizes, heads=2, width=width, mlp_width=width * sizes.mlp_width // sizes.width, layers=1)
        params = _zeros(t5.spec(small), dtype)
        params["embedding"]["weight"].requires_grad_()
        ids = torch.zeros(1, tokens, dtype=torch.int64, device="cpu")
        kept = saved_bytes(lambda: t5.apply(params, small, ids), tree.leaves(params))
    return int(batch * kept * sizes.width / width)


def of_autoencoder(sizes: vae.Config, batch: int, side: int, dtype: torch.dtype | None, *, decoder_only: bool) -> int:
    """Bytes of the autoencoder's objective for images of `side` pixels: everything in it has a size in pixels."""
    least = vae.factor(sizes) * 8
    params = _zeros(vae.spec(sizes), torch.float32)
    for name, part in params.items():
        for leaf in tree.leaves(part):
            leaf.requires_grad_(name == "decoder" or not decoder_only)
    loss = objectives.vae_loss(sizes, dtype=dtype)
    inputs = {"images": torch.zeros(1, 3, least, least, dtype=torch.float32, device="cpu")}
    kept = saved_bytes(lambda: loss(params, inputs, prng.split(prng.key(0), 1)), tree.leaves(params))
    return int(kept * batch * (side / least) ** 2)


def saved_bytes(run: Callable[[], Any], own: Any) -> int:
    """Bytes of the storages that autograd keeps of a run; own: tensors that are not counted."""
    known = {leaf.untyped_storage().data_ptr() for leaf in own}
    saved: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values())


def _joint_block(
    heads: int, head_dim: int, qk_norm: bool, kind: Kind, divides: bool, batch: int, image: int, context: int
) -> int:
    dtype, width = kind.dtype, heads * head_dim
    spec = joint_block.spec(width, head_dim, qk_norm=qk_norm, dual=kind.dual, last=kind.last)
    if kind.tensor > 1:
        spec = _part(spec, kind.tensor, heads)
    nested = {"transformer": {"blocks": [spec]}}
    params = _zeros(nested, dtype)
    learned: Params = params
    if kind.learns == "lora":
        learned = _zeros(lora.spec(nested, kind.rank, "*.blocks.*attention*"), torch.float32)
    if kind.learns != "nothing":
        learned = tree.map(lambda leaf: leaf.requires_grad_(), learned)
    whole = lora.apply(params, learned, lazy=True) if kind.learns == "lora" else learned
    block = whole["transformer"]["blocks"][0]

    def stream(tokens: int) -> Tensor:
        return torch.zeros(batch, tokens, width, dtype=dtype, device="cpu").requires_grad_()

    streams = {"image": stream(image), "context": stream(context)}
    condition = torch.zeros(batch, width, dtype=dtype, device="cpu").requires_grad_(kind.is_conditioned)
    attend = None if kind.sequence == 1 else partial(_exchanged, kind.sequence, divides)
    run = partial(joint_block.apply, block, heads // kind.tensor, streams, condition, attend=attend)
    return saved_bytes(run, tree.leaves([params, learned]))


def _part(spec: Tree, count: int, heads: int) -> Tree:
    """A process's part of a block by heads and hidden features; modulations, which are put together, whole."""
    mesh = Mesh({"data": 1, "fsdp": 1, "guidance": 1, "sequence": 1, "tensor": count})
    part = tensor.part_spec(spec, mesh, heads=heads)
    return {name: {**part[name], "modulation": stream["modulation"]} for name, stream in spec.items()}


def _exchanged(count: int, divides: bool, streams: list[Stream]) -> list[Tensor | None]:
    """The attention of `parallel.sequence` with copies of the size of what is exchanged."""
    image, *others = streams

    def tokens_for_heads(x: Tensor) -> Tensor:
        return x.clone().reshape(x.shape[0], x.shape[1] // count, -1, x.shape[3])

    def own_heads(x: Tensor) -> Tensor:
        return x[:, : x.shape[1] // count].clone()

    if not divides:
        keys = Stream(image.query, image.key.repeat(1, 1, count, 1), image.value.repeat(1, 1, count, 1))
        return joint_attention([keys, *others])
    own = [_each(image, tokens_for_heads), *(_each(stream, own_heads) for stream in others)]
    attended, *rest = joint_attention(own)
    assert attended is not None and image.query is not None
    whole = [None if each is None else each.repeat(1, count, 1, 1) for each in rest]
    return [attended.clone().reshape(image.query.shape), *whole]


def _each(stream: Stream, change: Callable[[Tensor], Tensor]) -> Stream:
    return Stream(None if stream.query is None else change(stream.query), change(stream.key), change(stream.value))


def _zeros(spec: Tree, dtype: torch.dtype) -> Params:
    return specs.map_params(lambda path, param: torch.zeros(param.shape, dtype=dtype, device="cpu"), spec)
