"""Train the transformer of a model, or a LoRA over it, by rewards of the images that it draws."""

import argparse

from functional_sd3.cli.reward_options import add_arguments

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train a model by rewards of its own images"


def run(arguments: argparse.Namespace) -> int:
    from functional_sd3.cli import mesh_options, reward_checks, reward_setup, training_run

    with mesh_options.started(arguments) as processes:
        processes.together(lambda: reward_checks.check(arguments))
        processes.together(lambda: mesh_options.check_batch(arguments, processes))
        with training_run.hold(arguments, processes):
            setup = mesh_options.prepared(processes, lambda is_first: reward_setup.prepare(arguments, processes))
            return training_run.run(arguments, setup, processes)
