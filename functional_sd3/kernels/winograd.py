"""3x3 convolutions with a quarter of the multiplications.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.3, F(4x4, 3x3): a 6x6 window of the
image and the kernel are each mapped to 36 numbers, in which the convolution to 4x4 outputs is a product of numbers,
so 36 products do the work of 144. The maps are Toom and Cook's: values of polynomials at six points, one of them
infinity. With the points below a result of 256 channels is within 1.5e-6 of the exact one; with the usual 0, 1, -1, 2
and -2 within 3e-6, by the direct sum in channels_last within 8e-7.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from functional_sd3.core import layers
from functional_sd3.core.types import Params
from functional_sd3.kernels import norms, products

TILE, KERNEL = 4, 3
WINDOW = TILE + KERNEL - 1
POINTS = [Fraction(point) for point in ("0", "5/8", "-5/8", "3/2", "-3/2")]
ROWS_AT_ONCE, TILES_AT_ONCE, SMALL_KERNEL = 4, 64, 1 << 20
"""Rows of tiles that go through a product together, or more until there are so many tiles; and the numbers of a kernel
that is read as fast for each row."""
KEPT = 1 << 22
"""Numbers of a mapped kernel in one tensor, well below the 32 MB from which on the C library maps new pages each
time, on which mapping takes nearly four times as long."""

Matrix = list[list[float]]


def _maps(points: list[Fraction]) -> tuple[Matrix, Matrix, Matrix]:
    """Matrices from a window (6, 6), from a kernel (6, 3) and to the outputs (4, 6), along one side.

    The last row or column is the point at infinity. Rows are scaled by powers of two, exactly, to a norm near one.
    """
    window: Matrix = []
    kernel: Matrix = []
    outputs: Matrix = [[] for _ in range(TILE)]
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


def fits_conv2d(params: Params, x: Tensor, *, stride: int = 1, padding: int = 0) -> bool:
    """3x3 convolutions of large float32 images on a CPU, where this is the faster way.

    On processors whose line of `products` has winograd. A GPU's library chooses for itself, and half precision would
    lose what the transforms' large constants need.
    """
    return stride == 1 and padding == 1 and _pays(params, x)


def conv2d(params: Params, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """`layers.conv2d`."""
    return convolve(layers.dequantized_weight(params, x.dtype), params["bias"], x)


def fits_upsample_conv2d(params: Params, x: Tensor) -> bool:
    """True where `fits_conv2d` is, by the size of the result."""
    return _pays(params, x, scale=2)


def upsample_conv2d(params: Params, x: Tensor) -> Tensor:
    """`layers.upsample_conv2d`, without the upsampled image in memory."""
    return convolve(layers.dequantized_weight(params, x.dtype), params["bias"], x, scale=2)


def fits_residual_block(params: Params, x: Tensor, groups: int, eps: float) -> bool:
    """Both convolutions as in `fits_conv2d`."""
    return _pays(params["conv1"], x) and _pays(params["conv2"], x)


def residual_block(params: Params, x: Tensor, groups: int, eps: float) -> Tensor:
    """`layers.residual_block` in one tensor of its own: fresh pages cost as much as the arithmetic on them."""
    h = layers.group_norm_silu(params["norm1"], x, groups, eps)
    outputs, inputs = params["conv1"]["weight"].shape[:2]
    weight = layers.dequantized_weight(params["conv1"], x.dtype)
    h = convolve(weight, params["conv1"]["bias"], h, inplace=outputs == inputs)
    if norms.fits_group_norm(params["norm2"], h, groups, eps):
        h = norms.group_norm_into(params["norm2"], h, groups, eps, h, silu=True)
    else:
        h = layers.group_norm_silu(params["norm2"], h, groups, eps)
    shortcut = layers.conv2d(params["shortcut"], x) if "shortcut" in params else x
    weight = layers.dequantized_weight(params["conv2"], x.dtype)
    return convolve(weight, params["conv2"]["bias"], h, residual=shortcut, inplace=True)


def _pays(params: Params, x: Tensor, scale: int = 1) -> bool:
    weight = params["weight"]
    if not products.CHOICE.winograd or "low_rank" in params or weight.shape[2:] != (3, 3) or not products.fits(x):
        return False
    height, width = (scale * side for side in x.shape[-2:])
    wide = min(weight.shape[:2]) >= 64 and height * width >= 1024 and not (height % TILE or width % TILE)
    return wide and x.is_contiguous(memory_format=torch.channels_last)


def convolve(
    weight: Tensor, bias: Tensor, x: Tensor, *, scale: int = 1, residual: Tensor | None = None, inplace: bool = False
) -> Tensor:
    """x (batch, inputs, height, width) in channels_last -> (batch, outputs, scale * height, scale * width), multiples
    of 4.

    The same as `F.conv2d(x, weight, bias, padding=1)`, of x enlarged with every pixel `scale` times a side, and
    `residual` added. `inplace`: into the memory of x, which must be of the result's shape. It writes into tensors of
    its own or into x, so it is not for tensors that are differentiated or mapped.
    """
    outputs, inputs = weight.shape[:2]
    batch, (rows, columns) = x.shape[0], (scale * side // TILE for side in x.shape[-2:])
    maps = _WINDOW, _KERNEL, _OUTPUT
    into, kernel_map, back = (torch.tensor(matrix, dtype=x.dtype, device=x.device) for matrix in maps)
    kernels = _map_kernel(kernel_map, weight)
    many = max(ROWS_AT_ONCE, TILES_AT_ONCE // columns)
    step = min(rows, 1 if WINDOW**2 * inputs * outputs <= SMALL_KERNEL else many)
    # The same memory for every part: fresh pages cost more than the arithmetic on them.
    strip = x.new_zeros(WINDOW, scale * x.shape[-1] + 2, inputs)
    mapped = torch.empty_like(strip)
    count = step * columns
    first, second = x.new_empty(2, WINDOW**2 * count * max(inputs, outputs))
    windows, mixed = (memory[: WINDOW**2 * count * inputs] for memory in (first, second))
    products, halves = first[: WINDOW**2 * count * outputs], second[: TILE * WINDOW * count * outputs]
    sizes = [len(kernel) for kernel in kernels]
    pairs = zip(
        mixed.view(WINDOW**2, -1, inputs).split(sizes), products.view(WINDOW**2, -1, outputs).split(sizes), strict=True
    )
    steps = [(kernel, *pair) for kernel, pair in zip(kernels, pairs, strict=True)]
    tiles = x.new_empty(TILE, TILE, step, columns, outputs)
    images = x.permute(0, 2, 3, 1)
    result = images if inplace else x.new_empty(batch, rows * TILE, columns * TILE, outputs)
    added = [None] * batch if residual is None else _in_tiles(residual.permute(0, 2, 3, 1))
    for image, out, more in zip(images, _in_tiles(result), added, strict=True):
        done = None
        for start in range(0, rows, step):
            start = min(start, rows - step)
            for row in range(step):
                _cut(image, (start + row) * TILE - 1, strip, scale)
                torch.mm(into, strip.view(WINDOW, -1), out=mapped.view(WINDOW, -1))
                windows.view(WINDOW, WINDOW, step, columns, inputs)[:, :, row] = _windows(mapped, columns)
            # Only here, since these windows have read the last rows of what may be overwritten.
            _put(tiles, out, done, more)
            torch.mm(into, windows.view(WINDOW, -1), out=mixed.view(WINDOW, -1))
            for kernel, part, product in steps:
                torch.bmm(part, kernel, out=product)
            torch.mm(back, products.view(WINDOW, -1), out=halves.view(TILE, -1))
            torch.bmm(back.expand(TILE, -1, -1), halves.view(TILE, WINDOW, -1), out=tiles.view(TILE, TILE, -1))
            tiles += bias
            done = slice(start, start + step)
        _put(tiles, out, done, more)
    return result.permute(0, 3, 1, 2)


def _map_kernel(kernel_map: Tensor, weight: Tensor) -> list[Tensor]:
    """(36, inputs, outputs) in parts, all of them one after the other."""
    outputs, inputs = weight.shape[:2]
    # Across before down, as the windows are mapped.
    flat = weight.permute(3, 2, 1, 0).reshape(KERNEL**2, -1)
    parts = torch.kron(kernel_map, kernel_map).chunk(math.ceil(WINDOW**2 * flat.shape[1] / KEPT))
    return [(part @ flat).view(-1, inputs, outputs) for part in parts]


def _in_tiles(images: Tensor) -> Tensor:
    """(batch, height, width, channels) as a view (batch, rows, columns, 4 down, 4 across, channels)."""
    return images.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE)).transpose(2, 3)


def _put(tiles: Tensor, out: Tensor, rows: slice | None, residual: Tensor | None) -> None:
    """Tiles (across, down, rows, columns, channels) into these rows of the result; None: no rows."""
    if rows is None:
        return
    transposed = tiles.permute(2, 3, 1, 0, 4)
    if residual is None:
        out[rows] = transposed
    else:
        torch.add(transposed, residual[rows], out=out[rows])


def _cut(image: Tensor, top: int, strip: Tensor, scale: int) -> None:
    """Rows `top` to `top` + 6 of image (height, width, channels), enlarged, into a strip whose first and last columns
    are zero."""
    above, below = max(0, -top), max(0, top + WINDOW - scale * image.shape[0])
    inside, first, last = strip[above : WINDOW - below, 1:-1], top + above, top + WINDOW - below
    if scale == 1:
        inside.copy_(image[first:last])
    else:
        # Row by row: a row of the image is several of the strip.
        for row, place in zip(inside, range(first, last), strict=True):
            row.unflatten(0, (-1, scale)).copy_(image[place // scale].unsqueeze(1))
    if above:
        strip[:above] = 0
    if below:
        strip[WINDOW - below :] = 0


def _windows(strip: Tensor, columns: int) -> Tensor:
    """The overlapping windows of a strip (6, width + 2, channels) as a view (across, down, columns, channels)."""
    down, right, channel = strip.stride()
    return strip.as_strided((WINDOW, WINDOW, columns, strip.shape[-1]), (right, down, TILE * right, channel))
