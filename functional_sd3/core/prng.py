"""Random numbers as functions of an explicit key: Threefry-2x32 with the counters `jax.random` uses by default.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". A key is an int64 tensor (..., 2) of two 32-bit
words; element i of a draw is the cipher of the 64-bit counter i (JAX's `jax_threefry_partitionable`), so it depends on
the key and on i alone: the same on any device and in any batch. `bits`, `uniform`, `split`, `fold_in`, `randint`,
`bernoulli` and `permutation` equal `jax.random`'s bit for bit; `normal` within a few units in the last place. A
network's results for the same draw are equal up to rounding, about 1e-7 in float32: with another number of threads,
batch size or processor sums are taken in another order.

Keys may be batched: (..., 2) gives (..., *shape), each row being the draw of its key alone. A key is used once: split
it, fold into it or draw from it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from functional_sd3.core.dispatch import op
from functional_sd3.core.types import Key

Shape = int | Sequence[int]

_WORD = 0xFFFFFFFF
PARITY = 0x1BD11BDA
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Giles 2010, "Approximating the erfinv function", single precision: highest power first.
ERFINV_CENTRE = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    2.1858087e-04,
    -1.25372503e-03,
    -4.17768164e-03,
    0.246640727,
    1.50140941,
)
ERFINV_TAILS = (
    -2.00214257e-04,
    1.00950558e-04,
    1.34934322e-03,
    -3.67342844e-03,
    5.73950773e-03,
    -7.6224613e-03,
    9.43887047e-03,
    1.00167406,
    2.83297682,
)


class Part(tuple[int, ...]):
    """The shape of a part of a draw: `size` indices from `start` on of dimension `dim` of the shape `whole`.

    `normal(key, Part(whole, dim, start, size))` is `normal(key, whole).narrow(dim, start, size)`, bit for bit, of which
    only this part is computed; likewise every other draw.
    """

    whole: tuple[int, ...]
    dim: int
    start: int

    def __new__(cls, whole: Sequence[int], dim: int, start: int, size: int) -> "Part":
        part = super().__new__(cls, (*whole[:dim], size, *whole[dim + 1 :]))
        part.whole, part.dim, part.start = tuple(whole), dim, start
        return part

    def positions(self, numbers: Tensor) -> Tensor:
        """Positions in the whole of elements of the part, by their own ones."""
        inner = math.prod(self.whole[self.dim + 1 :])
        own = inner * self[self.dim]
        return numbers // own * (inner * self.whole[self.dim]) + self.start * inner + numbers % own

    def counters(self, device: torch.device) -> Tensor:
        """Positions of its elements in the whole, int64 (elements,)."""
        inner = math.prod(self.whole[self.dim + 1 :])
        first, last = self.start * inner, (self.start + self[self.dim]) * inner
        outer = torch.arange(math.prod(self.whole[: self.dim]), device=device, dtype=torch.int64)
        rows = torch.arange(first, last, device=device, dtype=torch.int64)
        return (outer[:, None] * (inner * self.whole[self.dim]) + rows).reshape(-1)


def key(seed: int | Tensor, *, device: torch.device | str | None = None) -> Key:
    """The key of a seed: int64 (2,), or (..., 2) for an integer tensor (...), on `device`: the CPU by default.

    Seeds in [-2**31, 2**32) give the words (0, seed mod 2**32), as `jax.random.key` does; wider ones keep both words,
    (seed >> 32, seed mod 2**32), as JAX does in 64-bit mode. Raises ValueError outside [-2**63, 2**64).
    """
    if isinstance(seed, Tensor):
        if seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool:
            raise ValueError(f"seed has dtype {seed.dtype}; a seed is an integer")
        seeds = seed.to(device or seed.device, torch.int64)
        fits = (seeds >= -(2**31)) & (seeds < 2**32)
        return torch.stack((torch.where(fits, 0, (seeds >> 32) & _WORD), seeds & _WORD), dim=-1)
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise ValueError(f"seed {seed!r} is not an integer")
    seed = seed.__index__()
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed {seed} does not fit in 64 bits")
    high = 0 if -(2**31) <= seed < 2**32 else (seed >> 32) & _WORD
    return torch.tensor((high, seed & _WORD), dtype=torch.int64, device=device or "cpu")


def split(key: Key, n: Shape = 2) -> Key:
    """`n` independent keys, (..., n, 2); a tuple gives (..., *n, 2)."""
    return _key(*_draw(key, _shape(n)))


def fold_in(key: Key, data: int | Tensor) -> Key:
    """A key derived from `key` and a number, such as a step or the index of a sample.

    `data`: an int in [-2**31, 2**32), taken mod 2**32, or an integer tensor that broadcasts with the key's batch.
    """
    check_key(key)
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex():
            raise ValueError(f"data has dtype {data.dtype}; fold_in takes integers")
        data = data.to(key.device, torch.int64)
    elif not hasattr(data, "__index__"):
        raise ValueError(f"data {data!r} is not an integer")
    elif not -(2**31) <= data < 2**32:
        raise ValueError(f"data {data} does not fit in 32 bits; fold in its high and low words one after the other")
    data = data if isinstance(data, Tensor) else torch.tensor(data, device=key.device, dtype=torch.int64)
    first, second = key.to(torch.int32).unbind(-1)
    return _key(*threefry(first, second, data.to(torch.int32)))


def sample_keys(key: Key | None, count: int, each: str = "sample") -> Key:
    """A key for each of `count` samples, (count, 2): `fold_in(key, i)` of one key (2,), or keys (count, 2) as they are.

    So the draws of a sample do not depend on its batch. `each`: the word for a sample in the ValueError for another
    number of keys and for None.
    """
    if key is None:
        raise ValueError(f"no key to draw from for each {each}: give key=prng.key(seed)")
    check_key(key)
    if key.ndim == 1:
        return fold_in(key, torch.arange(count, device=key.device, dtype=torch.int64))
    if key.ndim > 2 or len(key) != count:
        raise ValueError(f"{len(key)} keys for {count} {each}s; give one key, or one for each {each}")
    return key


def bits(key: Key, shape: Shape = ()) -> Tensor:
    """32 random bits per element: int64 (..., *shape) in [0, 2**32)."""
    return _unsigned(_bits(key, _shape(shape)))


def uniform(
    key: Key,
    shape: Shape = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    minval: float | Tensor = 0.0,
    maxval: float | Tensor = 1.0,
) -> Tensor:
    """Uniform on [minval, maxval), (..., *shape); `device` defaults to the key's.

    float32 has 23 random bits and float64 52, as in JAX. Narrower dtypes are float32 draws, rounded at the end (which
    may round up to `maxval`). Tensor bounds broadcast with (..., *shape).
    """
    _check_floating(dtype)
    shape = _shape(shape)
    key = key if device is None else key.to(device)
    if dtype == torch.float64:
        first, second = map(_unsigned, _draw(key, shape))
        draw = (first << 20 | second >> 12).to(torch.float64).mul_(2.0**-52)
    else:
        draw = _shift_right_inplace(_bits(key, shape), 9).to(torch.float32).mul_(2.0**-23)
    if isinstance(minval, Tensor) or isinstance(maxval, Tensor) or (minval, maxval) != (0.0, 1.0):
        low, high = (torch.as_tensor(bound, dtype=draw.dtype, device=draw.device) for bound in (minval, maxval))
        draw = _scale(draw, high - low, low)
    return draw.to(dtype)


def _scale(draw: Tensor, span: Tensor, low: Tensor) -> Tensor:
    """draw * span + low rounded once, as the fused instruction JAX compiles to does."""
    if draw.dtype == torch.float64 or draw.device.type == "mps":  # no double precision there
        return draw * span + low
    return (draw.double() * span.double() + low.double()).to(draw.dtype)


def normal(
    key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Standard Gaussian, (..., *shape): sqrt(2) erfinv(u), u uniform on (-1, 1); `device` defaults to the key's.

    Narrower dtypes than float32 are float32 draws, rounded at the end.
    """
    _check_floating(dtype)
    if dtype == torch.float64:
        draw = uniform(key, shape, dtype, device).mul_(2.0).add_(-1.0 + 2.0**-53)
        return draw.erfinv_().mul_(math.sqrt(2.0))
    draw = uniform(key, shape, torch.float32, device)
    return gaussian(draw).to(dtype)


@op
def gaussian(draw: Tensor) -> Tensor:
    """sqrt(2) erfinv(u), u on (-1, 1), of float32 numbers `draw` in [0, 1)."""
    return _erfinv(draw.mul(2.0).add_(-1.0 + 2.0**-24)).mul_(math.sqrt(2.0))


def _erfinv(x: Tensor) -> Tensor:
    """The single precision approximation JAX uses; torch's own is more accurate and differs by 90 ulp in the tails."""
    w = (-x * x).log1p_().neg_()
    centre = torch.full_like(w, ERFINV_CENTRE[0])
    tails = torch.full_like(w, ERFINV_TAILS[0])
    from_centre, from_tails = w - 2.5, w.sqrt() - 3.0
    for near, far in zip(ERFINV_CENTRE[1:], ERFINV_TAILS[1:], strict=True):
        centre.mul_(from_centre).add_(near)
        tails.mul_(from_tails).add_(far)
    return torch.where(w < 5.0, centre, tails).mul_(x)


def bernoulli(key: Key, p: float | Tensor = 0.5, shape: Shape | None = None) -> Tensor:
    """True with probability `p`: bool (..., *shape); the shape defaults to p's."""
    if shape is None:
        shape = tuple(p.shape) if isinstance(p, Tensor) else ()
    return uniform(key, shape) < (p.to(key.device, torch.float32) if isinstance(p, Tensor) else p)


def randint(key: Key, shape: Shape, minval: int | Tensor, maxval: int | Tensor) -> Tensor:
    """Integers in [minval, maxval): int64 (..., *shape). Bounds lie within the 32-bit integers; tensors broadcast.

    Equal to `jax.random.randint(..., dtype=int32)`, whose bias is below span / 2**32.
    """
    for name, bound in (("minval", minval), ("maxval", maxval)):
        if isinstance(bound, int) and not -(2**31) <= bound <= 2**31 - (name == "minval"):
            raise ValueError(f"{name} {bound} is outside the 32-bit integers")
    if isinstance(minval, int) and isinstance(maxval, int) and minval >= maxval:
        raise ValueError(f"minval {minval} must be below maxval {maxval}")
    shape = _shape(shape)
    keys = split(key)
    high, low = bits(keys[..., 0, :], shape), bits(keys[..., 1, :], shape)
    span = maxval - minval
    if isinstance(span, Tensor):
        span = span.to(high.device, torch.int64).clamp(min=1)
        minval = minval.to(high.device, torch.int64) if isinstance(minval, Tensor) else minval
    # 2**32 mod span in 32-bit words, whose square overflows to 0 for wide spans: part of the definition being matched.
    multiplier = 2**16 % span
    multiplier = ((multiplier * multiplier) & _WORD) % span
    return (high % span * multiplier + low % span) % span + minval


def permutation(key: Key, x: int | Tensor) -> Tensor:
    """A random order of range(x), (..., x), or of the rows of a tensor: (..., *x.shape).

    Sorts by random bits, stably, often enough that ties do not matter: the order of `jax.random.permutation`.
    """
    if isinstance(x, Tensor):
        if x.ndim == 0:
            raise ValueError("permutation takes a length or a tensor of at least one dimension, not a scalar tensor")
        return x[permutation(key, x.shape[0])]
    if x < 0:
        raise ValueError(f"length {x} of a permutation must be at least 0")
    check_key(key)
    order = torch.arange(x, device=key.device, dtype=torch.int64).expand(*key.shape[:-1], x)
    for _ in range(math.ceil(3 * math.log(max(1, x)) / math.log(_WORD))):
        keys = split(key)
        key, sub = keys[..., 0, :], keys[..., 1, :]
        order = order.gather(-1, bits(sub, x).argsort(dim=-1, stable=True))
    return order


def _shape(shape: Shape) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else shape if isinstance(shape, Part) else tuple(shape)


def _check_floating(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype} is not a floating point type; use bits or randint for integers")


def check_key(key: Key) -> None:
    """Raises ValueError unless key is an int64 tensor (..., 2)."""
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.ndim < 1 or key.shape[-1] != 2:
        described = f"{key.dtype} {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
        raise ValueError(f"key is {described}; a key is an int64 tensor (..., 2), made by prng.key(seed)")


# The cipher's words are int32 below: half the memory of int64, and sums overflow as in the cipher.


def _key(first: Tensor, second: Tensor) -> Key:
    return _unsigned(torch.stack((first, second), dim=-1))


def _unsigned(words: Tensor) -> Tensor:
    """Words as numbers in [0, 2**32)."""
    return words.to(torch.int64).bitwise_and_(_WORD)


def _shift_right_inplace(words: Tensor, places: int) -> Tensor:
    """Logical right shift of `words`, in place."""
    return words.bitwise_right_shift_(places).bitwise_and_((1 << (32 - places)) - 1)


def _bits(key: Key, shape: tuple[int, ...]) -> Tensor:
    first, second = _draw(key, shape)
    return first.bitwise_xor_(second)


def _draw(key: Key, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The two words of the cipher of the counters 0, 1, 2, ...: each (..., *shape)."""
    check_key(key)
    batch, whole = key.shape[:-1], shape.whole if isinstance(shape, Part) else shape
    size = math.prod(whole)
    counter = shape.counters(key.device) if isinstance(shape, Part) else None
    if size <= 2**31:
        high = None
        low = torch.arange(size, device=key.device, dtype=torch.int32) if counter is None else counter.to(torch.int32)
    else:
        counter = torch.arange(size, device=key.device, dtype=torch.int64) if counter is None else counter
        high, low = (counter >> 32).to(torch.int32), counter.to(torch.int32)
    words = key.to(torch.int32)
    first, second = threefry(words[..., 0, None], words[..., 1, None], low, high)
    return first.reshape((*batch, *shape)), second.reshape((*batch, *shape))


@op
def threefry(key0: Tensor, key1: Tensor, low: Tensor, high: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 with 20 rounds of the counter high * 2**32 + low (`high` None: 0); all words int32, broadcast."""
    schedule = (key0, key1, key0 ^ key1 ^ PARITY)
    second = key1 + low
    # Both words get the full shape (and vmap's batch) here, so the in-place operations below write into new tensors.
    first = key0 + (torch.zeros_like(second) if high is None else high)
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            first += second
            second = (second << rotation).bitwise_or_(_shift_right_inplace(second, 32 - rotation))
            second ^= first
        first += schedule[(group + 1) % 3]
        second += schedule[(group + 2) % 3] + (group + 1)
    return first, second
