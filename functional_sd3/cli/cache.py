"""Encode a training set once: latents of its images and conditioning of its captions, which `train --data OUT` reads.

Run again with the same options after an interruption, it goes on after the shards that are whole.
"""

import argparse

from functional_sd3.cli import options, view_options

HELP = "encode images and captions once, for training without the encoders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="DIR|shapes", help="folder of images, or the built-in shapes")
    add("--out", required=True, metavar="DIR", help="folder for the cache, new or of the same cache")
    options.add_params(parser)
    add("--size", type=int, help="side of the images in pixels (default: the model's own)")
    view_options.add_arguments(parser)
    add("--template", default="a photo of a {}", help="caption of a class folder (default 'a photo of a {}')")
    add("--caption", metavar="TEXT", help="the caption of every image of --data, in place of any that it has")
    add("--follow", action="store_true", help="read what links and metadata name outside of --data too")
    add("--pictures", type=int, default=8192, help="how many of the shapes (default 8192)")
    add("--seed", type=int, default=0, help="of the shapes and of --crops (default 0)")
    stored = "of the conditioning (default: as the encoders compute it); 16 bits take half of float32's room"
    add("--text-dtype", choices=("float32", "bfloat16", "float16"), help=stored)
    add("--shard", type=int, default=256, metavar="N", help="images, or captions, of a file (default 256)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")


def run(arguments: argparse.Namespace) -> int:
    from functional_sd3.cli import cache_run

    return cache_run.run(arguments)
