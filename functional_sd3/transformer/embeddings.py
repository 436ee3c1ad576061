"""How time and place enter the transformer: sinusoids of t, and a 2-D sinusoidal table of positions."""

import math

import torch
from torch import Tensor

TIME_SCALE = 1000.0
"""The checkpoints read time as timesteps in [0, 1000]; everywhere else in this library t is in [0, 1]."""


def time_sinusoid(t: Tensor, size: int = 256) -> Tensor:
    """Cosines, then sines of 1000 t at frequencies 10000^(-k / (size / 2)).

    t (...) in [0, 1] -> (..., size), float32 whatever t's dtype (Vaswani et al. 2017, with DDPM's order of halves).
    """
    half = size // 2
    exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = (TIME_SCALE * t.float())[..., None] * torch.exp(exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(width: int, size: int, base_size: int) -> Tensor:
    """The positions of a size x size grid, row by row: (1, size * size, width), float32.

    The first half of `width` encodes the column, the second the row, each as sines, then cosines. Coordinates run from
    0 to base_size whatever the size, so neighbours are base_size / size apart: SD3 trains at base_size = 64 and crops
    the middle of a larger table. Computed in float64 and equal, bit for bit, to diffusers' buffer.

    Raises ValueError when `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} of a position table must be a multiple of 4: sine, cosine of row, column")
    coordinates = torch.arange(size, dtype=torch.float32) / (size / base_size)
    quarter = torch.arange(width // 4, dtype=torch.float64) / (width / 4)
    angles = torch.outer(coordinates.double(), 1.0 / 10000.0**quarter)
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    columns = line[None, :, :].expand(size, size, -1)
    rows = line[:, None, :].expand(size, size, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, size * size, width)


def crop_positions(table: Tensor, height: int, width: int) -> Tensor:
    """The middle height x width of a square table (1, size * size, channels) -> (1, height * width, channels).

    Raises ValueError when the grid does not fit into the table.
    """
    size = math.isqrt(table.shape[1])
    if height > size or width > size:
        raise ValueError(f"a grid of {height} x {width} patches does not fit the position table of {size} x {size}")
    top, left = (size - height) // 2, (size - width) // 2
    square = table.unflatten(1, (size, size))
    return square[:, top : top + height, left : left + width].flatten(1, 2)
