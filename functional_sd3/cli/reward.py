"""Train the transformer of a model, or a LoRA over it, by rewards of the images that it draws."""

import argparse

from functional_sd3.cli.reward_options import add_arguments

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train a model by rewards of its own images"


def run(arguments: argparse.Namespace) -> int:
    from functional_sd3.cli import reward_checks, reward_setup, training_run

    reward_checks.check(arguments)
    with training_run.hold(arguments):
        return training_run.run(arguments, reward_setup.prepare(arguments))
