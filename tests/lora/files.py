"""LoRA files written tensor by tensor."""

import torch
from safetensors.torch import save_file


def pair(inputs=16, outputs=16, rank=2):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


def write(path, tensors, **metadata):
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata or None)
    return path
