"""Sources of the parameters of a run's components: a tree, or a function that reads one component at a time."""

from collections.abc import Callable, Iterator, Mapping

import torch

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.layouts.components import Config
from functional_sd3.text.conditioning import Ids

Components = Mapping[str, Params] | Callable[[str], Params]
"""Name of a component ("clip_l", "clip_g", "t5", "transformer", "vae") -> its parameters.

A tree of parameters is one. A function, such as `weights.fetcher(path)`, is called once for each component when it is
needed, after what it returned before was dropped: the peak of memory is then that of the largest component.
"""


def fetch(components: Components, name: str) -> Params:
    """The parameters of one component."""
    return components(name) if callable(components) else components[name]


def encoder_names(components: Components, config: Config) -> list[str]:
    """The text encoders that there are: those in a tree, or those that the config of a function's model has."""
    if callable(components):
        return [name for name in Ids._fields if getattr(config, name) is not None]
    return [name for name in Ids._fields if name in components]


def move(components: Components, device: torch.device | str) -> Components:
    """The components on a device, each moved when it is read."""
    return changed(components, lambda name, params: tree.to(params, device))


def changed(components: Components, change: Callable[[str, Params], Params]) -> Components:
    """The components as `change(name, params)` makes them, each when it is read."""
    if callable(components):
        return lambda name: change(name, components(name))
    return _Changed(components, change)


class _Changed(Mapping[str, Params]):
    def __init__(self, params: Mapping[str, Params], change: Callable[[str, Params], Params]):
        self.params, self.change = params, change

    def __getitem__(self, name: str) -> Params:
        return self.change(name, self.params[name])

    def __contains__(self, name: object) -> bool:
        return name in self.params

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)


def device_of(transformer: Params) -> torch.device:
    """The device of the transformer's parameters, where a run is computed."""
    return transformer["patch"]["weight"].device
