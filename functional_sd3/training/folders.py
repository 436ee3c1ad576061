"""Files below a data folder; links and names that lead out of it are refused unless they may be followed."""

import os
from pathlib import Path
from typing import NamedTuple

from functional_sd3.formats.errors import reason
from functional_sd3.formats.printable import shorten
from functional_sd3.image.folders import is_shown

_LEADS_OUT = "lies outside of the folder of the data; --follow reads it all the same"


class Listing(NamedTuple):
    """The visible files below a folder, sorted, with / between their parts; `notes` name the folders that were not
    entered.

    follow: what lies outside of the folder, where links and names of metadata lead, may be read.
    """

    folder: Path
    names: tuple[str, ...]
    notes: tuple[str, ...]
    follow: bool

    def refusal(self, name: str) -> str | None:
        """The reason why a file of the folder may not be read; None where it may."""
        try:
            real = os.path.realpath(self.folder / name)
        except (ValueError, OSError) as error:
            return f"is no path: {error}"
        root = os.path.realpath(self.folder)
        inside = real == root or real.startswith(root.rstrip(os.sep) + os.sep)
        return None if inside or self.follow else _LEADS_OUT

    def resolve(self, place: str, name: str) -> tuple[str | None, str]:
        """The path, relative to the folder, of `name` in metadata of the folder `place`; or None and the reason."""
        path = os.path.normpath(os.path.join(place, name))
        if "\\" in name and not os.path.lexists(self.folder / path):
            # Written under Windows.
            path = os.path.normpath(os.path.join(place, name.replace("\\", "/")))
        refused = self.refusal(path)
        if refused:
            return None, refused
        # Absolute paths of files in the folder.
        relative = os.path.relpath(os.path.realpath(self.folder / path), os.path.realpath(self.folder))
        named = path if not os.path.isabs(path) else Path(relative).as_posix()
        return (named if not named.startswith("..") else os.path.abspath(self.folder / path)), ""


def list_files(folder: Path, *, follow: bool = False) -> Listing:
    """The visible files below `folder`. Folders that cannot be read are noted; so are links to folders, unless `follow`
    enters them, each folder once. Raises ValueError when `folder` itself cannot be read."""
    notes: list[str] = []
    names: list[str] = []
    entered = {os.path.realpath(folder)}

    def refuse(error: OSError) -> None:
        if error.filename is None or os.path.samefile(error.filename, folder):
            raise ValueError(f"{folder} cannot be read: {reason(error)}") from None
        notes.append(f"folder {shorten(_relative(error.filename, folder))} cannot be read: {reason(error)}")

    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=follow):
        entered_here = []
        for name in sorted(folders):
            path = os.path.join(root, name)
            if not is_shown(name):
                continue
            if not follow and os.path.islink(path):
                where = shorten(_relative(path, folder))
                notes.append(f"folder {where} is a link and not entered; --follow enters it")
                continue
            real = os.path.realpath(path)
            if follow and real in entered:
                continue
            entered.add(real)
            entered_here.append(name)
        folders[:] = entered_here
        names += [_relative(os.path.join(root, name), folder) for name in files if is_shown(name)]
    return Listing(folder, tuple(sorted(names)), tuple(notes), follow)


def _relative(path: str, folder: Path) -> str:
    return Path(path).relative_to(folder).as_posix()
