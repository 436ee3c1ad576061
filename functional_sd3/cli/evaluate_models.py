"""Measures of models by their images: `evaluate clip`, `prompts` and `vae`."""

import argparse
import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from torch import Tensor

from functional_sd3 import lora, pipeline, weights
from functional_sd3.cli import distilled, guidance, lora_options, precision, report, runtime
from functional_sd3.cli.report import Report
from functional_sd3.core import prng
from functional_sd3.formats.printable import named
from functional_sd3.image import files as image_files
from functional_sd3.image import folders, pixels, vae
from functional_sd3.image.folders import Item
from functional_sd3.layouts.components import require
from functional_sd3.metrics import clip_images, similarity
from functional_sd3.recipes import shapes
from functional_sd3.recipes.shapes import report as shapes_report
from functional_sd3.training import datasets
from functional_sd3.weights import Model, shipped

if TYPE_CHECKING:
    from PIL.Image import Image

_RESPECTS = ("right", "count", "shape", "colour", "size", "background", "relation")


class Likeness(NamedTuple):
    """PSNR and SSIM of one reconstructed image."""

    name: str
    psnr: float
    ssim: float


def run_clip(arguments: argparse.Namespace) -> Report:
    if not Path(arguments.folder).exists():
        raise FileNotFoundError(2, "no such folder", arguments.folder)
    index = datasets.image_folder(arguments.folder, follow=arguments.follow)
    for text in index.notes:
        report.note(text)
    report.note_skipped(arguments.folder, len(index.samples) + len(index.skipped), index.skipped)
    if empty := [sample.path for sample in index.samples if not sample.caption]:
        verb = "has" if len(empty) == 1 else "have"
        raise ValueError(
            f"{named(empty)} of {len(index.samples)} in {arguments.folder} {verb} no caption to be compared with: "
            "write one beside each, a.txt for a.png, or take them away"
        )
    model = runtime.clip(arguments.clip, arguments.device)
    if model.tokenizer is None:
        raise ValueError(f"{arguments.clip} has no tokenizer, which captions need: vocab.json and merges.txt")
    batches: list[Tensor] = []
    starts = range(0, len(index.samples), arguments.batch_size)
    for start in report.progress(starts, len(starts), Path(arguments.folder).name, unit="batch"):
        samples = index.samples[start : start + arguments.batch_size]
        seen = [image_files.read(index.folder / sample.path) for sample in samples]
        captions = [sample.caption for sample in samples]
        batches.append(
            clip_images.scores(model.params, model.config, model.tokenizer, model.pixels, seen, captions).cpu()
        )
    scores = torch.cat(batches)
    each = [
        {"path": sample.path, "caption": sample.caption, "score": float(score)}
        for sample, score in zip(index.samples, scores, strict=True)
    ]
    data = {
        "metric": "clip",
        "value": float(scores.mean()),
        "path": arguments.folder,
        "pictures": each,
        "skipped": [one._asdict() for one in index.skipped],
        **runtime.clip_described(arguments.clip, model),
    }
    return Report((f"CLIP score {data['value']:.3f} (N = {len(scores)}), {runtime.clip_name(model)}",), data)


def run_prompts(arguments: argparse.Namespace) -> Report:
    method = None if arguments.method is None else runtime.method(arguments.method)
    lora_options.check(arguments.lora)
    model, source = _model(arguments)
    runtime.require(model, ("transformer", "vae"), source)
    model = lora_options.with_student(arguments.lora, model)
    distilled.apply_defaults(arguments, model.config)
    loras = lora_options.load(arguments.lora, model.config, runtime.device(arguments.device))
    if loras:
        trees, scales = zip(*loras, strict=True)
        model = model._replace(params=lora.apply(model.params, trees, scales, lazy=True))
    rows = []
    kinds = (arguments.things,) if arguments.things else (1, 2)
    counts = [min(arguments.count, len(shapes.held_out_captions(things))) for things in kinds]
    steps = arguments.steps * sum(-(-count // arguments.batch_size) for count in counts)
    with report.progress((), steps, "drawing", unit="step") as bar:
        for things in kinds:
            rows.append(
                {"things": things}
                | shapes_report.prompt_following(
                    model,
                    things,
                    arguments.count,
                    prng.key(arguments.seed),
                    batch=arguments.batch_size,
                    steps=arguments.steps,
                    cfg=guidance.scale(arguments.cfg),
                    method=method,
                    height=shapes.SIDE,
                    width=shapes.SIDE,
                    on_step=lambda info: bar.update(),
                )
            )
    text = [f"| things | captions | {' | '.join(_RESPECTS)} |", "|---" * (len(_RESPECTS) + 2) + "|"]
    for row in rows:
        shares = " | ".join(f"{100 * row[name]:.1f} %" for name in _RESPECTS)
        text.append(f"| {row['things']} | {row['captions']} | {shares} |")
    settings = {name: getattr(arguments, name) for name in ("seed", "steps", "cfg", "method", "dtype")}
    settings["method"] = arguments.method or pipeline.default_method(model.config)
    sources = {"params": source, "lora": arguments.lora}
    return Report(tuple(text), {"metric": "prompts", **sources, **settings, "rows": rows})


def run_vae(arguments: argparse.Namespace) -> Report:
    source = folders.source(arguments.folder)
    model, params = _model(arguments, only="vae")
    runtime.require(model, ("vae",), params)
    factor = vae.factor(require(model.config, "vae"))
    if arguments.size and arguments.size % factor:
        raise ValueError(f"--size {arguments.size} must be a multiple of {factor}, the pixels a side of one latent")
    cut = partial(_cut, factor=factor, size=arguments.size)
    items = folders.stream(source, cut, workers=arguments.workers)
    likenesses: list[Likeness] = []
    unread: list[folders.Skipped] = []
    for batch in _alike(report.progress(items, len(source.names), Path(arguments.folder).name), arguments.batch_size):
        if batch[0].value is None:
            unread += [folders.Skipped(item.name, item.reason or "") for item in batch]
        else:
            likenesses += _reconstructed(model, batch)
    skipped = tuple(unread)
    report.note_skipped(arguments.folder, len(source.names), skipped)
    if not likenesses:
        raise ValueError(f"none of the {len(skipped)} images of {arguments.folder} can be measured")
    finite = [one.psnr for one in likenesses if math.isfinite(one.psnr)]
    psnr = math.fsum(finite) / len(finite) if finite else math.inf
    ssim = math.fsum(one.ssim for one in likenesses) / len(likenesses)
    size = f"{arguments.size}x{arguments.size}" if arguments.size else f"their own size, cut to multiples of {factor}"
    data = {
        "metric": "vae",
        "psnr": psnr,
        "ssim": ssim,
        "params": params,
        "path": arguments.folder,
        "size": arguments.size,
        "pictures": [one._asdict() for one in likenesses],
        "skipped": [one._asdict() for one in skipped],
    }
    return Report((f"PSNR {psnr:.3f} dB, SSIM {ssim:.4f} (N = {len(likenesses)}, at {size})",), data)


METRICS = {"clip": run_clip, "prompts": run_prompts, "vae": run_vae}


def _model(arguments: argparse.Namespace, **options: Any) -> tuple[Model, str]:
    """The model, and what to call it."""
    source = arguments.params or [str(shipped.folder())]
    device = runtime.device(arguments.device)
    options |= {"dtype": runtime.dtype(arguments.dtype), "device": device, "variant": arguments.variant}
    if "only" not in options:
        # A whole model is measured by the images that `generate` draws, a VAE alone by its reconstructions.
        options["dtype"], arguments.dtype = precision.choose(arguments, source, device)
        model = weights.load(source, quantized=True, **options)
        computed = {
            name: precision.with_products_of(part, device, options["dtype"]) for name, part in model.params.items()
        }
        return model._replace(params=computed), " and ".join(source)
    model = weights.load(source, **options)
    return model, " and ".join(source)


def _cut(image: "Image", *, factor: int, size: int | None) -> Tensor:
    """uint8 (3, height, width): a square of `size` or, at its own size, the middle whose sides the factor divides."""
    if size:
        image = datasets.square(image, size)
    width, height = (side - side % factor for side in image.size)
    if min(width, height) < similarity.WINDOW:
        own = "x".join(map(str, image.size))
        raise ValueError(f"{own} pixels are too few for SSIM's window of {similarity.WINDOW}")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    # Not Image.crop, which warns of large images once more.
    values = numpy.array(image)[top : top + height, left : left + width]
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def _alike(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Successive items in batches of one size, those without an image in batches of their own."""
    batch: list[Item] = []
    for item in items:
        if batch and (len(batch) == batch_size or _shape(batch[0]) != _shape(item)):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _shape(item: Item) -> tuple[int, ...] | None:
    return None if item.value is None else tuple(item.value.shape)


def _reconstructed(model: Model, batch: list[Item]) -> list[Likeness]:
    """Through the mean of the posterior, and rounded to bytes as a file would hold it."""
    originals = pixels.from_bytes(torch.stack([item.value for item in batch if item.value is not None]))
    like = model.params["vae"]["decoder"]["conv_in"]["weight"]
    with torch.no_grad():
        images = pixels.to_signed(originals).to(like.device, like.dtype)
        sizes = require(model.config, "vae")
        mean = vae.encode(model.params["vae"], sizes, images).mean
        images = pixels.from_signed(vae.decode(model.params["vae"], sizes, mean).float()).cpu()
    runtime.check_finite(images)
    given = pixels.from_bytes(pixels.to_bytes(images))
    psnr, ssim = similarity.psnr(given, originals), similarity.ssim(given, originals)
    return [Likeness(item.name, float(p), float(s)) for item, p, s in zip(batch, psnr, ssim, strict=True)]
