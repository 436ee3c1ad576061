"""Rewards by name: any Python function, and the PSNR to a target."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sd3.formats.printable import shorten
from functional_sd3.training.rewards.types import Reward


def from_name(name: str) -> Reward:
    """The reward `module:function`; the module is looked for in the working directory too.

    Raises ValueError where there is no such module or function, or the module cannot be imported.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ValueError(f"reward {shorten(repr(name))} must be module:function, such as my_rewards:sharpness")
    folder = os.getcwd()
    added = folder not in sys.path and "" not in sys.path
    try:
        # The path of an installed command lacks the working directory, which `python -m` and scripts have.
        if added:
            sys.path.insert(0, folder)
        loaded: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward {name}: the module {module} cannot be imported: {error}") from error
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)
    for part in function.split("."):
        if not hasattr(loaded, part):
            raise ValueError(f"reward {name}: the module {module} has no {function}")
        loaded = getattr(loaded, part)
    if not callable(loaded):
        raise ValueError(f"reward {name} is {type(loaded).__name__}, not a function of (images, prompts, facts)")
    return loaded


def psnr(target: Tensor, *, most: float = 60.0) -> Reward:
    """Peak signal-to-noise ratio to `target` (3, height, width) in [0, 1], in decibels: the score "psnr".

    `most`: of an image that equals the target, where the ratio is infinite. Differentiable.
    """
    least = 10.0 ** (-most / 10.0)

    def reward(images: Tensor, prompts: Sequence[str], facts: Sequence[Any]) -> Mapping[str, Tensor]:
        if images.shape[1:] != target.shape:
            raise ValueError(f"the target is {list(target.shape)}, the images are {list(images.shape[1:])}")
        errors = (images - target.to(images)).square().flatten(1).mean(1)
        return {"psnr": -10.0 * torch.log10(errors.clamp_min(least))}

    return reward
