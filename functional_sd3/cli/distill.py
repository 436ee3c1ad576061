"""Distil a model into one that draws in few steps, with guidance folded in."""

import argparse

from functional_sd3.cli.distill_options import add_arguments

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train a student of a model that draws in few steps"


def run(arguments: argparse.Namespace) -> int:
    from functional_sd3.cli import distill_setup, training_run

    distill_setup.check(arguments)
    with training_run.hold(arguments):
        return training_run.run(arguments, distill_setup.prepare(arguments, training_run.say))
