"""Say what weights of any form hold, how they differ from others, or how an image was made."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from functional_sd3.cli import options, report

HELP = "say what weights of any form hold, how they differ from others, or how an image was made"
_MAX_SHOWN, _MAX_LINES = 20, 200
_MAX_KEPT = 20_000
"""Characters of the list of weights that `quantize --max-error` kept in floats: those of SD3.5-large."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a folder or file of weights, or an image drawn by this program")
    options.add_variant(parser)
    parser.add_argument("--depth", type=int, default=2, help="levels of the tree to print (default 2; 0 for all)")
    parser.add_argument("--quick", action="store_true", help="do not look through the values for NaN and infinities")
    against = "other weights of the same model: print how much every component and layer differs from them"
    parser.add_argument("--against", metavar="DIR", help=against)


def run(arguments: argparse.Namespace) -> int:
    path = Path(arguments.path)
    if not arguments.path:
        raise ValueError("PATH is empty; . is this folder")
    if arguments.path in options.SHIPPED:
        from functional_sd3.weights import shipped

        path = shipped.resolve(path)
    if not path.exists() and not path.is_symlink():
        raise ValueError(f"{path} does not exist")
    if arguments.against:
        from functional_sd3.cli import merge

        lines = merge.differences(path, Path(arguments.against), arguments.variant)
    else:
        lines = _image(path) if _is_image(path) else _weights(path, arguments)
    for line in lines:
        report.say(line)
    return 0


def _is_image(path: Path) -> bool:
    """True for a file that does not start as weights do: what is unknown gets the error of an image."""
    if not path.is_file() or path.suffix == ".safetensors":
        return False
    from functional_sd3.formats import files

    start = files.start(path)
    return not (start[8:9] == b"{" or start.startswith((b"PK\3\4", b"GGUF", b"\x80", b"{")))


def _image(path: Path) -> Iterator[str]:
    from functional_sd3.cli import image_settings

    try:
        record = image_settings.read_record(path)
    except ValueError as error:
        unknown = "of no known format" in str(error)
        raise ValueError(f"{error}, and no weights that are known" if unknown else str(error)) from None
    if record is None:
        raise ValueError(f"{path} is an image without the settings of functional-sd3 generate")
    lines = [line for name, part in record.items() for line in image_settings.lines(name, part)]
    yield from lines[:_MAX_LINES]
    if len(lines) > _MAX_LINES:
        yield f"and {len(lines) - _MAX_LINES} more lines"
    yield ""
    yield image_settings.command(record["command"])


def _weights(path: Path, arguments: argparse.Namespace) -> Iterator[str]:
    from functional_sd3 import weights
    from functional_sd3.core import tree

    depth, values = arguments.depth, not arguments.quick
    try:
        description = weights.describe(path, values=values, variant=arguments.variant)
    except weights.WeightsError:
        # The header of a file that does not load, before the reason.
        if path.is_file() and weights.files.start(path)[8:9] == b"{":
            yield from _header(path, depth)
        raise
    yield f"{path}"
    for part in description.parts:
        yield ""
        yield f"{part.component}: {_amount(tree.leaves(part.tree))}"
        yield f"  {part.format}, in {part.where}" + "".join(f", {words}" for words in _stored(part))
        yield from (f"  {line}" for line in str(part.config).splitlines())
        yield from _values(part.nonfinite, values)
        yield from _branch(part.tree, "  ", depth or 1000)
    for name, tables in description.tokenizers._asdict().items():
        if tables is not None:
            yield ""
            yield f"tokenizer of {name}: {f'{len(tables.vocab)} tokens' if hasattr(tables, 'vocab') else tables}"
    if description.schedule is not None:
        yield ""
        yield f"schedule: {description.schedule}"
    yield ""
    yield f"in all: {_amount([leaf for part in description.parts for leaf in tree.leaves(part.tree)])}"
    for file, entries in description.metadata.items():
        yield from _metadata(f"metadata of {file}", entries)
    yield from description.missing


def _stored(part) -> Iterator[str]:
    if part.scaled:
        yield f"{part.scaled} tensors with scales"
    yield from (f"products of {dtype} in {count} layers" for dtype, count in part.products.items())
    yield from (f"{count} tensors in blocks of {kind}" for kind, count in part.blocks.items())


def _header(path: Path, depth: int) -> Iterator[str]:
    from functional_sd3.formats import files

    header = files.read_header(path)
    yield f"{path}: {len(header.tensors)} tensors"
    shown = list(header.tensors.items())[: _MAX_SHOWN if depth else None]
    for name, entry in shown:
        yield f"  {name} {list(entry.shape)} {str(entry.dtype).removeprefix('torch.')}"
    if len(header.tensors) > len(shown):
        yield f"  and {len(header.tensors) - len(shown)} more (--depth 0 prints all)"
    yield from _metadata("metadata", header.metadata)


def _values(nonfinite, looked: bool) -> Iterator[str]:
    if looked and not nonfinite:
        yield "  all values are finite"
    for name, what in nonfinite[:_MAX_SHOWN]:
        yield f"  {name} holds {what}"
    if len(nonfinite) > _MAX_SHOWN:
        yield f"  and {len(nonfinite) - _MAX_SHOWN} more tensors"


def _metadata(title: str, entries: Mapping[str, str]) -> Iterator[str]:
    for name, value in entries.items():
        # Notes and images in metadata run to megabytes; what `quantize` kept in floats is worth more lines.
        most = _MAX_KEPT if name == "quantization_kept" else 400 if name == "quantization" else 200
        yield f"{title}: {name}: {value if len(value) <= most else value[:most] + '...'}"


def _branch(node, indent: str, depth: int) -> Iterator[str]:
    from functional_sd3.core import tree

    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, child in items:
        if not isinstance(child, (dict, list)):
            yield f"{indent}{name} {list(child.shape)} {str(child.dtype).removeprefix('torch.')}"
        else:
            yield f"{indent}{name}: {_amount(tree.leaves(child))}"
            if depth > 1:
                yield from _branch(child, indent + "  ", depth - 1)


def _amount(leaves) -> str:
    from functional_sd3.core import tree

    kinds = sorted({str(leaf.dtype).removeprefix("torch.") for leaf in leaves})
    tensors = "tensor" if len(leaves) == 1 else "tensors"
    return (
        f"{len(leaves)} {tensors}, {tree.count(leaves):,} numbers, "
        f"{tree.nbytes(leaves) / 2**20:,.1f} MiB of {', '.join(kinds)}"
    )
