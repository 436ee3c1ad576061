"""IP-Adapters on disk: InstantX's file for SD3.5-large, `ip-adapter.safetensors`, identified by the names inside.

Usage:

    adapter = weights.load_ip_adapter("ip-adapter.safetensors")
    prompt = ip_adapter.ImagePrompt(adapter.params, adapter.config, features, scale=0.6)
"""

import os
from typing import NamedTuple

import torch

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.formats import files
from functional_sd3.formats.default_dtype import Dtype
from functional_sd3.formats.tensors import open_tensors
from functional_sd3.layouts.ip_adapter import FORMAT
from functional_sd3.transformer import ip_adapter
from functional_sd3.weights import read
from functional_sd3.weights.read import ComponentFiles


class IPAdapter(NamedTuple):
    """Parameters and config, the first arguments of `ip_adapter.apply`."""

    params: Params
    config: ip_adapter.Config


def load(
    path: str | os.PathLike,
    *,
    dtype: Dtype = None,
    device: torch.device | str = "cpu",
    finite: bool = True,
) -> IPAdapter:
    """The IP-Adapter in a file; its config is read off the shapes. dtype: as in `weights.load`.
    finite: whether NaN and infinities are refused.

    Raises WeightsError naming everything that is wrong with the file.
    """
    return IPAdapter(*read.load(find(path), dtype=dtype, device=device, finite=finite))


def find(path: str | os.PathLike) -> ComponentFiles:
    """The tensors that `load` reads, with no value read yet. Raises WeightsError for what is no file of tensors."""
    return ComponentFiles("IP-Adapter", FORMAT, str(path), open_tensors(path))


def save(path: str | os.PathLike, adapter: IPAdapter, *, dtype: torch.dtype | None = None) -> None:
    """Write the file, whole or not at all. Raises WeightsError when the parameters do not fit the config."""
    tensors = FORMAT.tensors(adapter.config, tree.flatten_paths(adapter.params))
    files.write_atomic(path, tensors, metadata={"format": "pt"}, dtype=dtype)
