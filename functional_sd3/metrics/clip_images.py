"""CLIP score and CMMD of images and captions, given CLIP's two encoders.

    model = weights.load_clip("clip-vit-large-patch14-336")
    clip_images.scores(model.params, model.config, model.tokenizer, model.pixels, images, captions)

Published CLIP scores use ViT-B/32 or ViT-L/14, published CMMD ViT-L/14 at 336 pixels: name the model beside a figure.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from functional_sd3.core.types import Params
from functional_sd3.image import clip_pixels
from functional_sd3.metrics import clip_score, cmmd
from functional_sd3.text import bpe
from functional_sd3.text.clip import dual as clip_dual

if TYPE_CHECKING:
    from PIL.Image import Image


def scores(
    params: Params,
    config: clip_dual.Config,
    tokenizer: bpe.Tables,
    pixels: clip_pixels.Config,
    images: "Tensor | Sequence[Image]",
    captions: Sequence[str],
) -> Tensor:
    """The CLIP score of each image with its caption, 0 to 100: float64 (n,); their mean is the published figure.

    images: (n, 3, height, width) in [0, 1], or n images of any sizes. Captions longer than CLIP reads are cut off.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions must be as many")
    embeddings = image_embeddings(params, config, clip_pixels.apply(pixels, images))
    ids = bpe.apply(tokenizer, captions, length=config.text.length).to(embeddings.device)
    return clip_score.pairs(embeddings, clip_dual.text_embeddings(params, config, ids))


def differentiable_scores(
    params: Params,
    config: clip_dual.Config,
    tokenizer: bpe.Tables,
    pixels: clip_pixels.Config,
    images: Tensor,
    captions: Sequence[str],
) -> Tensor:
    """100 cos of the embeddings of each image with its caption, (n,), with a gradient with respect to the images.

    Differs from `scores` where that is 0, since cosines below 0 stay, and by its rounding of pixels to bytes.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions must be as many")
    device = params["logit_scale"].device
    ids = bpe.apply(tokenizer, captions, length=config.text.length).to(device)
    with torch.no_grad():
        texts = clip_dual.text_embeddings(params, config, ids)
    seen = clip_dual.image_embeddings(params, config, clip_pixels.resample(pixels, images.to(device)))
    return 100 * (seen * texts).sum(1)


def cmmd_distance(
    params: Params,
    config: clip_dual.Config,
    pixels: clip_pixels.Config,
    images: "Tensor | Sequence[Image]",
    others: "Tensor | Sequence[Image]",
) -> float:
    """CMMD of two sets of images, (n, 3, height, width) in [0, 1] or images of any sizes, cropped as the authors do."""
    embed = partial(image_embeddings, params, config)
    return cmmd.distance(
        embed(clip_pixels.apply(pixels, images, square=True)), embed(clip_pixels.apply(pixels, others, square=True))
    )


def image_embeddings(params: Params, config: clip_dual.Config, images: Tensor) -> Tensor:
    """`clip_dual.image_embeddings` of prepared images (n, 3, size, size), on the parameters' device; no gradient."""
    with torch.no_grad():
        return clip_dual.image_embeddings(params, config, images.to(params["logit_scale"].device))
