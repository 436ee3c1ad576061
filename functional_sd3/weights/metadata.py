"""Metadata of our own files: the configs of their components, which shapes give only in part, and the version.

The configs are JSON: component (or "schedule") -> the fields of the config file that diffusers or transformers would
write. The version is that of the tensors under our own names (`layouts.native`).
"""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from functional_sd3.formats import json_fields
from functional_sd3.formats.errors import WeightsError
from functional_sd3.formats.files import Mapped
from functional_sd3.formats.printable import shorten
from functional_sd3.layouts import config_fields, native
from functional_sd3.layouts import diffusers_configs as configs
from functional_sd3.layouts.components import SPECS, Config

KEY = "functional_sd3"
VERSION_KEY = "functional_sd3_version"


def write(config: Config, components: Collection[str]) -> dict[str, str]:
    """The metadata of a file that holds these components."""
    parts = {name: getattr(config, name) for name in (*components, "schedule")}
    values = {name: config_fields.write(configs.TABLES[name], part) for name, part in parts.items() if part is not None}
    return {"format": "pt", KEY: json.dumps(values, sort_keys=True), VERSION_KEY: str(native.VERSION)}


def shared(files: Iterable[Mapped], where: str) -> dict[str, str]:
    """Our own entries in the metadata of a file, or of all shards of one index.

    Raises WeightsError, naming `where`, for shards whose entries differ: they are of several models or versions.
    """
    by_file = {one.path: {key: one.header.metadata.get(key) for key in (KEY, VERSION_KEY)} for one in files}
    (first, shared), *others = by_file.items()
    for path, entries in others:
        for key in entries:
            if entries[key] != shared[key]:
                raise WeightsError(
                    f"{where}: its shards are not those of one model: {first.name} and {path.name} differ in their "
                    f"metadata {key}"
                )
    return {key: text for key, text in shared.items() if text is not None}


def version(metadata: Mapping[str, str], where: str) -> int:
    """The version of a file of ours: 1 where it has none. Raises WeightsError for an unknown one."""
    text = metadata.get(VERSION_KEY, "1")
    if text not in map(str, range(1, native.VERSION + 1)):
        raise WeightsError(
            f"{where}: its metadata {VERSION_KEY} is {shorten(repr(text))}, and this program knows the versions up to "
            f"{native.VERSION}: a newer one wrote it"
        )
    return int(text)


def is_unsaid(metadata: Mapping[str, str]) -> bool:
    """True for files that `weights.save` did not write, or whose metadata another program dropped: they hold neither
    configs nor a version."""
    return KEY not in metadata and VERSION_KEY not in metadata


def read(metadata: Mapping[str, str], where: str) -> dict[str, Any] | None:
    """Component or "schedule" -> config; None for a file without. Raises WeightsError naming `where`."""
    if KEY not in metadata:
        return None
    described = json_fields.parse_object(metadata[KEY], f"{where}: its metadata {KEY}")
    fields = {name: described.mapping(name) for name in (*SPECS, "schedule") if name in described.values}
    return {
        name: config_fields.read(configs.TABLES[name], dict(part.values), f"{where}: metadata {name}")
        for name, part in fields.items()
    }
