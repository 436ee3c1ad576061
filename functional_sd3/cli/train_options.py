"""Options of `functional-sd3 train`."""

import argparse

from functional_sd3.cli import (
    memory_options,
    mesh_options,
    options,
    run_options,
    train_objective,
    train_subjects,
    view_options,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options in groups, one function each, whose name is their purpose."""
    add = parser.add_argument
    add("--data", required=True, metavar="DIR|shapes", help="folder of images, a cache of them, or the built-in shapes")
    run_options.add(parser, out=None)
    options.add_params(parser)
    add("--part", choices=("transformer", "vae"), default="transformer", help="what is trained (default transformer)")
    run_options.add(parser, lora=None)
    add("--scratch", action="store_true", help="fresh parameters of the same sizes")
    trained = "whether they learn with the transformer (default: frozen, with --scratch train)"
    add("--text-encoders", choices=("frozen", "train"), help=trained)
    run_options.add(parser, resume=None, force=None)
    data = parser.add_argument_group("data")
    run_options.add_images(data, pictures=8192)
    view_options.add_arguments(data)
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_objective(parser.add_argument_group("objective"))
    _add_memory(parser.add_argument_group("memory and speed"))
    _add_record(parser.add_argument_group("record"))
    mesh_options.add_arguments(parser.add_argument_group("processes"))


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    run_options.add(group, steps=1000, batch_size=16, lr=1e-4)
    group.add_argument(
        "--schedule",
        choices=("cosine", "constant"),
        default="cosine",
        help="of the learning rate: a cosine down to a tenth at --steps, or constant (default cosine)",
    )
    run_options.add(group, warmup=50, ema=0.999, seed=None)


def _add_objective(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dropout", type=float, default=0.1, help="share of captions emptied, for guidance (default 0.1)")
    train_objective.add_arguments(group)
    train_subjects.add_arguments(group)
    add("--decoder-only", action="store_true", help="leave the autoencoder's encoder alone, so that latents stay")
    add("--edges", type=float, default=0.0, help="weight of the differences of edges in the autoencoder (default 0)")
    add(
        "--latent-noise",
        type=float,
        default=1.0,
        help="factor on the noise of the latents that the autoencoder decodes; 0 decodes their mean (default 1)",
    )


def _add_memory(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    run_options.add(group, accumulate=None)
    computed = "of the computation (default float32; with --lora as stored, if the device computes well so)"
    add("--dtype", choices=("float32", "bfloat16"), help=computed)
    run_options.add(group, device=None)
    add("--compile", action="store_true", help="compile the step: minutes once, then faster")
    memory_options.add_arguments(group)
    memory_options.add_full_arguments(group)


def _add_record(group: argparse._ArgumentGroup) -> None:
    run_options.add(group, save_every=250, log_every=10)
    add = group.add_argument
    held_out = "hold out N of the images, or read a folder of others, and log their loss at fixed times and noise"
    add("--validation", metavar="N|DIR", help=held_out)
    add("--validate-every", type=int, default=250, help="steps between validations (default 250)")
    add("--tensorboard", action="store_true", help="write OUT/tensorboard too; needs the package tensorboard")
    run_options.add(group, sample_every=250, result_every=None)
