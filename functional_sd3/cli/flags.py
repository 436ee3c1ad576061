"""Arguments of Python in a message, written as the options of the command line that set them."""

import argparse
import re
from functools import partial

_OTHER_NAMES = {"shard_bytes": "shard_size"}
"""Argument of a library function -> the option that sets it, where their names differ."""


def with_flags(text: str, options: argparse.Namespace) -> str:
    """The message with arguments of library functions, which raise it, written as options of the command.

    An option is `--name` for the argument `name`. Written so are names of several words ("image_steps 0 must be"), an
    argument with its value ('layout="native"', "offload=True"), and a name at the start before the value that the
    option has ("strength 2 must be"); no part of a path or of a quoted text is.
    """
    names = {name: name for name in vars(options)} | {
        other: name for other, name in _OTHER_NAMES.items() if name in vars(options)
    }
    for name, option in names.items():
        flag = f"--{option.replace('_', '-')}"
        text = re.sub(rf'(?<![\w./:,=-]){name}=(?:"(\w+)"|torch\.(\w+)|True\b)', partial(_option, flag), text)
        if "_" in name:
            text = re.sub(rf"(?<![\w./\\'\"=-]){name}(?![\w./\\'\"=-])", flag, text)
        elif text.startswith(f"{name} {getattr(options, option)} "):
            text = f"--{text}"
    return text


def _option(flag: str, call: re.Match[str]) -> str:
    """The option for NAME="VALUE", NAME=torch.VALUE or NAME=True."""
    value = call[1] or call[2]
    return f"{flag} {value}" if value else flag
