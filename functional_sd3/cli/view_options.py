"""Options of `cache` and `train` for the sizes of images and the views of each: buckets, crops, mirror images."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from functional_sd3.formats.printable import named

_STEP, _RATIO = 64, 2.0
NAMES = ("buckets", "bucket_step", "bucket_ratio", "bucket_min", "crops", "flips")


def add_arguments(group) -> None:
    add = group.add_argument
    add(
        "--buckets",
        metavar="SIDE[,SIDE...]",
        help="cut each image to the nearest of many aspect ratios, of as many pixels as a square of SIDE; of several "
        "the largest that it fills",
    )
    add("--bucket-step", type=int, metavar="PX", help=f"of which their sides are multiples (default {_STEP})")
    add("--bucket-ratio", type=float, metavar="RATIO", help=f"longest side by shortest at most (default {_RATIO:g})")
    least = "images that one has at least; those of smaller ones go to the nearest (default: a batch; in a cache 16)"
    add("--bucket-min", type=int, metavar="N", help=least)
    add("--crops", type=int, default=1, metavar="N", help="parts of each image, the middle first (default 1)")
    add("--flips", action="store_true", help="mirror images too; captions that say left and right become wrong")


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for values that make no sense whatever the model."""
    areas(arguments)
    for name in NAMES[1:4]:
        value = getattr(arguments, name)
        if value is not None and arguments.buckets is None:
            raise ValueError(f"--{name.replace('_', '-')} is for --buckets, which is not given")
    if arguments.buckets is not None and arguments.size is not None:
        raise ValueError("--size is one size for all images, and --buckets gives each its own: give one of them")


def areas(arguments: argparse.Namespace) -> tuple[int, ...]:
    """The sides of --buckets, none where it is not given."""
    words = [] if arguments.buckets is None else arguments.buckets.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ValueError(f"--buckets {arguments.buckets} must be sides in pixels with commas between, as 512,1024")
    return tuple(sorted({int(word) for word in words}))


def has_views(arguments: argparse.Namespace) -> bool:
    """True where images have several sizes or views."""
    return arguments.buckets is not None or arguments.crops > 1 or arguments.flips


def views(arguments: argparse.Namespace, config, sizes: tuple[tuple[int, int], ...], side: int, least: int):
    """The `training.views.Views` of images of `sizes`; side: of all of them without --buckets. least: the default of
    --bucket-min. Raises ValueError for buckets that the model does not take."""
    from functional_sd3.image import vae
    from functional_sd3.layouts.components import require
    from functional_sd3.training import buckets as image_buckets
    from functional_sd3.training.views import Views

    more = {"crops": arguments.crops, "flips": arguments.flips, "seed": arguments.seed}
    if arguments.buckets is None:
        return Views(image_buckets.Buckets(((side, side),), (0,) * len(sizes)), **more)
    options = image_buckets.Options(
        areas(arguments),
        _STEP if arguments.bucket_step is None else arguments.bucket_step,
        _RATIO if arguments.bucket_ratio is None else arguments.bucket_ratio,
        least if arguments.bucket_min is None else arguments.bucket_min,
    )
    network = require(config, "transformer")
    patch = network.patch_size * vae.factor(require(config, "vae"))
    longest = network.position_size * patch
    image_buckets.check(options, patch, longest)
    return Views(image_buckets.assign(sizes, options, longest), **more)


def describe(views, config) -> list[str]:
    """A line for each bucket, its size and number of images; and of several views how many latents they are, and their
    bytes."""
    counts = [views.buckets.of_image.count(index) for index in range(len(views.buckets.sizes))]
    pairs = zip(views.buckets.sizes, counts, strict=True)
    lines = [f"{width} x {height} ({width / height:.2f}): {count} images" for (width, height), count in pairs]
    lines = [f"{len(lines)} buckets", *lines] if len(lines) > 1 else lines
    if views.count > 1:
        latents = views.count * len(views.buckets.of_image)
        lines.append(f"{views.count:,} views of each: {latents:,} latents, {nbytes(views, config) / 2**20:,.1f} MiB")
    return lines


def nbytes(views, config) -> int:
    """Bytes of the latents of all views, which are stored in float32."""
    from functional_sd3.image import vae
    from functional_sd3.layouts.components import require

    sizes = require(config, "vae")
    areas = [width * height // vae.factor(sizes) ** 2 for width, height in views.buckets.sizes]
    return 4 * sizes.latent_channels * views.count * sum(areas[bucket] for bucket in views.buckets.of_image)


def check_room(views, config, folder: Path) -> None:
    """Raises ValueError where the disk of a folder, which need not be there yet, has no room for the latents of all
    views, those that it holds already counted."""
    needed = nbytes(views, config)
    place = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(place).free + sum(file.stat().st_size for file in folder.glob("latents-*.safetensors"))
    if free < needed:
        raise ValueError(
            f"--crops and --flips make {views.count:,} views of {len(views.buckets.of_image):,} images, whose latents "
            f"need {needed / 2**30:.2f} GiB; {place} has {free / 2**30:.2f} GiB free: give fewer --crops"
        )


def enlarged_note(views, sizes: Sequence[tuple[int, int]], names: Sequence[str]) -> list[str]:
    """A line that names images that are smaller than what is learned of them; none where no image is."""
    from functional_sd3.training import buckets

    rows = buckets.enlarged(sizes, views.buckets)
    if not rows:
        return []
    small = [f"{names[row]}: {sizes[row][0]} x {sizes[row][1]}" for row in rows]
    return ["note: are smaller than the size that is learned, and enlarged to it, so that what is learned is blurred: "
            f"{named(small)} of {len(sizes)}"]  # fmt: skip


def changes(arguments: argparse.Namespace) -> dict[str, object]:
    """The options that change what is encoded, by name; empty where each image has its middle square alone."""
    values = {name: getattr(arguments, name) for name in NAMES}
    usual = {**dict.fromkeys(NAMES), "crops": 1, "flips": False}
    changed = {name: value for name, value in values.items() if value != usual[name]}
    return changed | ({"seed": arguments.seed} if arguments.crops > 1 else {})
