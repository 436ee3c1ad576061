"""Say what a folder of weights holds, or how a picture was made."""

import argparse
from collections.abc import Iterator
from pathlib import Path

HELP = "say what a folder of weights holds, or how a picture was made"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a folder of weights, or a picture made by generate")
    parser.add_argument("--depth", type=int, default=2, help="levels of the tree to print (default 2; 0 for all)")


def run(arguments: argparse.Namespace) -> int:
    path = Path(arguments.path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    lines = _folder(path, arguments.depth) if path.is_dir() else _picture(path)
    for line in lines:
        print(line)
    return 0


def _picture(path: Path) -> Iterator[str]:
    from functional_sd3.cli import generate

    settings = generate.read_settings(path)
    if settings is None:
        raise ValueError(f"{path} is a picture without the settings of functional-sd3 generate")
    for name, value in settings.items():
        yield f"{name}: {value}"
    yield ""
    yield generate.command(settings)


def _folder(path: Path, depth: int) -> Iterator[str]:
    from functional_sd3 import weights
    from functional_sd3.core import tree

    model = weights.load(path)
    yield f"{path}"
    for name, params in model.params.items():
        yield ""
        yield f"{name}: {_amount(tree.leaves(params))}"
        yield f"  {getattr(model.config, name)}"
        yield from _branch(params, "  ", depth or 1000)
    for name, tables in model.tokenizers._asdict().items():
        if tables is not None:
            yield ""
            yield f"tokenizer of {name}: {tables!r}"
    if model.config.schedule is not None:
        yield ""
        yield f"schedule: {model.config.schedule}"
    yield ""
    yield f"in all: {_amount(tree.leaves(model.params))}"


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
