"""A training set of the shapes world for `training.tasks`."""

from collections.abc import Sequence

from torch import Tensor

from functional_sd3.core import prng
from functional_sd3.core.types import Key
from functional_sd3.image import cuts, pixels
from functional_sd3.recipes.shapes import world
from functional_sd3.training import datasets, digests
from functional_sd3.training.training_images import TrainingImages


def dataset(key: Key, count: int, side: int) -> TrainingImages:
    """`count` captioned scenes, each drawn `side` pixels wide when it is loaded; held-out captions are left out."""
    scene_key, wording_key = prng.split(key)
    scenes = world.scenes(scene_key, count)
    captions = captions_of(wording_key, scenes)

    def load(rows: Sequence[int] | Tensor) -> Tensor:
        return pixels.to_bytes(pixels.from_pil([world.draw(scenes[int(row)], side) for row in rows]))

    def cut(row: int, part: cuts.Cut) -> Tensor:
        return datasets.as_tensor(cuts.apply(world.draw(scenes[row], max(part.width, part.height)), part))

    contents = digests.combined([str(side), *captions])
    names = tuple(f"scene {index}" for index in range(count))
    return TrainingImages(
        captions, load, digests.fingerprint(captions), contents, cut, ((side, side),) * count, names, side
    )


def captions_of(key: Key, scenes: Sequence[world.Scene]) -> tuple[str, ...]:
    """A caption of each scene, six of ten canonical, as in the recipe of the shipped model."""
    picks = prng.uniform(key, (len(scenes),)).tolist()
    return tuple(
        world.caption(scene, 0 if pick < 0.6 else 1 + int((pick - 0.6) * 150))
        for scene, pick in zip(scenes, picks, strict=True)
    )
