"""Descriptions of .npz files of another kind than a metric reads, for its error message."""

import os

from functional_sd3.formats import npz
from functional_sd3.formats.printable import shorten


def describe(path: str | os.PathLike, wanted: str) -> str:
    """Words for the content of an .npz file without `wanted` ("statistics" or "features")."""
    headers = npz.headers(path, wanted)
    if "mu" in headers and "sigma" in headers:
        return "statistics (mu and sigma), from which features cannot be had back"
    if "features" in headers:
        return "features, as `evaluate kid --save` writes them, not statistics"
    images = headers.get("arr_0")
    if images and images.dtype == "uint8" and len(images.shape) == 4:
        return (
            f"{images.shape[0]} images of {images.shape[2]}x{images.shape[1]} (arr_0, a sample batch of "
            "guided-diffusion), which are read from a folder: save each as a .png, "
            "PIL.Image.fromarray(numpy.load(FILE)['arr_0'][i]).save(f'{i}.png')"
        )
    return f"{', '.join(shorten(name, 40) for name in list(headers)[:5])} and no {wanted}"
