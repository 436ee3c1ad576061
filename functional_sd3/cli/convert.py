"""Write weights in another layout or dtype: any form that loads, to any that can be saved."""

import argparse
import re
from pathlib import Path

from functional_sd3.cli import options, output, report

HELP = "write weights in another layout or dtype"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="IN", help="folders or files; their components are put together")
    parser.add_argument("out", metavar="OUT", help="a folder, or a file where the layout is one (.safetensors)")
    parser.add_argument(
        "--layout",
        required=True,
        choices=("diffusers", "stability", "single", "native"),
        help="diffusers: a folder; single: one file under Stability's names; stability and native: a file where OUT "
        "ends in .safetensors, else a folder",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"))
    parser.add_argument("--shard-size", metavar="SIZE", help="split weights above this, such as 5GB or 500MiB")
    parser.add_argument("--only", metavar="NAMES", help="components to take, such as transformer,vae")
    options.add_variant(parser)


def run(arguments: argparse.Namespace) -> int:
    suffix = Path(arguments.out).suffix
    if arguments.layout == "diffusers" and suffix in (".safetensors", ".sft") and not Path(arguments.out).is_dir():
        raise ValueError(f"OUT {arguments.out}: --layout diffusers writes a folder; --layout single a {suffix} file")
    output.check_weights(arguments.out, "OUT")
    shard_bytes = None if arguments.shard_size is None else _bytes(arguments.shard_size)
    import torch

    from functional_sd3 import weights

    model = weights.load(
        arguments.paths,
        only=arguments.only.split(",") if arguments.only else None,
        variant=arguments.variant,
        dtype="stored",
    )
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    weights.save(arguments.out, model, layout=arguments.layout, dtype=dtype, shard_bytes=shard_bytes)
    report.say(f"{arguments.out}: {', '.join(model.params)}")
    if Path(arguments.out).is_file() and any(tables is not None for tables in model.tokenizers):
        report.say("tokenizers are not in the file: keep their folders, and pass them beside it")
    for sentence in weights.missing(model) if not arguments.only else ():
        report.say(sentence)
    return 0


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ValueError(f"--shard-size {text!r} must be a size such as 5GB, 500MiB or 1000000")
    return size
