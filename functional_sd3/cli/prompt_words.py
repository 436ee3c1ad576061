"""Prompts from the command line, a file or standard input, and notes on words that look like mistakes."""

import argparse
import errno
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from functional_sd3.cli import options, report
from functional_sd3.formats.printable import shorten

if TYPE_CHECKING:
    from functional_sd3.text.textual_inversion import Word

STANDARD_INPUT = "-"
_MAX_BYTES = 64 * 2**20
_MAX_NAMED = 8
_WEIGHT = r"\([^()]{1,200}:[ ]*[0-9]*\.?[0-9]+\)"
_LORA = r"<lora:([^<>:]{1,200}):?([0-9.]*)[^<>]{0,100}>"


def listed(words: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line, and after them those of `file`: one on each line that is not blank.

    The file, or standard input where it is "-", is text in UTF-8, or in UTF-16 with a byte order mark. Raises
    WeightsError for one that cannot be read, ValueError where there is no prompt at all.
    """
    prompts = list(words)
    if file:
        lines = _text(file).splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
        if len(prompts) == len(words):
            place = "standard input" if file == STANDARD_INPUT else file
            raise ValueError(f"--prompts {file}: {place} holds no prompts, which are its lines")
    if not prompts:
        raise ValueError('no prompt; try: functional-sd3 generate "a large red circle on a white background"')
    return prompts


def note_missing_quotes(prompts: Sequence[str]) -> None:
    """Note that several prompts of one word each may be one prompt without quotes."""
    if len(prompts) > 1 and not any(re.search(r"\s", prompt.strip()) for prompt in prompts):
        one, count = shorten(" ".join(prompts)), len(prompts)
        report.note(f'{count} prompts of one word each give {count} images; one prompt needs quotes: "{one}"')


def note_mistakes(arguments: argparse.Namespace, texts: Sequence[str], words: Sequence["Word"]) -> None:
    """Note what in the prompts looks like a mistake; words: the textual inversions of the run."""
    note_syntax(arguments, texts)
    note_unused(words, texts)
    note_unknown(arguments, texts)


def note_unused(words: Sequence["Word"], texts: Sequence[str]) -> None:
    """Note textual inversions whose word no prompt has: a file's word need not be the file's name."""
    unused = [word.token for word in words if not any(word.token.casefold() in text.casefold() for text in texts)]
    if unused:
        report.note(
            f"no prompt has {', '.join(map(shorten, unused[:_MAX_NAMED]))}, the word that --embedding adds: type it in "
            "the prompt, or give it another name by --embedding WORD=FILE"
        )


def note_unknown(arguments: argparse.Namespace, texts: Sequence[str]) -> None:
    """Note words that the shipped model never learned, if it draws as it was shipped."""
    if not is_shipped(arguments.params) or arguments.embedding or arguments.lora:
        return
    from functional_sd3.recipes import shapes

    known = shapes.vocabulary()
    words = [word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower())]
    unknown = list(dict.fromkeys(word for word in words if word not in known))
    if unknown:
        more = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
        report.note(
            f"the shipped model never learned: {', '.join(map(shorten, unknown[:_MAX_NAMED]))}{more}. "
            f"It knows {', '.join(shapes.SHAPES)}; {', '.join(shapes.COLOURS)}; {', '.join(shapes.RADII)}; "
            'such as "a large red circle on a white background". --params takes other models'
        )


def note_syntax(arguments: argparse.Namespace, texts: Sequence[str]) -> None:
    """Note weights and LoRAs in the notation of AUTOMATIC1111 and ComfyUI that are encoded as text here."""
    weights = [match[0] for text in texts for match in re.finditer(_WEIGHT, text)]
    if weights and not arguments.weighted:
        report.note(f"{shorten(weights[0])} is encoded as it is written; with --weighted the number is a weight")
    loras = [match for text in texts for match in re.finditer(_LORA, text)]
    if loras:
        name, scale = loras[0][1], loras[0][2] or "1"
        report.note(
            f"{shorten(loras[0][0])} is encoded as it is written; a LoRA is given by --lora {shorten(name)}"
            f".safetensors={shorten(scale)}"
        )


def is_shipped(params: Sequence[str] | None) -> bool:
    """True if these --params are a model that comes with the program."""
    if not params:
        return True
    if len(params) > 1:
        return False
    from functional_sd3.weights import shipped

    beside = shipped.folder().resolve().parent
    return params[0] in options.SHIPPED or Path(params[0]).resolve() in [beside / name for name in options.SHIPPED]


def _text(file: str) -> str:
    from functional_sd3.formats import bounded

    if file != STANDARD_INPUT:
        if not Path(file).exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", f"--prompts {file}")
        return bounded.read_text(file, _MAX_BYTES)
    if sys.stdin is None:
        raise ValueError("--prompts -: standard input is closed; give a file, or pipe the prompts in")
    if sys.stdin.isatty():
        report.note("prompts are read from the terminal, one a line, until Ctrl-D")
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        return sys.stdin.read()
    content = stream.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"--prompts -: standard input is longer than {_MAX_BYTES:,} bytes")
    return bounded.decode_text(content, "--prompts -")
