"""Reflow pairs: noise, and the end of the teacher's flow from it, drawn once and kept.

Liu et al. 2022, arXiv:2209.03003 (rectified flow, reflow); Liu et al. 2023, arXiv:2309.06380 (InstaFlow: with the
teacher's guidance folded in). The lines between the two ends of each pair cross less than those between noise and data,
so that a velocity trained on them by `objectives.flow_loss`, whose batches may hold "noise", is followed in few steps.

A folder of pairs holds files of `ROWS` pairs each, `pairs-00000.safetensors` and so on, with "noise" and "latents"
(rows, channels, height, width), float32; their metadata "contents" is a digest of all that the pairs depend on. Pair i
depends on its own key, `fold_in(key, i)`, and caption alone, so that a set is drawn further after an interruption.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key, Tree
from functional_sd3.formats import files, finite
from functional_sd3.formats.errors import WeightsError

ROWS = 256
"""Pairs in a file."""
Draw = Callable[[range, Tensor], Tensor]
"""`(numbers of the pairs, noise (rows, channels, height, width)) -> latents`, the ends of the flow, in float32."""
Note = Callable[[str], None]


def pairs(
    folder: str | os.PathLike,
    key: Key,
    count: int,
    shape: tuple[int, ...],
    draw: Draw,
    *,
    contents: str,
    rows: int = ROWS,
    track: Callable[[Iterable[range]], Iterable[range]] = iter,
    note: Note = lambda text: None,
) -> Tree:
    """{"noise", "latents"} (count, *shape) of `count` pairs, read where the folder has them, else drawn and written.

    contents: digest of what the pairs depend on; files with another are drawn again, with a note. rows: of a file.
    track: wraps the iteration over files. Raises WeightsError where a drawn latent is not finite or the disk refuses.
    """
    parts = [read_or_draw(folder, key, part, shape, draw, contents, note) for part in track(_files(count, rows))]
    return {name: torch.cat([part[name] for part in parts]) for name in ("noise", "latents")}


def read_or_draw(
    folder: str | os.PathLike,
    key: Key,
    numbers: range,
    shape: tuple[int, ...],
    draw: Draw,
    contents: str,
    note: Note,
) -> Tree:
    """The pairs of one file."""
    path = Path(folder) / f"pairs-{numbers.start:05d}.safetensors"
    if path.exists():
        try:
            return read(path, (len(numbers), *shape), contents)
        except WeightsError as error:
            note(f"note: pairs are drawn again: {error}")
    keys = prng.fold_in(key, torch.tensor(list(numbers), dtype=torch.int64, device=key.device))
    noise = prng.normal(keys, shape)
    with torch.no_grad():
        latents = draw(numbers, noise).float().cpu()
    if what := finite.nonfinite_kind(latents):
        raise WeightsError(f"the teacher's flow of pairs {numbers.start} to {numbers.stop - 1} ends in {what}")
    tensors = {"noise": noise.cpu(), "latents": latents}
    files.write_atomic(path, tensors, metadata={"contents": contents})
    return tensors


def read(path: str | os.PathLike, shape: tuple[int, ...], contents: str) -> Tree:
    """{"noise", "latents"} of a file; WeightsError for one of other contents or shape, or that holds NaN."""
    mapped = files.open_mapped(path)
    if mapped.header.metadata.get("contents") != contents:
        raise WeightsError(f"{path}: holds pairs of another teacher, other captions or other settings")
    tensors = {}
    for name in ("noise", "latents"):
        entry = mapped.header.tensors.get(name)
        if entry is None or tuple(entry.shape) != shape or entry.dtype != torch.float32:
            raise WeightsError(f"{path}: holds no {name} {list(shape)} in float32")
        tensors[name] = files.tensor(mapped, name)
        if what := finite.nonfinite_kind(tensors[name]):
            raise WeightsError(f"{path}: {name} holds {what}")
    return tensors


def _files(count: int, rows: int) -> list[range]:
    return [range(start, min(start + rows, count)) for start in range(0, count, rows)]
