"""Inputs of `train` beside the images of --data: masks, control images, images of the class and those held out."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3 import pipeline
from functional_sd3.cli import train_data, train_prior, train_subjects, view_options
from functional_sd3.cli.train_data import Say
from functional_sd3.core import prng, tree
from functional_sd3.core.types import Tree
from functional_sd3.image import canny, pixels, vae
from functional_sd3.image.cuts import Cut
from functional_sd3.layouts.components import require
from functional_sd3.training import companions, continuing, digests, training_set, views
from functional_sd3.training.training_images import TrainingImages
from functional_sd3.training.training_set import TrainingSet
from functional_sd3.transformer import controlnet
from functional_sd3.weights.model import Model

MASKS, CONTROL, PRIOR, HELD_OUT = "the masks", "the control images", "the images of the class", "the validation images"
"""Names of contents in a checkpoint's settings."""
_PATHS = ("masks", "control_data", "prior_data")
"""Options of which a checkpoint keeps the digest of the contents, and not the path."""
Fetch = Callable[[Tensor], Tensor]
"""Samples, as in `training_set.Latents.fetch` -> what belongs to them."""
CONTROL_VIEWS = "control"
"""The folder beside the checkpoints that keeps control images of several sizes or views."""


class Extras(NamedTuple):
    """Images of the class and those held out, None for none; masks of the latents of every sample; files of control
    images."""

    prior: TrainingImages | None
    held_out: TrainingImages | None
    masks: list[Tensor] | None
    control: list[Path] | None
    contents: dict[str, str]


NONE = Extras(None, None, None, None, {})
"""Nothing beside the images."""


def gather(
    arguments: argparse.Namespace, model: Model, images: TrainingImages, say: Say, drawing: Callable[[], Model]
) -> Extras:
    """Everything that the options name, found and read, with digests of it; images of the class are drawn if wanted, by
    the model `drawing()`.

    Raises ValueError for what is missing or does not fit.
    """
    contents = {}
    held_out = None
    if arguments.validation is not None and arguments.validation.isdecimal():
        _check_count(arguments, len(images.captions))
    elif arguments.validation is not None:
        if arguments.masks or arguments.control_data:
            raise ValueError(
                f"--validation {arguments.validation}: with --masks or --control-data give a number of images to hold "
                "out, whose files are known"
            )
        held_out = _folder(arguments, model, arguments.validation, arguments.caption, say)
        contents[HELD_OUT] = held_out.contents
    masks = control = None
    if arguments.masks is not None:
        is_beside = Path(arguments.masks).samefile(arguments.data)
        paths = companions.find(arguments.masks, images.names, "masks", own=not is_beside)
        masks = _masks(arguments, model, images, paths)
        contents[MASKS] = digests.combined(digests.file_digests(paths))
    if arguments.control_data is not None:
        control = companions.find(arguments.control_data, images.names, "control images")
        contents[CONTROL] = digests.combined(digests.file_digests(control))
    prior = _prior(arguments, model, say, drawing)
    if prior is not None:
        contents[PRIOR] = prior.contents
    return Extras(prior, held_out, masks, control, contents)


def option_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of this module as a checkpoint keeps them: paths as the word folder, as folders may move."""
    folders = {name.replace("_", "-"): "folder" for name in _PATHS if getattr(arguments, name) is not None}
    if arguments.validation is not None and not arguments.validation.isdecimal():
        folders["validation"] = "folder"
    return folders


def training_sets(
    arguments: argparse.Namespace,
    model: Model,
    images: TrainingImages,
    extras: Extras,
    net: controlnet.Config | None,
    settings: dict[str, Any],
    say: Say,
    *,
    with_ids: bool,
) -> tuple[TrainingSet, tuple[str, ...], TrainingSet | None, TrainingSet | None]:
    """The set that is learned from and its captions, that of the class, and that which is held out."""
    data = train_data.training_data(arguments, model, images, None, settings, say, with_ids=with_ids)
    further: dict[str, Fetch] = {}
    if extras.masks is not None:
        further["mask"] = _stacked(extras.masks)
    if net is not None:
        further["control"] = _control_latents(arguments, model, images, extras, net, settings, say)
    if further:
        data = data._replace(extra=lambda samples: _rows(further, samples))

    def encoded(part: TrainingImages, file: str, contents: str) -> TrainingSet:
        options: dict[str, Any] = {"file": file, "contents": contents, "with_ids": with_ids}
        return train_data.training_data(arguments, model, part, None, settings, say, **options)

    prior = None if extras.prior is None else encoded(extras.prior, "prior.safetensors", PRIOR)
    if extras.held_out is not None:
        held_out = encoded(extras.held_out, "validation.safetensors", HELD_OUT)
        if net is not None:
            inputs = arguments, model, extras.held_out, extras, net, settings, say
            own = {"control": _control_latents(*inputs, HELD_OUT)}
            held_out = held_out._replace(extra=lambda samples: _rows(own, samples))
        return data, images.captions, prior, held_out
    kept, captions, held = hold_out(arguments, data, images.captions)
    return kept, captions, prior, held


def hold_out(
    arguments: argparse.Namespace, data: TrainingSet, captions: tuple[str, ...]
) -> tuple[TrainingSet, tuple[str, ...], TrainingSet | None]:
    """The set without the images that --validation N holds out, its captions, and the set of those images."""
    if arguments.validation is None:
        return data, captions, None
    _check_count(arguments, len(captions))
    order = prng.permutation(prng.fold_in(prng.key(arguments.seed), 4), len(captions)).tolist()
    held = _held_out(order, data.latents.buckets, int(arguments.validation), arguments.batch_size)
    kept = sorted(set(order) - set(held))
    held_out = training_set.subset(data, sorted(held))
    return training_set.subset(data, kept), tuple(captions[row] for row in kept), held_out


def _held_out(order: Sequence[int], buckets: Sequence[int], count: int, batch: int) -> list[int]:
    """The first `count` images of an order that leave each of several buckets a batch.

    Raises ValueError where there are fewer.
    """
    spare = Counter(buckets)
    if len(spare) == 1:
        return list(order[:count])
    spare.subtract(dict.fromkeys(spare, batch))
    held: list[int] = []
    for image in order:
        if len(held) < count and spare[buckets[image]] > 0:
            spare[buckets[image]] -= 1
            held.append(image)
    if len(held) < count:
        raise ValueError(
            f"--validation {count}: {len(held)} images can be held out, as each bucket needs {batch} for a batch: give "
            "fewer, a smaller --batch-size, or a larger --bucket-min where the buckets are made"
        )
    return held


def _check_count(arguments: argparse.Namespace, count: int) -> None:
    if int(arguments.validation) >= count:
        raise ValueError(
            f"--validation {arguments.validation} holds out all images ({count}); leave some to learn from"
        )


def _rows(further: dict[str, Fetch], samples: Tensor) -> Tree:
    return {name: fetch(samples) for name, fetch in further.items()}


def _stacked(parts: Sequence[Tensor] | Tensor) -> Fetch:
    return lambda samples: torch.stack([parts[sample] for sample in samples.tolist()])


def _folder(arguments: argparse.Namespace, model: Model, data: str, caption: str | None, say: Say) -> TrainingImages:
    return train_data.images(argparse.Namespace(**{**vars(arguments), "data": data, "caption": caption}), model, say)


def _masks(arguments: argparse.Namespace, model: Model, images: TrainingImages, paths: Sequence[Path]) -> list[Tensor]:
    """Weights of the latents of every sample, (1, height, width): the mask's where it is white, --mask-outside where
    black."""
    factor, cuts = vae.factor(require(model.config, "vae")), train_data.image_views(arguments, model, images)
    masks = [
        companions.load_mask(path, size, views.cut(cuts, row, view), factor)
        for row, (path, size) in enumerate(zip(paths, images.sizes, strict=True))
        for view in range(cuts.count)
    ]
    outside = arguments.mask_outside or 0.0
    black = [name for row, name in enumerate(images.names)
             if not any(mask.any() for mask in masks[row * cuts.count : (row + 1) * cuts.count])]  # fmt: skip
    if black and not outside:
        raise ValueError(
            f"--masks: {len(black)} masks are black everywhere, so nothing is learned of their images, the first "
            f"{black[0]}: white is learned"
        )
    return [outside + (1 - outside) * mask for mask in masks]


def _control_latents(
    arguments: argparse.Namespace,
    model: Model,
    images: TrainingImages,
    extras: Extras,
    net: controlnet.Config,
    settings: dict[str, Any],
    say: Say,
    contents: str = "the data",
) -> Fetch:
    """Control images as the ControlNet reads them, by their samples; kept beside the checkpoints."""
    side, device = train_data.side(arguments, model), tree.leaves(model.params)[0].device
    params = {"vae": tree.cast(model.params["vae"], torch.float32)}
    low, high = train_subjects.thresholds(arguments)
    paths = extras.control

    def control(row: int, cut: Cut) -> Tensor:
        if paths is None:
            return canny.edges(images.cut(row, cut)[None], low=low, high=high)[0].expand(3, -1, -1)
        return companions.load_control(paths[row], images.sizes[row], cut)

    def encode(some: Tensor) -> Tensor:
        with torch.no_grad():
            return pipeline.control_latents(params, model.config, pixels.from_bytes(some).to(device), net).cpu()

    def encode_all() -> Tensor:
        track = train_data.track(len(images.captions), "encoding control images")
        return torch.cat([encode(torch.stack([control(row, Cut(side, side)) for row in rows])) for rows in track])

    named = settings.get(continuing.CONTENTS + CONTROL) or f"canny {low} {high}"
    made_of = [settings[continuing.CONTENTS + part] for part in (contents, "the vae of the model")]
    of = digests.combined([*made_of, named])
    if view_options.has_views(arguments):
        options = arguments, CONTROL_VIEWS, of, model, images, settings, encode, say, control
        return train_data.stored_views(*options).fetch
    name = "control.safetensors" if contents == "the data" else "validation-control.safetensors"
    return _stacked(train_data.stored_latents(arguments, name, of, len(images.captions), encode_all, say))


def _prior(
    arguments: argparse.Namespace, model: Model, say: Say, drawing: Callable[[], Model]
) -> TrainingImages | None:
    """The images of the class; drawn first, as far as --prior-images are missing."""
    if arguments.prior_data is None and arguments.prior_images is None:
        return None
    folder = Path(arguments.prior_data or Path(arguments.out) / "prior")
    if arguments.prior_images is not None:
        train_prior.draw(arguments, drawing, folder, say)
    return _folder(arguments, model, str(folder), arguments.prior_prompt, say)
