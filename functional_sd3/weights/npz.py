"""Arrays by name in .npz files: read whole or not at all, written atomically; nothing in them is executed."""

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from functional_sd3.formats.errors import WeightsError, reason
from functional_sd3.weights.atomic import replace_file


def read(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """Every array of a file. Raises WeightsError when it is missing, or broken and so no .npz file of `what`."""
    import numpy

    try:
        file = open(path, "rb")
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened: {reason(error)}") from error
    with file:
        try:
            # An .npy file gives an array, which has no names.
            found = numpy.load(file, allow_pickle=False)
            return {name: found[name] for name in found.files}
        except (OSError, ValueError, EOFError, AttributeError, KeyError, zlib.error, zipfile.BadZipFile) as error:
            raise WeightsError(f"{path}: is not an .npz file of {what}: {error}") from error


def write(path: str | os.PathLike, entries: Mapping[str, Any]) -> None:
    """Arrays, numbers and texts; the name of the file is kept as it is. Raises WeightsError when the system refuses."""
    import numpy

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            numpy.savez(file, **entries)

    replace_file(path, fill)
