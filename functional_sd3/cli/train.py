"""Train a part of a model on a folder of images, or on the world of shapes."""

import argparse

from functional_sd3.cli.train_options import add_arguments

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train the transformer or the autoencoder of a model, or a LoRA"


def run(arguments: argparse.Namespace) -> int:
    from functional_sd3.cli import train_checks

    if arguments.estimate:
        from functional_sd3.cli import train_estimate

        train_checks.check_estimate(arguments, train_estimate.TRANSFORMERS)
        return train_estimate.run(arguments)
    from functional_sd3.cli import mesh_options, train_setup, training_run

    with mesh_options.started(arguments) as processes:
        processes.together(lambda: train_checks.check(arguments))
        processes.together(lambda: mesh_options.check_batch(arguments, processes))
        with training_run.hold(arguments, processes):
            setup = mesh_options.prepared(
                processes, lambda is_first: train_setup.prepare(arguments, training_run.say, processes.mesh, is_first)
            )
            return training_run.run(arguments, setup, processes)
