"""Checks of the networks' inputs: ValueErrors that name the argument."""

from torch import Tensor

from functional_sd3.core.checks import check_channels, check_floating, check_time


def check_shape(name: str, x: Tensor, meaning: str, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError unless x has this shape, None standing for any size."""
    if x.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} {list(x.shape)} must be {meaning} = ({wanted})")


def check_times(t: Tensor, batch: int) -> None:
    """Raises ValueError unless t is floating and () or (batch,)."""
    check_time(t)
    if t.ndim > 1 or (t.ndim and t.shape[0] not in (1, batch)):
        raise ValueError(f"t {list(t.shape)} must be () or ({batch},), a time for each of the latents")


def check_latents(name: str, latents: Tensor, channels: int, patch_size: int) -> None:
    """Raises ValueError unless latents are floating, (batch, channels, height, width) and whole patches."""
    check_floating(name, latents)
    check_channels(name, latents, channels)
    for axis, side in zip(("height", "width"), latents.shape[-2:], strict=True):
        below = side // patch_size * patch_size
        above = below + patch_size
        if side != below or not side:
            nearest = f"nearest are {below} and {above}" if below else f"the least is {above}"
            raise ValueError(f"{name}: {axis} {side} is not a multiple of the patch size {patch_size}; {nearest}")
