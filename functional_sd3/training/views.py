"""Views of the images of a set: the crops and mirror images of each that become latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.image.cuts import Cut
from functional_sd3.training.buckets import Buckets

_PIXELS = 2**22
GROUP = 16
"""The most images that are encoded together. Groups begin at its multiples, as those of captions do (`text_table`)."""


@dataclass(frozen=True)
class Views:
    """The views of every image: `crops` parts of the size of its bucket, the first from the middle and the others from
    anywhere along the side that is cut; with `flips` each of them mirrored too."""

    buckets: Buckets
    crops: int = 1
    flips: bool = False
    seed: int = 0

    @property
    def count(self) -> int:
        """Views of an image."""
        return self.crops * (1 + self.flips)


def cut(views: Views, image: int, view: int) -> Cut:
    """The cut of one view of an image; view 0 is the middle, unmirrored."""
    crop, mirrored = divmod(view, 1 + views.flips)
    width, height = views.buckets.sizes[views.buckets.of_image[image]]
    offset = 0.5
    if crop:
        key = prng.fold_in(prng.fold_in(prng.key(views.seed), image), crop)
        offset = float(prng.uniform(key))
    return Cut(width, height, offset, bool(mirrored))


def images_at_once(width: int, height: int) -> int:
    """Images of a size that are encoded together: a power of two up to `GROUP`, of no more pixels than 16 images of
    512 x 512 have."""
    return 2 ** (max(1, min(GROUP, _PIXELS // (width * height))).bit_length() - 1)


def encode(
    encode_images: Callable[[Tensor], Tensor],
    image_cut: Callable[[int, Cut], Tensor],
    views: Views,
    rows: Sequence[int],
) -> list[Tensor]:
    """Latents of all views of some images, each (views, channels, height, width).

    encode_images: images (batch, 3, height, width), as `image_cut` (row, cut) makes each -> their latents. Images of
    one size are encoded `images_at_once` together, in the order of `rows`.
    """
    by_size: dict[int, list[int]] = {}
    for row in rows:
        by_size.setdefault(views.buckets.of_image[row], []).append(row)
    encoded: dict[int, Tensor] = {}
    for bucket, members in by_size.items():
        at_once = images_at_once(*views.buckets.sizes[bucket])
        for start in range(0, len(members), at_once):
            some = members[start : start + at_once]
            shown = [
                encode_images(torch.stack([image_cut(row, cut(views, row, view)) for row in some]))
                for view in range(views.count)
            ]
            encoded |= dict(zip(some, torch.stack(shown, 1), strict=True))
    return [encoded[row] for row in rows]
