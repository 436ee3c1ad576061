"""Devices, dtypes, methods and weights that words on the command line name."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sd3 import weights
from functional_sd3.core.types import Key
from functional_sd3.flow import ode
from functional_sd3.flow.ode.method import Method
from functional_sd3.formats.default_dtype import Default, Kind
from functional_sd3.text.textual_inversion import Word
from functional_sd3.weights.clip import Clip
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


def dtype(name: str) -> torch.dtype | Default:
    """The dtype of --dtype: "auto" is float32 on a CPU, elsewhere `default_dtype`'s; a load notes what is not kept."""
    return Default(torch.float32, _dtype_advice) if name == "auto" else getattr(torch, name)


def _dtype_advice(kinds: Collection[Kind]) -> str:
    """Advice on the option that chooses another dtype than --dtype auto."""
    names = {str(kind).removeprefix("torch.") for kind in kinds}
    if names in ({"bfloat16"}, {"float16"}):
        return f"--dtype {names.pop()} keeps them so"
    return "no --dtype keeps them so: --dtype bfloat16 takes half of the memory of float32"


def method(
    name: str, keys: Key | None = None, *, rtol: float | None = None, atol: float | None = None
) -> Method | ode.Adaptive:
    """The integrator of a name; keys (batch, 2): of those that draw noise."""
    if name not in ode.NAMES:
        raise ValueError(f"--method {name!r} must be one of {', '.join(ode.NAMES)}")
    if name not in ode.ADAPTIVE and (rtol is not None or atol is not None):
        raise ValueError(f"--rtol and --atol are for {', '.join(ode.ADAPTIVE)}, not for --method {name}")
    return ode.named(name, key=keys, rtol=rtol, atol=atol)


def require(model: Model, components: Sequence[str], source: object, remedy: str = "") -> None:
    """Raises ValueError, with `remedy` at its end, where the model lacks one of the components."""
    absent = [name for name in components if getattr(model.config, name, None) is None]
    if absent:
        raise ValueError(f"{source} has no {' and no '.join(absent)}, which this command needs{remedy}")


def words(embeddings: Sequence[str]) -> list[Word]:
    """The textual inversions of --embedding."""
    sources = map(word_source, embeddings)
    return [weights.load_inversion(path, token=token) for token, path in sources]


def word_source(text: str) -> tuple[str | None, str]:
    """The word (None: that of the file's name) and the path of WORD=FILE or FILE."""
    token, equals, path = text.partition("=")
    return (token, path) if equals and not Path(text).exists() else (None, text)


def check_finite(images: Tensor) -> None:
    if not torch.isfinite(images).all():
        raise ValueError("the model gave values that are not finite; --dtype float32 may help")


def clip(path: str | None, place: str) -> Clip:
    """CLIP's two encoders, from --clip and on --device."""
    if path is None:
        raise ValueError(
            "CLIP's image encoder does not come with this program and is never downloaded by it: pass --clip DIR, a "
            "folder of transformers' CLIPModel such as https://huggingface.co/openai/clip-vit-large-patch14-336 (what "
            "CMMD is published with) or .../clip-vit-base-patch32, with its tokenizer for captions"
        )
    return weights.load_clip(path, dtype=torch.float32, device=device(place))


def clip_name(model: Clip) -> str:
    image = model.config.image
    return f"CLIP with images of {image.size} pixels, patches of {image.patch}, width {image.width}"


def clip_described(path: str, model: Clip) -> dict[str, Any]:
    """Description for JSON of the CLIP that a figure was measured with."""
    image = model.config.image
    return {"clip": path, "clip_image": {"size": image.size, "patch": image.patch, "width": image.width}}
