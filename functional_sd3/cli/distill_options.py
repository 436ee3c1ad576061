"""Options of `functional-sd3 distill`, and what is wrong with them before anything is loaded."""

import argparse
import math
from pathlib import Path

from functional_sd3.cli import memory_options, mesh_options, options

METHODS = ("segments", "meanflow", "imeanflow", "shortcut", "scm", "rcm", "reflow")
"""Names of `training.distill_methods.METHODS`, known here without torch."""
OWN = {
    "inner": ("segments",),
    "equal": ("meanflow", "imeanflow", "shortcut"),
    "tangent_warmup": ("meanflow", "imeanflow", "scm", "rcm"),
    "fake_updates": ("rcm",),
    "fake_rate": ("rcm",),
    "teacher_steps": ("reflow",),
}
"""Options of some methods alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--to", type=int, required=True, metavar="STEPS", help="steps that the student draws in")
    add("--out", required=True, metavar="DIR", help="folder for the student, its log and checkpoints")
    options.add_params(parser)
    add("--method", choices=METHODS, default="segments", help="what the student learns (default segments)")
    add("--data", default="shapes", metavar="DIR|shapes", help="folder of images, or the built-in shapes (the default)")
    add("--lora", type=int, metavar="RANK", help="train a LoRA of the attentions, and leave it in --out as a file")
    add("--steps", type=int, default=400, help="updates in all, those before --resume included (default 400)")
    add("--batch-size", type=int, default=48, help="images an update (default 48)")
    add("--cfg", type=float, help="guidance scale that is folded in, 1 for none (default 5; 1 where it is already)")
    add("--inner", type=int, help="of segments: steps of the teacher in each of the student's (default 3)")
    add(
        "--equal",
        type=float,
        metavar="SHARE",
        help="of mean velocities: part of a batch that learns the velocity at one "
        "time, r = t (default 0.5; shortcut 0.875)",
    )
    add(
        "--tangent-warmup",
        type=int,
        metavar="N",
        help="of meanflow, scm and rcm: updates over which the derivative in t grows to its size (default 0; 50 of "
        "scm and rcm)",
    )
    add("--fake-updates", type=int, metavar="N", help="of rcm: updates of the fake score for each one (default 4)")
    add("--fake-rate", type=float, metavar="FACTOR", help="of rcm: its learning rate, as part of --lr (default 0.2)")
    add("--teacher-steps", type=int, metavar="N", help="of reflow: steps of the runs that end its pairs (default 28)")
    add("--shift", type=float, help="of the student's even grid towards noise (default 3)")
    add("--lr", type=float, default=2e-4, help="learning rate (default 2e-4)")
    add("--warmup", type=int, default=20, help="updates up to the learning rate (default 20)")
    add("--ema", type=float, default=0.98, help="decay of the averaged parameters, which are the result (default 0.98)")
    add("--seed", type=int, default=0, help="of the data, the order and the noise (default 0)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, to the same bits")
    add("--force", action="store_true", help="with --resume: go on although options, weights or images are others now")
    add("--accumulate", type=int, default=1, help="parts that a batch is taken in, to save memory (default 1)")
    add("--size", type=int, help="side of the images in pixels (default: the model's own)")
    add("--template", default="a photo of a {}", help="caption of a class folder (default 'a photo of a {}')")
    add("--caption", metavar="TEXT", help="the caption of every image of --data, in place of any that it has")
    add("--follow", action="store_true", help="read what links and metadata name outside of --data too")
    add("--pictures", type=int, default=4096, help="how many of the shapes (default 4096)")
    add("--save-every", type=int, default=50, help="updates between checkpoints (default 50)")
    add("--log-every", type=int, default=10, help="updates between rows of log.csv (default 10)")
    add("--sample-every", type=int, default=50, help="updates between sample images, 0 for none (default 50)")
    computed = "of the teacher's computation (default: what the model is stored in where the device computes that well)"
    add("--teacher-dtype", choices=("float32", "bfloat16"), help=computed)
    add("--dtype", choices=("float32", "bfloat16"), help="of the student's computation (default float32)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    memory_options.add_arguments(parser)
    mesh_options.add_arguments(parser)


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an option, or options together, that make no sense, and for data that is not there."""
    if arguments.cfg is not None and not 1 <= arguments.cfg < math.inf:
        raise ValueError(f"--cfg {arguments.cfg} must be at least 1, which is no guidance")
    if arguments.batch_size % arguments.accumulate:
        raise ValueError(f"--batch-size {arguments.batch_size} cannot be taken in {arguments.accumulate} equal parts")
    if arguments.caption is not None and arguments.data == "shapes":
        raise ValueError("--caption is for a folder of images: the shapes have captions of their own")
    if arguments.force and not arguments.resume:
        raise ValueError("--force is for --resume: it lets a run go on with other options, weights or images")
    for name, methods in OWN.items():
        if getattr(arguments, name) is not None and arguments.method not in methods:
            raise ValueError(
                f"--{name.replace('_', '-')} is for --method {' and '.join(methods)}, not for {arguments.method}"
            )
    memory_options.check(arguments)
    options.check_params(arguments.params)
    if Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        raise ValueError(f"--out {arguments.out} is a file; name a folder, which is made where it is missing")
