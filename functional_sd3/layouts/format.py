"""Format: one way in which one kind of parameter tree is stored, as a row of data from which it is read and written."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from functional_sd3.core import spec as specs
from functional_sd3.core.types import Tree
from functional_sd3.formats.errors import WeightsError
from functional_sd3.layouts import config_fields, infer, rules
from functional_sd3.layouts.config_fields import Table
from functional_sd3.layouts.infer import Shapes
from functional_sd3.layouts.rules import Layout


@dataclass(frozen=True, eq=False)
class Format:
    """A layout below a prefix. Formats are distinguished by content: `sign` is a pattern at the start of some of its
    names (without the prefix) and of none of another format's.

    owner: whose names these are. component: name of the tree; "clip" where the names do not tell L from G. spec: config
    -> tree. names: the layout as far as it does not depend on sizes; sized: the whole, given the config, where that is
    more. infer: the config from shapes below the prefix; its second argument, `drops_ones`, is True if leading
    dimensions of 1 may be absent. table: the fields of the config's file, within whose bounds an inferred config lies.
    """

    owner: str
    component: str
    prefix: str
    sign: str
    spec: Callable[[Any], Tree]
    names: Layout
    infer: Callable[[Shapes, bool], Any]
    table: Table | None = None
    sized: Callable[[Any], Layout] | None = None

    def has(self, name: str) -> bool:
        """True for a name that is a sign of this format."""
        return name.startswith(self.prefix) and re.match(self.sign, name[len(self.prefix) :]) is not None

    def layout(self, config: Any) -> Layout:
        """The rules of a tree of these sizes, with the prefix."""
        return rules.prefixed(self.sized(config) if self.sized else self.names, self.prefix)

    def config(self, shapes: Shapes, drops_ones: bool = False) -> Any:
        """The config of the tree that these tensors (names with the prefix) are. Raises WeightsError naming the one
        without which the sizes cannot be read."""
        proper = rules.canonical(self.names, (name[len(self.prefix) :] for name in shapes))
        try:
            config = self.infer({one: shapes[self.prefix + name] for one, name in proper.items()}, drops_ones)
            if self.table is None:
                return config
            return config_fields.read(self.table, config_fields.write(self.table, config), "the shapes")
        except infer.Unreadable as error:
            name = self.prefix + rules.name_of(self.names, error.args[0])
            problem = f"has shape {list(shapes[name])}" if name in shapes else "is missing"
            raise WeightsError(f"{name} {problem}, and the sizes of the model cannot be read without it") from None
        except WeightsError:
            raise
        except (ValueError, ZeroDivisionError) as error:
            raise WeightsError(f"the shapes are those of no model: {error}") from None

    def tensors(self, config: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The leaves of a tree (path -> tensor) under the names of this format, mostly views. Raises WeightsError when
        they do not fit the config."""
        spec = self.spec(config)
        if problems := specs.check(spec, leaves):
            raise WeightsError(problems)
        return rules.to_theirs(self.layout(config), spec, leaves)


def chosen(formats: Mapping[str, Format], names: Any, default: str) -> Format:
    """The format of which some of the names are a sign, else the default."""
    return next((one for one in formats.values() if any(map(one.has, names))), formats[default])
