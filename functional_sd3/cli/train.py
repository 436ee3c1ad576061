"""Train a part of a model on a folder of images, or on the world of shapes."""

import argparse

from functional_sd3.cli.train_options import add_arguments

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train the transformer or the autoencoder of a model, or a LoRA"


def run(arguments: argparse.Namespace) -> int:
    from functional_sd3.cli import train_checks, train_setup, training_run

    train_checks.check(arguments)
    with training_run.hold(arguments):
        return training_run.run(arguments, train_setup.prepare(arguments, training_run.say))
