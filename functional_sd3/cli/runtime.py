"""What words on the command line mean: devices, dtypes, methods."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from functional_sd3 import weights
from functional_sd3.flow import ode
from functional_sd3.flow.method import Method
from functional_sd3.text import inversion
from functional_sd3.weights.model import Model


def device(name: str) -> torch.device:
    """ "auto" is the first of CUDA (ROCm too), MPS and CPU that is there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} must be auto, cpu, cuda or mps") from None
    if not there.get(chosen.type, False):
        available = ", ".join(kind for kind, available in there.items() if available)
        raise ValueError(f"--device {name} is not available here; available: {available}")
    return chosen


def dtype(name: str, device: torch.device) -> torch.dtype | None:
    """ "auto" computes in float32 on the CPU, and elsewhere in what the weights are stored in (None)."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    return getattr(torch, name)


def method(name: str) -> Method:
    if name not in ode.METHODS:
        raise ValueError(f"--method {name!r} must be one of {', '.join(ode.METHODS)}")
    return ode.METHODS[name]


def require(model: Model, components: Sequence[str], source: object) -> None:
    absent = [name for name in components if name not in model.params]
    if absent:
        raise ValueError(f"{source} has no {' and no '.join(absent)}, which this command needs")


def with_words(model: Model, embeddings: Sequence[str]) -> Model:
    """The model with textual inversions, each FILE or WORD=FILE."""
    words = []
    for text in embeddings:
        token, equals, path = text.partition("=")
        named = equals and not Path(text).exists()
        words.append(weights.load_inversion(path, token=token) if named else weights.load_inversion(text))
    return model._replace(**inversion.add(model.params, model.config, model.tokenizers, *words)._asdict())


def check_finite(images: Tensor) -> None:
    if not torch.isfinite(images).all():
        raise ValueError("the model gave values that are not finite; --dtype float32 may help")
