"""CLIP score: cosine similarity of the CLIP embeddings of an image and its caption.

Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", with 100 in place of the
paper's 2.5, as is custom for generated images.
"""

import torch.nn.functional as F
from torch import Tensor


def score(images: Tensor, texts: Tensor) -> float:
    """The mean of `pairs`."""
    return float(pairs(images, texts).mean())


def pairs(images: Tensor, texts: Tensor) -> Tensor:
    """100 max(cos, 0) of embeddings of images (n, d) and of their captions (n, d), row by row: float64 (n,).

    Of any length: CLIP's projected embeddings as they come. Raises ValueError for shapes that differ, or no rows.
    """
    if images.ndim != 2 or images.shape != texts.shape or not len(images):
        raise ValueError(f"embeddings {list(images.shape)} and {list(texts.shape)} must both be (n, d), n at least 1")
    return 100 * F.cosine_similarity(images.double(), texts.double(), dim=1).clamp(min=0)
