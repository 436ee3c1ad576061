"""Distances between two sets of images: `evaluate fid`, `kid` and `cmmd`."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from functional_sd3.cli import report, runtime
from functional_sd3.cli.report import Report
from functional_sd3.core import prng
from functional_sd3.image import clip_pixels, folders
from functional_sd3.image.folders import Skipped, Source
from functional_sd3.metrics import clip_images, cmmd, collect, features, fid, frechet, inception, kid, preprocess
from functional_sd3.metrics.collect import Batch, Collected
from functional_sd3.metrics.features import Features
from functional_sd3.weights import WeightsError

if TYPE_CHECKING:
    from PIL.Image import Image

_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{inception.FILE}"
_UNSTATED = "unstated"


class Kind(NamedTuple):
    """The record of a metric, statistics or features: collected from batches, labelled, counted, saved and loaded."""

    collect: Callable[[Iterator[Batch]], Collected]
    record: Callable[..., Any]
    count: Callable[[Any], int]
    save: Callable[[str, Any], None]
    load: Callable[[str, argparse.Namespace, str], Any]


class Side(NamedTuple):
    """One of the two sets: what is known of it, of how many images, and which were skipped."""

    path: str
    record: Any
    size: int
    skipped: tuple[Skipped, ...] = ()


class Making(NamedTuple):
    """Preprocessing, layer and network of the features; `embed` is None where no images are given."""

    preprocessing: str
    weights: str
    tap: int
    embed: Callable[[Tensor], Tensor] | None


def run_fid(arguments: argparse.Namespace) -> Report:
    kind = Kind(collect.statistics, fid.Record, lambda record: record.statistics.n, fid.save, _load_statistics)
    sides, data = _measured(arguments, kind)
    if len(sides) == 1:
        return _only_saved(arguments, data)
    with report.warnings_as_notes():
        score = fid.score(*(side.record for side in sides))
    return Report((f"{score}, {_how(sides)}",), {"metric": "fid", "value": score.value, **data})


def run_kid(arguments: argparse.Namespace) -> Report:
    kind = Kind(
        collect.features,
        Features,
        lambda record: len(record.values),
        features.save,
        lambda path, arguments, fingerprint: features.load(path),
    )
    sides, data = _measured(arguments, kind)
    if len(sides) == 1:
        return _only_saved(arguments, data)
    size = arguments.subset_size or min(kid.SIZE, *(side.size for side in sides))
    real, fake = (side.record.values for side in sides)
    estimates = kid.estimates(real, fake, prng.key(arguments.seed), subsets=arguments.subsets, size=size)
    mean, deviation = float(estimates.mean()), float(estimates.std(unbiased=False))
    if size < kid.SIZE:
        report.note(f"published KIDs are of subsets of {kid.SIZE}; these are of {size}, so their spread differs")
    subsets = {"subsets": arguments.subsets, "subset_size": size, "seed": arguments.seed}
    counts = " and ".join(str(side.size) for side in sides)
    text = f"KID {mean:.6f} +- {deviation:.6f} ({arguments.subsets} subsets of {size}, N = {counts}), {_how(sides)}"
    return Report((text,), {"metric": "kid", "value": mean, "deviation": deviation, **subsets, **data})


def run_cmmd(arguments: argparse.Namespace) -> Report:
    sources = {path: folders.source(path) for path in (arguments.real, arguments.fake)}
    model = runtime.clip(arguments.clip, arguments.device)
    embed = partial(clip_images.image_embeddings, model.params, model.config)
    transform = partial(_square, config=model.pixels)
    sides = []
    for path in (arguments.real, arguments.fake):
        collected = collect.features(_batches(path, sources[path], transform, embed, arguments))
        sides.append(Side(path, collected.values, len(collected.values), collected.skipped))
        report.note_skipped(path, len(sources[path].names), collected.skipped)
    value = cmmd.distance(*(side.record for side in sides))
    counts = " and ".join(str(side.size) for side in sides)
    data = {"metric": "cmmd", "value": value, **runtime.clip_described(arguments.clip, model), **_sets(sides)}
    return Report((f"CMMD {value:.4f} (N = {counts}), {runtime.clip_name(model)}",), data)


METRICS = {"fid": run_fid, "kid": run_kid, "cmmd": run_cmmd}


def _measured(arguments: argparse.Namespace, kind: Kind) -> tuple[list[Side], dict[str, Any]]:
    """The record of each set, the first one saved with --save, and the settings that all metrics report."""
    if arguments.fake is None and not arguments.save:
        raise ValueError(f"{arguments.metric} compares two sets: give FAKE too, or --save FILE.npz to keep REAL's part")
    paths = [path for path in (arguments.real, arguments.fake) if path is not None]
    # The cheapest errors first: folders, then files, then the network, and images only after all else is right.
    sources = {path: folders.source(path) for path in paths if not _is_saved(path)}
    params = _network(arguments) if sources else None
    fingerprint = inception.fingerprint(params) if params else _UNSTATED
    saved = {path: kind.load(path, arguments, fingerprint) for path in paths if path not in sources}
    making = _making(arguments, params, fingerprint, saved)
    sides = []
    for path in paths:
        if path in saved:
            sides.append(Side(path, saved[path], kind.count(saved[path])))
            continue
        transform = partial(preprocess.image, mode=making.preprocessing)
        collected = kind.collect(_batches(path, sources[path], transform, making.embed, arguments))
        record = kind.record(collected.values, making.preprocessing, making.weights, making.tap)
        sides.append(Side(path, record, kind.count(record), collected.skipped))
        report.note_skipped(path, len(sources[path].names), collected.skipped)
    if arguments.save:
        kind.save(arguments.save, sides[0].record)
        report.note(f"{arguments.save} holds what is known of {sides[0].path}, to be given in its place")
    return sides, {
        "preprocessing": making.preprocessing, "features": making.tap, "inception": making.weights, **_sets(sides)
    }  # fmt: skip


def _making(arguments: argparse.Namespace, params: Any, fingerprint: str, saved: dict[str, Any]) -> Making:
    """The settings of the command line or, where it has none, those saved. Raises ValueError where they differ."""
    record = next(iter(saved.values()), None)
    preprocessing = arguments.mode or (record.preprocessing if record else "clean")
    tap = arguments.features or (record.tap if record else inception.TAPS[-1])
    making = Making(preprocessing, record.weights if record and not params else fingerprint, tap, None)
    for path, record in saved.items():
        try:
            fid.check_alike(record, record._replace(preprocessing=preprocessing, weights=making.weights, tap=tap))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if params is None:
        return making
    if preprocessing not in preprocess.MODES or tap not in inception.TAPS:
        raise ValueError(f"images cannot be prepared by {preprocessing!r} for layer {tap}, as what was saved says")
    place = params["fc"]["weight"].device
    return making._replace(embed=lambda images: inception.apply(params, images.to(place), last=tap)[tap])


def _network(arguments: argparse.Namespace) -> Any:
    if arguments.inception is None:
        raise ValueError(
            f"{arguments.metric} needs the weights of the Inception network, which do not come with this program and "
            f"are never downloaded by it. Get {inception.FILE} (95,628,359 bytes, SHA-256 {inception.SHA256}) from "
            f"{_URL}, and pass --inception FILE"
        )
    with report.warnings_as_notes():
        return inception.load(arguments.inception, device=runtime.device(arguments.device))


def _load_statistics(path: str, arguments: argparse.Namespace, fingerprint: str) -> fid.Record:
    if arguments.count is not None:
        if arguments.mode is None:
            raise ValueError("--count is for statistics that do not say how they were made either: pass --mode too")
        tap = arguments.features or inception.TAPS[-1]
        return fid.load(path, n=arguments.count, preprocessing=arguments.mode, weights=fingerprint, tap=tap)
    with suppress(WeightsError):
        stored = features.load(path)
        return fid.Record(frechet.statistics(stored.values), stored.preprocessing, stored.weights, stored.tap)
    try:
        return fid.load(path)
    except WeightsError as error:
        if all("does not say" in problem for problem in error.problems):
            hint = "if pytorch-fid wrote it, pass --count N --mode pytorch_fid"
            raise ValueError(f"{path} does not say of how many images it is and how it was made; {hint}") from None
        raise


def _batches(
    path: str, source: Source, transform: Callable, embed: Callable[..., Any] | None, arguments: argparse.Namespace
) -> Iterator[Batch]:
    items = folders.stream(source, transform, workers=arguments.workers)
    reported = report.progress(items, len(source.names), Path(path).name)
    if embed is None:
        raise ValueError(f"{path} holds images, for which --inception is needed")
    return collect.walk(embed, reported, batch_size=arguments.batch_size)


def _square(image: "Image", *, config: clip_pixels.Config) -> Tensor:
    return clip_pixels.apply(config, image, square=True)[0]


def _only_saved(arguments: argparse.Namespace, data: dict[str, Any]) -> Report:
    return Report((arguments.save,), {"metric": arguments.metric, "value": None, "saved": arguments.save, **data})


def _sets(sides: list[Side]) -> dict[str, Any]:
    return {
        name: {
            "path": side.path,
            "pictures": side.size,
            "skipped": [{"path": path, "reason": reason} for path, reason in side.skipped],
        }
        for name, side in zip(("real", "fake"), sides, strict=False)
    }


def _how(sides: list[Side]) -> str:
    record = sides[0].record
    return f"preprocessing {record.preprocessing}, layer {record.tap}, weights {record.weights[:12]}"


def _is_saved(path: str) -> bool:
    return Path(path).suffix == ".npz" and not Path(path).is_dir()
