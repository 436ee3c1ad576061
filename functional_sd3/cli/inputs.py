"""Images that a run begins from: `--image IN --strength 0.6`, `--mask MASK`, `--outpaint right=64`.

An image is read upright and in RGB. With `--size` it is scaled to cover that size and cropped about its centre.
Without, it is scaled down where it has more pixels than the model's own size, and each side is cropped about the centre
to a multiple of what the model can draw. A mask is treated as its image; `image.masks` has the rule of its
transparency.
"""

import argparse
import math
import re
from typing import TYPE_CHECKING, NamedTuple

from functional_sd3.cli import image_settings, options

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from functional_sd3.cli.session import Session
    from functional_sd3.pipeline import StartImages

_SIDES = ("left", "right", "top", "bottom")
_RECORDED = ("image", "mask", "strength", "soften", "restore", "outpaint", "overlap")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", metavar="IN", help="an image to begin from")
    parser.add_argument(
        "--strength", type=float, help="in [0, 1], how much of it is drawn anew (default 0.6; 1 with a mask)"
    )
    parser.add_argument(
        "--mask",
        help="an image of the same proportions: only what is white in it is drawn anew. Where its alpha varies: the "
        "strokes, if they are white or of one colour; of any other image, such as one with a part erased, what is "
        "transparent",
    )
    parser.add_argument(
        "--soften", type=float, metavar="PX", help="blur the mask by so many pixels and take its grey for a strength"
    )
    parser.add_argument("--restore", action="store_true", help="lay what is kept of the image over the result")
    parser.add_argument(
        "--outpaint", metavar="SIDE=PX,...", help="continue the image: right=64,left=32 (left, right, top, bottom)"
    )
    parser.add_argument(
        "--overlap", type=int, metavar="PX", help="with --outpaint: draw so much inside the border anew too (default 0)"
    )


def settings(arguments: argparse.Namespace) -> image_settings.Settings:
    """The options of start images, for the settings in an image."""
    return image_settings.given_options(arguments, _RECORDED)


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options that make no sense, before anything is loaded."""
    alone = [f"--{name}" for name in image_settings.given_options(arguments, _RECORDED) if name != "image"]
    if arguments.image is None and alone:
        raise ValueError(f"{' and '.join(alone)} needs --image: the image to begin from")
    if arguments.strength is not None and not 0 <= arguments.strength <= 1:
        raise ValueError(f"--strength {arguments.strength} must be between 0 (the image as it is) and 1 (all anew)")
    if arguments.mask and arguments.outpaint:
        raise ValueError("--mask and --outpaint each say what is drawn anew: give one of them")
    masked = arguments.mask or arguments.outpaint
    if not masked and (arguments.soften is not None or arguments.restore):
        raise ValueError("--soften and --restore need --mask or --outpaint: the part that is drawn anew")
    if arguments.soften is not None and not 0 <= arguments.soften < math.inf:
        raise ValueError(f"--soften {arguments.soften} must be a number of pixels of at least 0")
    if arguments.overlap is not None and not arguments.outpaint:
        raise ValueError("--overlap needs --outpaint")
    if arguments.outpaint:
        margins(arguments.outpaint)
    for name in ("image", "mask"):
        path = getattr(arguments, name)
        if path is not None:
            options.check_file(path, f"--{name} {path}")


def margins(text: str) -> dict[str, int]:
    """{"right": 64} of "right=64"."""
    pixels_of = {}
    for part in text.split(","):
        side, equals, pixels = part.strip().partition("=")
        if side not in _SIDES or not equals or not re.fullmatch("[0-9]{1,6}", pixels) or side in pixels_of:
            raise ValueError(f"--outpaint {text!r} must be sides and pixels, such as right=64,top=32")
        pixels_of[side] = int(pixels)
    return pixels_of


def prepare(arguments: argparse.Namespace, session: "Session", size: tuple[int, int] | None) -> "StartImages | None":
    """The image read, fitted and grown, with its mask; None without --image. size: width and height it is fitted to.

    Raises ValueError for files that are no images, masks of other proportions, and sizes that cannot be drawn.
    """
    if arguments.image is None:
        return None
    import torch

    from functional_sd3 import pipeline
    from functional_sd3.image import pixels, vae
    from functional_sd3.layouts.components import require

    image = fitted_image(arguments.image, session, size)
    mask: Tensor | None = None
    if arguments.mask:
        original = read(arguments.image)
        fit = fitting(original.size, session, size)
        read_in = read_mask(arguments.mask, original, least=128 if arguments.soften is None else 4)
        fitted_mask = fitted(_proportioned(arguments.mask, read_in, original), fit)
        mask = pixels.from_pil(fitted_mask)[:, :1].to(session.device)
    elif arguments.outpaint:
        image, mask = pipeline.extend_canvas(image, **margins(arguments.outpaint), overlap=arguments.overlap or 0)
    strength = arguments.strength if arguments.strength is not None else 0.6 if mask is None else 1.0
    if mask is not None:
        factor = vae.factor(require(session.config, "vae"))
        latents = torch.empty(
            (1, 1, *(side // factor for side in image.shape[-2:])), dtype=torch.float32, device="meta"
        )
        if not pipeline.latent_mask(mask, latents, arguments.soften).any():
            where = f"--mask {arguments.mask}" if arguments.mask else f"--outpaint {arguments.outpaint}"
            raise ValueError(f"{where} changes nothing: its white part is too small for latents, or cropped away")
    return pipeline.StartImages(image, strength, mask, arguments.soften, arguments.restore)


def fitted_image(path: str, session: "Session", size: tuple[int, int] | None) -> "Tensor":
    """The image as (1, 3, height, width) in [0, 1], with a note where it is not of its own size."""
    from functional_sd3 import pipeline
    from functional_sd3.cli import report
    from functional_sd3.image import pixels

    if size is not None:
        pipeline.latent_size(session.config, size[1], size[0], bounded=False)
    image = read(path)
    fit = fitting(image.size, session, size)
    if image.size != fit.size:
        was, now = ("x".join(map(str, sides)) for sides in (image.size, fit.size))
        report.note(f"{path} is {was}: {'scaled and cropped' if fit.scaled else 'cropped'} to {now}")
    return pixels.from_pil(fitted(image, fit)).to(session.device)


class Fit(NamedTuple):
    """The size that an image is brought to, and whether it is scaled on the way or only cropped."""

    size: tuple[int, int]
    scaled: bool


def fitting(size: tuple[int, int], session: "Session", wanted: tuple[int, int] | None) -> Fit:
    """The size that an image of this width and height is fitted to, by the rule of this module."""
    if wanted is not None:
        return Fit(wanted, size != wanted)
    from functional_sd3.image import vae
    from functional_sd3.layouts.components import require

    sizes, factor = require(session.config, "transformer"), vae.factor(require(session.config, "vae"))
    step = factor * sizes.patch_size
    scale = min(1.0, sizes.sample_size * factor / math.sqrt(size[0] * size[1]))
    sides = [max(step, int(side * scale + 1e-6) // step * step) for side in size]
    width, height = (min(side, step * sizes.position_size) for side in sides)
    return Fit((width, height), scale < 1 or width > size[0] or height > size[1])


def fitted(image: "Image", fit: Fit) -> "Image":
    """The image at that size, about its centre."""
    from PIL import Image, ImageOps

    if fit.scaled:
        return ImageOps.fit(image, fit.size, Image.Resampling.LANCZOS)
    left, top = ((has - wants) // 2 for has, wants in zip(image.size, fit.size, strict=True))
    return image.crop((left, top, left + fit.size[0], top + fit.size[1]))


def read(path: str) -> "Image":
    """The image; ValueError with its path where it is none."""
    from functional_sd3.image import files

    try:
        return files.read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_mask(path: str, image: "Image | None" = None, *, least: int) -> "Image":
    """The mask in mode "L", by the rule of `image.masks`, with a note where transparency decided; `image`: what it is a
    mask of. ValueError, with its path, where no value reaches `least`."""
    from functional_sd3.cli import report
    from functional_sd3.image import files, masks

    try:
        mask, reading = masks.from_image(files.read_transparent(path), image)
        masks.check_effect(mask, least)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if reading:
        histogram = mask.histogram()
        share = 100 * sum(histogram[128:]) / sum(histogram)
        report.note(f"{path} has transparency: {reading} the mask, {share:.0f} % of its area")
    return mask


def _proportioned(path: str, mask: "Image", image: "Image") -> "Image":
    from PIL import Image

    if mask.width * image.height != mask.height * image.width:
        sizes = ["x".join(map(str, sides)) for sides in (mask.size, image.size)]
        raise ValueError(f"{path} is {sizes[0]}, but the image is {sizes[1]}: a mask must have its proportions")
    return mask.resize(image.size, Image.Resampling.BILINEAR)
