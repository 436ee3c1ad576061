"""Canny edges against a plain reading of the algorithm, and numbers that OpenCV gives."""

import hashlib
import math

import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.image import canny, pixels
from functional_sd3.recipes import shapes


def smooth(seed: int, contrast: float) -> torch.Tensor:
    """A grey image of blobs, (1, 1, 20, 26)."""
    noise = prng.uniform(prng.key(seed), (1, 1, 24, 30))
    means = torch.nn.functional.avg_pool2d(noise, 5, stride=1)
    return pixels.to_bytes(((means - 0.5) * contrast + 0.5).clamp(0, 1))


def reference(image: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Pixel by pixel, by angles instead of fixed-point tangents."""
    height, width = image.shape
    at = lambda r, c: int(image[min(max(r, 0), height - 1), min(max(c, 0), width - 1)])  # noqa: E731
    d = {}
    for r in range(height):
        for c in range(width):
            dx = sum(w * (at(r + i, c + 1) - at(r + i, c - 1)) for i, w in ((-1, 1), (0, 2), (1, 1)))
            dy = sum(w * (at(r + 1, c + i) - at(r - 1, c + i)) for i, w in ((-1, 1), (0, 2), (1, 1)))
            d[r, c] = dx, dy, abs(dx) + abs(dy)
    norm = lambda r, c: d[r, c][2] if (r, c) in d else 0  # noqa: E731
    maxima = set()
    for (r, c), (dx, dy, own) in d.items():
        angle = math.degrees(math.atan2(abs(dy), abs(dx)))
        if angle < 22.5:
            keeps = own > norm(r, c - 1) and own >= norm(r, c + 1)
        elif angle > 67.5:
            keeps = own > norm(r - 1, c) and own >= norm(r + 1, c)
        else:
            side = -1 if dx * dy < 0 else 1
            keeps = own > norm(r - 1, c - side) and own > norm(r + 1, c + side)
        if keeps and own > low:
            maxima.add((r, c))
    edges, border = set(), [place for place in maxima if d[place][2] > high]
    while border:
        r, c = border.pop()
        edges.add((r, c))
        near = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
        border += list((near & maxima) - edges)
    return torch.tensor([[255 * ((r, c) in edges) for c in range(width)] for r in range(height)], dtype=torch.uint8)


@pytest.mark.parametrize(("seed", "contrast"), [(0, 3), (1, 8), (2, 20)])
@pytest.mark.parametrize("limits", [(100, 200), (20, 90)])
def test_edges_are_connected_maxima_of_the_gradient(seed, contrast, limits):
    image = smooth(seed, contrast)
    found = canny.edges(image, low=limits[0], high=limits[1])
    assert torch.equal(found[0, 0], reference(image[0, 0], *limits))
    assert found.dtype == torch.uint8 and (contrast < 5 or found.any())


def test_edges_of_shapes_are_opencvs():
    """`cv2.Canny(image, 100, 200)` of OpenCV 5.0 for eight drawings; 0 of 960 images of other kinds differed."""
    drawn, _ = shapes.images(prng.key(1), 8)
    found = canny.edges(drawn)
    assert found.shape == (8, 1, 64, 64)
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest()[:16] == "b9159c13e21a03bc"


def test_of_several_channels_the_steepest_counts():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[:, 1, :, 4:] = 255
    assert torch.equal(canny.edges(image), canny.edges(image[:, 1:2]))
    assert canny.edges(image)[0, 0, :, 3].all() and canny.edges(image).float().sum() == 8 * 255


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match="must be uint8"):
        canny.edges(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="0 <= low <= high"):
        canny.edges(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), low=5, high=2)
