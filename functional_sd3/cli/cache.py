"""Encode a training set once: latents of its images and conditioning of its captions, which `train --data OUT` reads.

Run again with the same options after an interruption, it continues after the shards that are whole.
"""

import argparse

from functional_sd3.cli import options, run_options, view_options

HELP = "encode images and captions once, for training without the encoders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="DIR|shapes", help="folder of images, or the built-in shapes")
    add("--out", required=True, metavar="DIR", help="folder for the cache, new or of the same cache")
    options.add_params(parser)
    run_options.add_images(parser, pictures=8192)
    view_options.add_arguments(parser)
    add("--seed", type=int, default=0, help="of the shapes and of --crops (default 0)")
    stored = "of the conditioning (default: as the encoders compute it); 16 bits take half of float32's room"
    add("--text-dtype", choices=("float32", "bfloat16", "float16"), help=stored)
    add("--shard", type=int, default=256, metavar="N", help="images, or captions, of a file (default 256)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")


def run(arguments: argparse.Namespace) -> int:
    from functional_sd3.cli import cache_run

    return cache_run.run(arguments)
