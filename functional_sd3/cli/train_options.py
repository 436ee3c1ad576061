"""Options of `functional-sd3 train`."""

import argparse

from functional_sd3.cli import (
    memory_options,
    mesh_options,
    options,
    train_objective,
    train_subjects,
    view_options,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options in groups, one a function, so that each says what it is for."""
    add = parser.add_argument
    add("--data", required=True, metavar="DIR|shapes", help="folder of images, a cache of them, or the built-in shapes")
    add("--out", required=True, metavar="DIR", help="folder for the trained model, its log and checkpoints")
    options.add_params(parser)
    add("--part", choices=("transformer", "vae"), default="transformer", help="what is trained (default transformer)")
    add("--lora", type=int, metavar="RANK", help="train a LoRA of the attentions, and leave it in --out as a file")
    add("--scratch", action="store_true", help="fresh parameters of the same sizes")
    trained = "whether they learn with the transformer (default: frozen, with --scratch train)"
    add("--text-encoders", choices=("frozen", "train"), help=trained)
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, to the same bits")
    add("--force", action="store_true", help="with --resume: go on although options, weights or images are others now")
    _add_data(parser.add_argument_group("data"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_objective(parser.add_argument_group("objective"))
    _add_memory(parser.add_argument_group("memory and speed"))
    _add_record(parser.add_argument_group("record"))
    mesh_options.add_arguments(parser.add_argument_group("processes"))


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--size", type=int, help="side of the images in pixels (default: the model's own)")
    view_options.add_arguments(group)
    add("--template", default="a photo of a {}", help="caption of a class folder (default 'a photo of a {}')")
    add("--caption", metavar="TEXT", help="the caption of every image of --data, in place of any that it has")
    add("--follow", action="store_true", help="read what links and metadata name outside of --data too")
    add("--pictures", type=int, default=8192, help="how many of the shapes (default 8192)")


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--steps", type=int, default=1000, help="steps in all, those before --resume included (default 1000)")
    add("--batch-size", type=int, default=16, help="images a step (default 16)")
    add("--lr", type=float, default=1e-4, help="peak learning rate (default 1e-4)")
    add(
        "--schedule",
        choices=("cosine", "constant"),
        default="cosine",
        help="of the learning rate: a cosine down to a tenth at --steps, or constant (default cosine)",
    )
    add("--warmup", type=int, default=50, help="steps up to the peak (default 50)")
    add("--ema", type=float, default=0.999, help="decay of the averaged parameters (default 0.999)")
    add("--seed", type=int, default=0, help="of the data, the order and the noise (default 0)")


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
    add("--accumulate", type=int, default=1, help="parts that a batch is taken in, to save memory (default 1)")
    computed = "of the computation (default float32; with --lora as stored, if the device computes well so)"
    add("--dtype", choices=("float32", "bfloat16"), help=computed)
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--compile", action="store_true", help="compile the step: minutes once, then faster")
    memory_options.add_arguments(group)
    memory_options.add_full_arguments(group)


def _add_record(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--save-every", type=int, default=250, help="steps between checkpoints (default 250)")
    add("--log-every", type=int, default=10, help="steps between rows of log.csv (default 10)")
    held_out = "hold out N of the images, or read a folder of others, and log their loss at fixed times and noise"
    add("--validation", metavar="N|DIR", help=held_out)
    add("--validate-every", type=int, default=250, help="steps between validations (default 250)")
    add("--tensorboard", action="store_true", help="write OUT/tensorboard too; needs the package tensorboard")
    add("--sample-every", type=int, default=250, help="steps between sample images, 0 for none (default 250)")
