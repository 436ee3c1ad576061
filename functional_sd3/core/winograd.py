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
ROWS_AT_ONCE, SMALL_KERNEL = 4, 1 << 20
"""Rows of tiles that go through a product together, and the numbers of a kernel that is read as fast for each row."""

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
    into, kernel_map, back = (torch.tensor(matrix, device=x.device) for matrix in (_WINDOW, _KERNEL, _OUTPUT))
    # Across before down, as the windows are mapped below.
    kernel = torch.kron(kernel_map, kernel_map) @ weight.permute(3, 2, 1, 0).reshape(KERNEL**2, -1)
    kernel = kernel.view(WINDOW**2, inputs, outputs)
    step = min(rows, 1 if kernel.numel() <= SMALL_KERNEL else ROWS_AT_ONCE)
    # The same memory for every part: fresh pages cost more than the arithmetic on them.
    strip = x.new_zeros(WINDOW, x.shape[-1] + 2, inputs)
    mapped = torch.empty_like(strip)
    count = step * columns
    first, second = x.new_empty(2, WINDOW**2 * count * max(inputs, outputs))
    windows, mixed = (memory[: WINDOW**2 * count * inputs] for memory in (first, second))
    products, halves = first[: WINDOW**2 * count * outputs], second[: TILE * WINDOW * count * outputs]
    tiles = x.new_empty(TILE, TILE, step, columns, outputs)
    found = x.new_empty(batch, rows, TILE, columns, TILE, outputs)
    for picture, image in zip(found, x.permute(0, 2, 3, 1), strict=True):
        for start in range(0, rows, step):
            start = min(start, rows - step)
            for row in range(step):
                _cut(image, (start + row) * TILE - 1, strip)
                torch.mm(into, strip.view(WINDOW, -1), out=mapped.view(WINDOW, -1))
                windows.view(WINDOW, WINDOW, step, columns, inputs)[:, :, row] = _windows(mapped, columns)
            torch.mm(into, windows.view(WINDOW, -1), out=mixed.view(WINDOW, -1))
            torch.bmm(mixed.view(WINDOW**2, -1, inputs), kernel, out=products.view(WINDOW**2, -1, outputs))
            torch.mm(back, products.view(WINDOW, -1), out=halves.view(TILE, -1))
            torch.bmm(back.expand(TILE, -1, -1), halves.view(TILE, WINDOW, -1), out=tiles.view(TILE, TILE, -1))
            tiles += bias
            picture[start : start + step] = tiles.permute(2, 1, 3, 0, 4)
    return found.view(batch, *x.shape[-2:], outputs).permute(0, 3, 1, 2)


def _cut(image: Tensor, top: int, strip: Tensor) -> None:
    """Rows `top` to `top` + 6 of image (height, width, channels) into a strip whose first and last columns are zero."""
    above, below = max(0, -top), max(0, top + WINDOW - image.shape[0])
    strip[above : WINDOW - below, 1:-1] = image[top + above : top + WINDOW - below]
    if above:
        strip[:above] = 0
    if below:
        strip[WINDOW - below :] = 0


def _windows(strip: Tensor, columns: int) -> Tensor:
    """The overlapping windows of a strip (6, width + 2, channels) as a view (across, down, columns, channels)."""
    down, right, channel = strip.stride()
    return strip.as_strided((WINDOW, WINDOW, columns, strip.shape[-1]), (right, down, TILE * right, channel))
