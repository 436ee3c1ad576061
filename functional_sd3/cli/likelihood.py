"""Rank prompts for an image by how likely each makes it."""

import argparse

from functional_sd3.cli import guidance, inputs, options, output, prompt_words, report
from functional_sd3.cli.timing import Timer, progress

HELP = "rank prompts for an image by how likely each makes it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="the image")
    parser.add_argument(
        "--prompt", dest="prompts", metavar="TEXT", action="append", required=True, help="a prompt; may be repeated"
    )
    parser.add_argument(
        "--by",
        choices=("likelihood", "loss"),
        default="likelihood",
        help="the log-likelihood of the latents under the flow (default), or the loss that the model was trained on, "
        "which is cheaper and no likelihood",
    )
    parser.add_argument("--steps", type=int, default=20, help="steps from the image to noise (default 20)")
    parser.add_argument(
        "--method", default="heun", help="integrator: euler, heun, rk4, dopri5, ... (default heun, two evaluations)"
    )
    for name in ("rtol", "atol"):
        parser.add_argument(f"--{name}", type=float, metavar="TOL", help="of bosh3, dopri5 and tsit5")
    parser.add_argument(
        "--probes", type=int, default=4, help="random directions the divergence is estimated with (default 4)"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="the divergence itself: as many evaluations a step as the latents have numbers",
    )
    parser.add_argument("--draws", type=int, default=64, help="with --by loss: noises and times (default 64)")
    parser.add_argument(
        "--cfg",
        type=float,
        default=1.0,
        help="guidance scale (default 1, as every scale below it: the prompt's own flow)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn, the same for all prompts (default 0)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default 16)")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output")
    options.add_size(parser, "that of the image")
    options.add_words(parser)
    options.add_model(parser)
    parser.set_defaults(guidance=[], compile=False, measures_flow=True)


def run(arguments: argparse.Namespace) -> int:
    timer = Timer()
    size = options.size(arguments.size)
    output.check_files(arguments.json)
    options.check_file(arguments.image, arguments.image)
    options.check_run(arguments)

    import torch

    from functional_sd3 import pipeline
    from functional_sd3.cli import ranking, session

    opened = session.open_session(arguments, timer)
    if arguments.method in ranking.UNFIT:
        why = "takes steps of a mean velocity" if arguments.method in ranking.MEAN else "draws noise"
        raise ValueError(f"--method {arguments.method} {why}; a likelihood needs one of {', '.join(ranking.FIT)}")
    image = inputs.fitted_image(arguments.image, opened, size)
    session.image_size(opened, (image.shape[-1], image.shape[-2]))
    prompts = list(dict.fromkeys(arguments.prompts))
    session.note_truncated(opened, [*prompts, arguments.negative], arguments)
    prompt_words.note_mistakes(arguments, [*prompts, arguments.negative], opened.words)
    timer.done("load")
    with timer.named_failures(), torch.no_grad():
        timer.stage = f"measuring the {arguments.by}"
        words = {"negative": arguments.negative, "weighted": arguments.weighted, "long_prompts": arguments.long}
        conditions = pipeline.encode_from(opened.fetch, opened.config, opened.tokenizers, prompts, **words)
        timer.done("text", opened.device)
        latents = pipeline.encode_images({"vae": opened.fetch("vae")}, opened.config, image)
        transformer, scale = {"transformer": opened.fetch("transformer")}, guidance.scale(arguments.cfg)
        size = arguments.batch_size
        parts = [pipeline.slice_batch(conditions, slice(i, i + size)) for i in range(0, len(prompts), size)]
        with progress(len(parts) * ranking.ticks(arguments)) as bar:
            scores = torch.cat(
                [
                    ranking.scores(
                        pipeline.velocity(transformer, opened.config, part, scale),
                        latents.expand(len(part.positive.pooled), *latents.shape[1:]),
                        arguments,
                        on_step=lambda _: bar.update(),
                    ).cpu()
                    for part in parts
                ],
                dim=1,
            )
        timer.done("likelihood" if arguments.by == "likelihood" else "loss", opened.device)
    report.emit(arguments.json, ranking.report(arguments, prompts, scores, latents[0].numel()))
    report.message(timer.summary())
    return 0
