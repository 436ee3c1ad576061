"""Draw pictures of prompts."""

import argparse
import re
import sys
from pathlib import Path

from functional_sd3.cli import controls, written
from functional_sd3.cli.timing import Timer, progress

HELP = "draw pictures of prompts"
BATCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to draw; several give a picture each")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with a prompt on each line")
    parser.add_argument(
        "--params",
        metavar="PATH",
        action="append",
        help="a folder or file of weights of any form; given several times, they are put together (default: the "
        "shipped tiny model)",
    )
    parser.add_argument("--negative", default="", metavar="TEXT", help="what to keep away from")
    parser.add_argument("--steps", type=int, default=28, help="steps of the sampler (default 28)")
    parser.add_argument("--cfg", type=float, default=5.0, help="guidance scale, 1 for none (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture of a prompt (default 0)")
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt, with successive seeds")
    parser.add_argument("--size", metavar="WxH", help="in pixels, such as 1024x1024 (default: the model's own)")
    parser.add_argument("--method", default="euler", help="integrator: euler, heun, dpmpp_2m, ... (default euler)")
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="[WORD=]FILE",
        help="a textual inversion; typed as WORD, or as the file's name in angle brackets. May be repeated",
    )
    parser.add_argument("--weighted", action="store_true", help="(words:1.3) weighs words of a prompt; \\( is itself")
    parser.add_argument("--long", action="store_true", help="let CLIP read prompts beyond its length, in chunks")
    controls.add_arguments(parser)
    parser.add_argument(
        "--offload",
        action="store_true",
        help="hold one part of the model in memory at a time: each text encoder, the transformer, the VAE",
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"pictures drawn at once (default {BATCH})")
    parser.add_argument(
        "--out",
        metavar="FILE-or-DIR",
        help="a .png file (several pictures become a grid), or a folder for one file a picture (default: out/)",
    )


def run(arguments: argparse.Namespace) -> int:
    timer = Timer()
    prompts = _prompts(arguments)
    size = _size(arguments.size)
    for name in ("steps", "count", "batch"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} must be at least 1")
    out = Path(arguments.out) if arguments.out else Path("out")
    single = out.suffix.lower() == ".png"
    written.check_writable(out.parent if single else out)

    from functional_sd3 import pipeline, weights
    from functional_sd3.cli import drawing, runtime
    from functional_sd3.image import vae
    from functional_sd3.weights import shipped

    timer.done("import")
    device = runtime.device(arguments.device)
    method = runtime.method(arguments.method)
    source = arguments.params or shipped.folder()
    told = {"dtype": runtime.dtype(arguments.dtype, device), "device": device, "quantized": True}
    if arguments.offload:
        if arguments.embedding:
            raise ValueError("--embedding changes the text encoders, which --offload reads as they are: leave one out")
        model, fetch = weights.outline(source), weights.fetcher(source, **told)
    else:
        model = runtime.with_words(weights.load(source, **told), arguments.embedding)
        fetch = model.params.__getitem__
    runtime.require(model, ("transformer", "vae"), " and ".join(arguments.params or [str(source)]))
    height, width = (None, None) if size is None else (size[1], size[0])
    latent_height, latent_width = pipeline.latent_size(model.config, height, width)
    factor = vae.factor(model.config.vae)
    picture_size = (latent_width * factor, latent_height * factor)
    control = controls.prepare(arguments, model.config, fetch, picture_size, told["dtype"], device)
    timer.done("load")
    _warn_truncated(model, [*dict.fromkeys(prompts), arguments.negative], arguments)

    jobs = [(prompt, arguments.seed + index) for prompt in prompts for index in range(arguments.count)]
    settings = {
        "negative": arguments.negative,
        "steps": arguments.steps,
        "cfg": arguments.cfg,
        "size": "x".join(map(str, picture_size)),
        "method": arguments.method,
        "dtype": arguments.dtype,
        "params": arguments.params or [],
        **{name: getattr(arguments, name) for name in ("embedding", "weighted", "long") if getattr(arguments, name)},
        **controls.settings(arguments),
    }
    batches = drawing.batches(jobs, arguments.batch, alone=arguments.long)
    with progress(arguments.steps * len(batches)) as bar:
        run = drawing.Run(model.config, model.tokenizers, fetch, device, (height, width), method, control, timer, bar)
        images = (drawing.offloaded if arguments.offload else drawing.together)(run, batches, arguments)
    runtime.check_finite(images)
    paths = (written.write_grid if single else written.write_each)(out, images, jobs, settings)
    timer.done("write")
    for path in paths:
        print(path)
    print(timer.summary(), file=sys.stderr)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts:
        try:
            lines = Path(arguments.prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {arguments.prompts} is not UTF-8 text: {error}") from None
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts {arguments.prompts} holds no prompts")
    if not prompts:
        raise ValueError('no prompt; try: functional-sd3 generate "a large red circle on a white background"')
    return prompts


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip())
    if not match:
        raise ValueError(f"--size {text!r} must be WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(match[1]), int(match[2])


def _warn_truncated(model, texts: list[str], arguments: argparse.Namespace) -> None:
    from functional_sd3.text import bpe, unigram, weighting

    texts = [weighting.parse(text).text for text in texts] if arguments.weighted else texts
    for name, tables, module in (("CLIP", model.tokenizers.clip_l, bpe), ("T5", model.tokenizers.t5, unigram)):
        if tables is None or (name == "CLIP" and arguments.long):
            continue
        length = min(tables.model_max_length, 256)
        for text in texts:
            tokens = len(module.apply(tables, [text], length=None)[0])
            if tokens > length:
                start = text if len(text) <= 40 else text[:40] + "..."
                print(f"note: {name} reads {length} of the {tokens} tokens of {start!r}", file=sys.stderr)
