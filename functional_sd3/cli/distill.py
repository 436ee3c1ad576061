"""Distil a model into one that draws in few steps, with guidance folded in."""

import argparse

from functional_sd3.cli.distill_options import add_arguments

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train a student of a model that draws in few steps"


def run(arguments: argparse.Namespace) -> int:
    from functional_sd3.cli import distill_setup, mesh_options, training_run

    with mesh_options.started(arguments) as processes:
        processes.together(lambda: distill_setup.check(arguments))
        processes.together(lambda: mesh_options.check_batch(arguments, processes))
        with training_run.hold(arguments, processes):
            setup = mesh_options.prepared(
                processes,
                lambda is_first: distill_setup.prepare(arguments, training_run.say, processes.mesh, is_first),
            )
            return training_run.run(arguments, setup, processes)
