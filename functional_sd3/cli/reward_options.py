"""Options of `functional-sd3 reward`."""

import argparse

from functional_sd3.cli import memory_options, mesh_options, options, run_options
from functional_sd3.cli.distilled import Given

METHODS = ("nft", "awm", "grpo", "dpo", "draft")
"""Names of `training.reward_settings.NAMES`, known here without torch."""
FORMS = ("flow", "fast", "cps", "mix", "dance", "guard")
"""Names of `training.reward_methods.FORMS`, known here without torch."""
NAMED = ("shapes", "colours", "clip", "psnr:FILE", "module:function")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--reward",
        action="append",
        default=[],
        metavar="|".join(NAMED),
        help="what images are rewarded by; may be repeated",
    )
    add(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="of a score of the rewards; those not named have no weight (default: 1 of each score, of shapes right=1)",
    )
    run_options.add(parser, out=None)
    options.add_params(parser)
    add("--method", choices=METHODS, default="nft", help="how a policy learns from rewards (default nft)")
    pairs = "of dpo, instead of --reward: JSON lines with prompt, winner and loser, paths of images beside the file"
    add("--pairs", metavar="FILE", help=pairs)
    add("--prompts", metavar="FILE", help="a prompt a line (default: captions of the shapes)")
    add("--things", type=int, help="objects in the captions of the shapes, 1 or 2 (default: both)")
    run_options.add(parser, lora=None, steps=200)
    add(
        "--batch-size",
        type=int,
        default=64,
        help="images an update learns from; of --pairs, half as many pairs (default 64)",
    )
    add("--group", type=int, default=8, help="images a prompt, which are compared with one another (default 8)")
    draws = "at most so many times as many images are drawn until all groups have some spread (default 4)"
    add("--draws", type=int, default=4, help=draws)
    steps = "of the images it learns from (default 8, or what a distilled model was made for)"
    add("--sampling-steps", type=int, help=steps)
    sampler = "integrator of the images it learns from (default euler, or a student's own)"
    add("--sampler", help=sampler)
    add("--cfg", type=float, default=1.0, help="guidance scale of the images it learns from (default 1, none)")
    add("--times", type=int, default=2, action=Given, help="sampling times that each image is learned from (default 2)")
    add("--beta", type=float, help="of nft, 0.1 for sums of several rewards (default 1); of dpo (default 100)")
    add("--form", choices=FORMS, help="of grpo: transitions, trained steps and ratio (default flow)")
    add("--noise", type=float, help="of grpo: noise level of the steps (default: as published for the form)")
    add("--window", type=int, help="of grpo: steps that draw noise and are trained on, 0 for all (default: the form's)")
    add("--eps", type=float, help="of grpo and awm: bound of the ratio (default: as published)")
    add("--last", type=int, help="of draft: last steps that are differentiated (default 1)")
    add("--updates", type=int, default=1, help="gradient steps on the same images (default 1)")
    add("--kl", type=float, help="weight of the distance to the start (default: as published for the method)")
    run_options.add(parser, size=None, lr=1e-4, warmup=0, ema=0.9, seed=None, resume=None, force=None)
    add("--clip", metavar="DIR", help="CLIP's two encoders, for --reward clip: a folder of transformers' CLIPModel")
    run_options.add(parser, save_every=25, log_every=5, sample_every=25, result_every=None)
    add("--at-once", type=int, default=64, help="images drawn, and points differentiated, at once (default 64)")
    explanation = "of the computation of the images it learns from (default float32; gradients are float32)"
    add("--draw-dtype", choices=("float32", "bfloat16"), default="float32", help=explanation)
    run_options.add(parser, device=None)
    memory_options.add_arguments(parser)
    mesh_options.add_arguments(parser)
