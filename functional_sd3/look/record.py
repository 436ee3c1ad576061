"""Record of a run for `look`, as tensors and plain values: tokens, states, predictions, velocities, maps, times."""

from typing import Any, NamedTuple

from torch import Tensor

from functional_sd3.look.tokens import Prompt


class Evaluation(NamedTuple):
    """One evaluation of the guided velocity. Norms are root mean squares over the elements, () each, float32."""

    step: int
    t: Tensor
    norms: dict[str, Tensor]
    """Norm of each velocity that guidance combines, by its name: "positive", "negative", ..."""
    guided: Tensor
    """Norm of the guided velocity."""
    change: Tensor
    """Norm of the guided velocity less the prompt's: the change by guidance."""


class Group(NamedTuple):
    """Tokens of the context whose attention is summed: those of a word, or all that belong to no word."""

    stream: str
    """"clip" or "t5"."""
    word: int | None
    """Index into `Prompt.words`; None for start, end and padding."""


class Attention(NamedTuple):
    """Attention between the image's tokens and groups of the prompt's, the mean over heads (`maps.WordMaps`).

    to_words, from_words: (steps, blocks, groups, height, width) in tokens of the image, float32; the latter is NaN in a
    block whose context has no queries. image: (steps, blocks, height, width), how much an image token receives from the
    image. For every image token `to_words` over all groups and `image` sum to 1.
    """

    groups: tuple[Group, ...]
    steps: tuple[int, ...]
    """Steps, from 0: the maps are of the state that each starts from."""
    blocks: tuple[int, ...]
    to_words: Tensor
    from_words: Tensor
    image: Tensor


class Frames(NamedTuple):
    """Images decoded on the way, (frames, 3, height, width) in [0, 1]: of the state and of the predicted data."""

    steps: tuple[int, ...]
    states: Tensor
    denoised: Tensor


class Record(NamedTuple):
    """Record of the run of one image. Latents are normalised, float32, (..., channels, height / 8, width / 8)."""

    prompt: Prompt
    negative: str
    image: Tensor
    """(3, height, width) in [0, 1], to the bit that of `pipeline.generate`."""
    times: Tensor
    """(steps + 1,): t = sigma, from 1 (noise) to 0."""
    states: Tensor
    """(steps + 1, ...): x_t at `times`; the last is what is decoded."""
    denoised: Tensor
    """(steps, ...): the data x_0 = x_t - t v that each step predicts at its start."""
    velocities: Tensor
    """(steps, ...): the velocity v = (x_t - x_0) / t at the start of each step."""
    frames: Frames
    evaluations: tuple[Evaluation, ...]
    """Evaluations in order; those of steps that a cache left out are missing."""
    attention: Attention | None
    seconds: dict[str, float]
    """Wall time of each part, in order."""
    step_seconds: tuple[float, ...]
    settings: dict[str, Any]
    """Settings of the run: method, steps, guidance, size, parameters of the transformer, dtype and device."""
    notes: tuple[str, ...]
    """Sentences on what is not shown, and why."""
