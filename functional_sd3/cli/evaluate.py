"""Measure sets of images, and models by the images they make."""

import argparse

from functional_sd3.cli import distilled, guidance, lora_options, options, output, report

MODES = ("clean", "pytorch_fid", "tf1")
TAPS = (64, 192, 768, 2048)
"""Names of `preprocess.MODES` and `inception.TAPS`, known here without torch."""
HELP = "measure images and models: fid, kid, cmmd, clip, prompts, vae"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    metrics = parser.add_subparsers(dest="metric", metavar="METRIC", required=True)

    fid = _metric(metrics, "fid", "Frechet inception distance of two sets of images (lower is better)")
    _two_sets(fid)
    _inception(fid, "REAL's statistics, to be given in place of its images later")
    fid.add_argument(
        "--count", type=int, metavar="N", help="images behind a statistics file of pytorch-fid, which does not say"
    )

    kid = _metric(metrics, "kid", "kernel inception distance of two sets of images (lower is better)")
    _two_sets(kid)
    _inception(kid, "REAL's features, to be given in place of its images later")
    kid.add_argument("--subsets", type=int, default=100, help="random subsets whose estimates are averaged (100)")
    kid.add_argument("--subset-size", type=int, metavar="N", help="images in each (1000, or as many as there are)")
    kid.add_argument("--seed", type=int, default=0, help="of the subsets (default 0)")

    cmmd = _metric(metrics, "cmmd", "maximum mean discrepancy of CLIP embeddings of two sets (lower is better)")
    _two_sets(cmmd, optional=False)
    _clip(cmmd)

    clip = _metric(metrics, "clip", "CLIP score of captioned images (higher is better)")
    clip.add_argument("folder", metavar="FOLDER", help="images with captions, as for `train --data`")
    clip.add_argument("--follow", action="store_true", help="read what links and metadata name outside of FOLDER too")
    _clip(clip)
    _batches(clip, 32)

    prompts = _metric(metrics, "prompts", "share of captions of the shapes world that a model draws right")
    _model(prompts)
    lora_options.add_arguments(prompts)
    prompts.add_argument("--count", type=int, default=200, help="held-out captions of each kind (default 200)")
    prompts.add_argument("--things", type=int, choices=(1, 2), help="only captions of one thing, or of two")
    prompts.add_argument("--seed", type=int, default=0)
    prompts.add_argument("--steps", type=int, default=28, action=distilled.Given, help="of the sampler (default 28)")
    prompts.add_argument("--cfg", type=float, default=5.0, action=distilled.Given, help="guidance scale (default 5)")
    prompts.add_argument("--method", help="integrator: euler, heun, dpmpp_2m, ... (default: the model's)")
    _batches(prompts, 25)

    vae = _metric(metrics, "vae", "how well an autoencoder gives images back: PSNR and SSIM (higher is better)")
    vae.add_argument("folder", metavar="FOLDER", help="images, or a zip archive of them")
    _model(vae)
    vae.add_argument("--size", type=int, metavar="N", help="cut to squares of N pixels (default: each at its own size)")
    _batches(vae, 8)
    _workers(vae)


def run(arguments: argparse.Namespace) -> int:
    output.check_files(arguments.json, getattr(arguments, "save", None))
    options.check_params(getattr(arguments, "params", None))
    if arguments.metric == "prompts":
        options.check_method(arguments.method)
        guidance.check(arguments)

    from functional_sd3.cli import evaluate_models, evaluate_sets

    metrics = {**evaluate_sets.METRICS, **evaluate_models.METRICS}
    report.emit(arguments.json, metrics[arguments.metric](arguments))
    return 0


def _metric(metrics, name: str, text: str) -> argparse.ArgumentParser:
    parser = metrics.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def _two_sets(parser: argparse.ArgumentParser, *, optional: bool = True) -> None:
    kinds = "folder of images, zip archive" + (", or .npz that --save wrote" if optional else "")
    parser.add_argument("real", metavar="REAL", help=f"the images to compare with: {kinds}")
    count = "?" if optional else None
    also = "; may be left out with --save" if optional else ""
    parser.add_argument("fake", metavar="FAKE", help=f"the images to measure{also}", nargs=count)
    _batches(parser, 32)
    _workers(parser)


def _inception(parser: argparse.ArgumentParser, saved: str) -> None:
    parser.add_argument("--inception", metavar="FILE", help="weights of the Inception network (never downloaded)")
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="how images are resized and scaled, as by clean-fid (default), pytorch-fid or torch-fidelity",
    )
    parser.add_argument("--features", type=int, choices=TAPS, help="layer to compare (default 2048)")
    parser.add_argument("--save", metavar="FILE.npz", help=f"write {saved}")


def _clip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clip", metavar="DIR", help="CLIP weights: a folder of transformers' CLIPModel, or a file")


def _model(parser: argparse.ArgumentParser) -> None:
    options.add_params(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the computation (default auto: on a CPU float32, or bfloat16 where the processor is faster at it "
        "and a wide model is stored in 16 bits; elsewhere what the weights are stored in)",
    )


def _batches(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--batch-size", type=int, default=default, help=f"images at a time (default {default})")


def _workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", "--processes", type=int, default=0, metavar="N", help="processes that read images (default 0)"
    )
