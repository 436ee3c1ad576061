"""3x3 convolutions with a quarter of the multiplications.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.3, F(4x4, 3x3): a 6x6 window of the
picture and the kernel are each mapped to 36 numbers, in which the convolution to 4x4 outputs is a product of numbers,
so 36 products do the work of 144. The maps are Toom and Cook's: values of polynomials at six points, one of them
infinity. With the points below a result of 256 channels is within 1.5e-6 of the exact one; with the usual 0, 1, -1, 2
and -2 within 3e-6, by the direct sum in channels_last within 8e-7.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

TILE, KERNEL = 4, 3
WINDOW = TILE + KERNEL - 1
POINTS = [Fraction(point) for point in ("0", "5/8", "-5/8", "3/2", "-3/2")]
NUMBERS_AT_ONCE = 1 << 19
"""Transformed numbers that are held together: they should stay in the cache."""

Matrix = list[list[float]]


def _maps(points: list[Fraction]) -> tuple[Matrix, Matrix, Matrix]:
    """Matrices from a window (6, 6), from a kernel (6, 3) and to the outputs (4, 6), along one side.

    The last row or column is the point at infinity. Rows are scaled by powers of two, exactly, to a norm near one.
    """
    window, kernel, outputs = [], [], [[] for _ in range(TILE)]
    for point in [*points, None]:
        others = [other for other in points if other is not point]
        product = [Fraction(1)]
        for other in others:
            shifted, scaled = [Fraction(0), *product], [-other * number for number in product] + [Fraction(0)]
            product = [a + b for a, b in zip(shifted, scaled, strict=True)]
        product += [Fraction(0)] * (WINDOW - len(product))
        if point is None:
            row, value = [Fraction(0), Fraction(0), Fraction(1)], [Fraction(k == TILE - 1) for k in range(TILE)]
        else:
            norm = Fraction(1)
            for other in others:
                norm *= point - other
            row, value = [point**k / norm for k in range(KERNEL)], [point**k for k in range(TILE)]
        scale, back = _power(product), _power([number * _power(product) for number in row])
        window.append([float(number / scale) for number in product])
        kernel.append([float(number * scale / back) for number in row])
        for column, number in zip(outputs, value, strict=True):
            column.append(float(number * back))
    return window, kernel, outputs


def _power(numbers: list[Fraction]) -> Fraction:
    """The power of two nearest to the norm."""
    return Fraction(2) ** round(math.log2(math.hypot(*map(float, numbers))))


_WINDOW, _KERNEL, _OUTPUT = _maps(POINTS)


def pays(weight: Tensor, x: Tensor, stride: int, padding: int) -> bool:
    """Whether `convolve` fits this convolution and is the faster way: large float32 pictures on a CPU, nothing else.

    A GPU's library chooses for itself, and half precision would lose what the transforms' large constants need.
    """
    if weight.shape[2:] != (3, 3) or stride != 1 or padding != 1 or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    height, width = x.shape[-2:]
    wide = min(weight.shape[:2]) >= 64 and height * width >= 2048 and not (height % TILE or width % TILE)
    return wide and x.is_contiguous(memory_format=torch.channels_last)


def convolve(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """x (batch, inputs, height, width) in channels_last, sides multiples of 4 -> (batch, outputs, height, width).

    The same as `F.conv2d(x, weight, bias, padding=1)`. It writes into tensors of its own, so it is not for tensors that
    are differentiated or mapped.
    """
    outputs, inputs = weight.shape[:2]
    batch, (rows, columns) = x.shape[0], (side // TILE for side in x.shape[-2:])
    into, kernel_map, back = (_both_ways(matrix, x) for matrix in (_WINDOW, _KERNEL, _OUTPUT))
    kernel = (kernel_map @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(WINDOW**2, inputs, outputs)
    found = x.new_empty(batch, rows, TILE, columns, TILE, outputs)
    # The same memory for every part: fresh pages cost more than the arithmetic on them.
    step = min(rows, max(1, NUMBERS_AT_ONCE // (columns * WINDOW**2 * max(inputs, outputs))))
    windows = x.new_empty(WINDOW, WINDOW, step, columns, inputs)
    mixed = x.new_empty(WINDOW**2, step * columns, inputs)
    products = x.new_empty(WINDOW**2, step * columns, outputs)
    tiles = x.new_empty(TILE, TILE, step, columns, outputs)
    for picture, image in zip(found, _padded(x), strict=True):
        for start in range(0, rows, step):
            row = min(start, rows - step)
            windows.copy_(_windows(image, row, step, columns))
            torch.mm(into, windows.view(WINDOW**2, -1), out=mixed.view(WINDOW**2, -1))
            torch.bmm(mixed, kernel, out=products)
            torch.mm(back, products.view(WINDOW**2, -1), out=tiles.view(TILE**2, -1))
            tiles += bias
            picture[row : row + step] = tiles.permute(2, 0, 3, 1, 4)
    return found.view(batch, *x.shape[-2:], outputs).permute(0, 3, 1, 2)


def _padded(x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> (batch, height + 2, width + 2, channels) with a frame of zeros."""
    batch, channels, height, width = x.shape
    padded = x.new_empty(batch, height + 2, width + 2, channels)
    for edge in (0, -1):
        padded[:, edge], padded[:, :, edge] = 0, 0
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    return padded


def _windows(image: Tensor, row: int, count: int, columns: int) -> Tensor:
    """The overlapping windows of `count` rows of tiles of an image (height + 2, width + 2, channels), as a view."""
    down, right, channel = image.stride()
    return image.as_strided(
        (WINDOW, WINDOW, count, columns, image.shape[-1]),
        (down, right, TILE * down, TILE * right, channel),
        image.storage_offset() + row * TILE * down,
    )


def _both_ways(matrix: Matrix, like: Tensor) -> Tensor:
    """The map of rows and columns at once: the Kronecker product with itself."""
    one = torch.tensor(matrix, dtype=like.dtype, device=like.device)
    return torch.kron(one, one)
