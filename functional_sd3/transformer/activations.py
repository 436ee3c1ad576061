"""Activations of the transformer's blocks: recorded, edited, and replayed in another run.

Each is a `block_transform` by index (`mmdit.apply`), a function of what a block returns instead of a hook that is
registered: {"image": (batch, image tokens, width), "context": (batch, context tokens, width)}, in the dtype of the
parameters, before a ControlNet's residuals are added. With guidance the batch has the rows of all conditionings, those
of the prompts first; guidance that leaves out blocks, or takes another model, evaluates the network once more.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from functional_sd3.core.checks import function_name
from functional_sd3.core.computation import OneBlockTransform
from functional_sd3.core.replayed import Replayed

Streams = dict[str, Tensor]
Edit = Callable[[Streams], Mapping[str, Tensor]]


def image_stream(streams: Streams) -> Tensor:
    """The image's tokens (batch, tokens, width)."""
    return streams["image"]


def with_image(image: Tensor) -> Edit:
    """The edit that replaces the image's tokens by `image`, (batch, tokens, width) or what broadcasts to it."""
    return lambda streams: {**streams, "image": image.expand_as(streams["image"])}


def edit_outputs(edit: Edit) -> OneBlockTransform:
    """The transform of a block that returns `edit(streams)` instead of its streams: steering, ablation, probes.

        steered = {3: activations.edit_outputs(lambda streams: {**streams, "image": streams["image"] + direction})}
        images = pipeline.generate(*model, prompt, key, block_transform=steered)

    What the edit leaves out of the streams stays as it is. Raises ValueError where it returns another name, or a tensor
    of another shape, dtype or device. Differentiable in whatever the edit reads; it may be mapped and compiled.
    """

    def transform(apply: Callable[..., Streams]) -> Callable[..., Streams]:
        def edited(*arguments: Any, **options: Any) -> Streams:
            streams = apply(*arguments, **options)
            return {**streams, **_checked(edit, streams)}

        return edited

    return transform


def record(
    run: Callable[[Mapping[int, OneBlockTransform]], Any],
    blocks: Collection[int],
    *,
    keep: Callable[[Streams], Any] = image_stream,
) -> tuple[Any, dict[int, list[Any]]]:
    """(run(block_transform), {block: [keep(streams) of each of its calls]}): activations beside what is computed.

        velocity, kept = activations.record(lambda each: mmdit.apply(..., block_transform=each), blocks=[1, 3])
        kept[3][0]  # (batch, image tokens, width), after block 3

    keep: what is kept of the streams that a block returns. A block is called once for each evaluation of the network in
    `run`, in order. Under a transform of torch.func the kept tensors are those of its level: return them from the
    function that is transformed.
    """
    kept: dict[int, list[Any]] = {block: [] for block in blocks}

    def keeping(block: int) -> OneBlockTransform:
        def edit(streams: Streams) -> Streams:
            kept[block].append(keep(streams))
            return streams

        return edit_outputs(edit)

    return run({block: keeping(block) for block in kept}), kept


def replay(
    run: Callable[[Mapping[int, OneBlockTransform]], Any],
    recorded: Mapping[int, Sequence[Any]],
    *,
    use: Callable[[Any], Edit] = with_image,
) -> Any:
    """run(block_transform), in which the n-th call of a block has its outputs edited by `use` of the n-th that was
    recorded of it: activation patching (Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262).

    recorded: of `record`. Raises ValueError where the run calls a block more or less often than the recorded one did.
    """
    replayed = Replayed(recorded, "outputs")

    def replaying(block: int) -> OneBlockTransform:
        return edit_outputs(lambda streams: use(replayed.next_of(block))(streams))

    result = run({block: replaying(block) for block in recorded})
    replayed.check_used()
    return result


def _checked(edit: Edit, streams: Streams) -> Mapping[str, Tensor]:
    edited: Any = edit(streams)
    if not isinstance(edited, Mapping) or edited.keys() - streams.keys():
        what = list(edited) if isinstance(edited, Mapping) else type(edited).__name__
        raise ValueError(f"the edit {function_name(edit)} returned {what}; it must return some of {list(streams)}")
    for name, own in edited.items():
        like = streams[name]
        if not isinstance(own, Tensor) or (own.shape, own.dtype, own.device) != (like.shape, like.dtype, like.device):
            what = f"{own.dtype} {list(own.shape)} on {own.device}" if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(
                f"the edit {function_name(edit)} returned {what} for {name!r}; it must return {like.dtype} "
                f"{list(like.shape)} (batch, tokens, width) on {like.device}"
            )
    return edited
