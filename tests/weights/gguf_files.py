"""GGUF files written by ggml's Python package."""

import gguf
import torch
from gguf import GGMLQuantizationType as Kind


def write(path, tensors, kind, arch="sd3", values=(), order=1) -> dict[str, torch.Tensor]:
    """Matrices in blocks of `kind` where their rows allow, the rest in float32; what they then mean."""
    writer = gguf.GGUFWriter(path, arch)
    for name, value in values:
        writer.add_array(name, value) if isinstance(value, list) else writer.add_string(name, value)
    meant = {}
    for name, value in list(tensors.items())[::order]:
        array = value.numpy()
        fits = array.ndim == 2 and array.shape[1] % 32 == 0
        own = kind if fits or (array.ndim > 1 and kind == Kind.F16) else Kind.F32
        stored = gguf.quants.quantize(array, own)
        writer.add_tensor(name, stored, raw_dtype=own)
        meant[name] = torch.from_numpy(gguf.quants.dequantize(stored, own).reshape(value.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant
