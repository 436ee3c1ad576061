"""The first stage of a request: prompts and images are encoded, each component read once."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sd3.core import attention_variants, tree
from functional_sd3.core.attention import Stream
from functional_sd3.core.types import Key
from functional_sd3.image import vae
from functional_sd3.layouts.components import Config, require
from functional_sd3.pipeline import masks
from functional_sd3.pipeline.adapters import adapted
from functional_sd3.pipeline.components import Components, fetch
from functional_sd3.pipeline.encoding import EncodedPrompts, encode_groups
from functional_sd3.pipeline.latents import encode_images, latent_size, sample_keys, tile_sizes
from functional_sd3.pipeline.request import FlowEdit, InversionEdit, Request, SamplingOptions, Variation, needed
from functional_sd3.transformer.joint_block import Attend
from functional_sd3.weights.model import Tokenizers


class Prepared(NamedTuple):
    """An encoded request: what `draw` integrates, and `slice_samples` takes apart."""

    request: Request
    prompts: EncodedPrompts
    """Embedded prompts of the samples, or of the stops of frames."""
    regions: tuple[EncodedPrompts, ...] = ()
    source: EncodedPrompts | None = None
    """The prompts of the images of an edit."""
    latents: Tensor | None = None
    """(1 or samples, channels, height, width): the start images, encoded and normalised."""
    keys: Key | None = None
    """(samples, 2), or (stops, 2) of frames."""
    places: Tensor | None = None
    """(frames,) float from 0 to stops - 1; only of frames."""

    @property
    def samples(self) -> int:
        """Number of images to draw."""
        return len(self.prompts.positive) if self.places is None else len(self.places)


def prepare(components: Components, config: Config, tokenizers: Tokenizers, request: Request) -> Prepared:
    """Encode the prompts and start images of a request.

    components: name -> parameters (`Components`); each text encoder and the VAE are read once. Raises ValueError for
    sizes and numbers that do not fit the model, and where it lacks what the request needs.
    """
    components, config, tokenizers = adapted(components, config, tokenizers, request.loras, request.words)
    request = _with_size(request, config)
    if request.frames is not None:
        return _prepare_frames(components, config, tokenizers, request)
    count = len(request.prompts)
    keys = None if request.key is None else sample_keys(request.key, count)
    latents = None
    if request.start is not None:
        images, key = request.start.images, request.start.posterior_key
        # Every sample draws its own latents from the posterior; the mean is that of the image.
        images = images if key is None else images.expand(count, *images.shape[1:])
        latents = encode_images({"vae": fetch(components, "vae")}, config, images, key=key)
    source = [] if request.edit is None else [list(request.edit.source)]
    groups = [request.prompts, *([region.prompt] * count for region in request.regions), *source]
    prompts, *others = encode_groups(components, config, tokenizers, groups, request.text)
    regions = tuple(others[: len(request.regions)])
    return Prepared(request, prompts, regions, others[-1] if source else None, latents, keys)


def slice_samples(prepared: Prepared, index: slice) -> Prepared:
    """Some of the images of a request; each is drawn as it is in the whole.

    Values with one row for each sample are sliced: scales, ControlNets' images, image prompts and cached keys and
    values too. Not what a guidance or an attention of one's own closes over, nor any of these for frames: there a
    number or one row must do for all.
    """
    if prepared.places is not None:
        return prepared._replace(places=prepared.places[index])

    def rows(encoded: EncodedPrompts) -> EncodedPrompts:
        return encoded._replace(positive=encoded.positive[index], negative=encoded.negative[index])

    def part(value: Any) -> Any:
        """Rows of a tensor or list for these samples; a value of one row or none is for all."""
        if value is None or isinstance(value, str | int | float) or (isinstance(value, Tensor) and not value.ndim):
            return value
        return value if len(value) == 1 else value[index]

    request = prepared.request
    start, variation, edit = request.start, request.variation, request.edit
    request = replace(
        request,
        prompts=request.prompts[index],
        key=None if prepared.keys is None else prepared.keys[index],
        text=replace(request.text, negative=part(request.text.negative)),
        sampling=_slice_options(request.sampling, prepared.samples, part),
        noise=part(request.noise),
        start=start and replace(start, images=part(start.images), mask=part(start.mask)),
        variation=variation and Variation(sample_keys(variation.key, prepared.samples)[index], part(variation.amount)),
        edit=edit and replace(edit, **_slice_edit(edit, index, part)),
    )
    source = None if prepared.source is None else rows(prepared.source)
    regions = tuple(map(rows, prepared.regions))
    return Prepared(request, rows(prepared.prompts), regions, source, part(prepared.latents), request.key)


def _slice_options(sampling: SamplingOptions, samples: int, part: Callable[[Any], Any]) -> SamplingOptions:
    control = [one._replace(image_latents=part(one.image_latents), scale=part(one.scale)) for one in sampling.control]
    shown = sampling.image_prompt
    shown = shown and shown._replace(features=part(shown.features), scale=part(shown.scale))
    attend = sampling.attend
    if isinstance(attend, Mapping):
        attend = {block: _slice_attend(own, samples, part) for block, own in attend.items()}
    elif attend is not None:
        attend = _slice_attend(attend, samples, part)
    return replace(sampling, cfg=part(sampling.cfg), control=control, image_prompt=shown, attend=attend)


def _slice_attend(attend: Attend, samples: int, part: Callable[[Any], Any]) -> Attend:
    if not isinstance(attend, attention_variants.Cached) or len(attend.memory.key) != samples:
        return attend
    return attention_variants.cached(Stream(None, part(attend.memory.key), part(attend.memory.value)))


def _slice_edit(edit: InversionEdit | FlowEdit, index: slice, part: Callable[[Any], Any]) -> dict[str, Any]:
    changed = {"source": edit.source[index], "cfg": part(edit.cfg)}
    return {**changed, "eta": part(edit.eta)} if isinstance(edit, InversionEdit) else changed


def split_batches(prepared: Prepared, batch: int | None) -> list[Prepared]:
    """The request in parts of at most `batch` images; None for all at once. Raises ValueError for a batch below 1."""
    if batch is None:
        return [prepared]
    if batch < 1:
        raise ValueError(f"batch {batch} must be at least 1")
    return [slice_samples(prepared, slice(start, start + batch)) for start in range(0, prepared.samples, batch)]


def _with_size(request: Request, config: Config) -> Request:
    """The request with height and width in pixels, checked; start images and a given noise have their own."""
    factor, own = vae.factor(require(config, "vae")), {}
    if request.start is not None:
        own["start images"] = tuple(request.start.images.shape[-2:])
    if request.noise is not None:
        own["noise"] = tuple(side * factor for side in request.noise.shape[-2:])
    height, width = request.height, request.width
    for name, sides in own.items():
        if height not in (None, sides[0]) or width not in (None, sides[1]):
            raise ValueError(f"height {height} and width {width} are not those of the {name}, {sides[0]} x {sides[1]}")
        height, width = sides
    if request.noise is None:
        rows, columns = latent_size(config, height, width, bounded=request.is_bounded)
    else:
        rows, columns = request.noise.shape[-2:]
    if request.tiling is not None:
        tile_sizes(config, request.tiling.side, request.tiling.overlap)
    for region in request.regions:
        masks.check(region.mask, rows * factor, columns * factor, 1)
    return replace(request, height=height, width=width)


def _prepare_frames(components: Components, config: Config, tokenizers: Tokenizers, request: Request) -> Prepared:
    frames, key = needed(request.frames, "frames"), needed(request.key, "key")
    stops = max(len(request.prompts), len(key) if key.ndim > 1 else 1)
    # One key for all stops is that of the first sample.
    keys = (key if key.ndim > 1 else sample_keys(key, 1)).expand(stops, 2)
    prompts = list(request.prompts) * (stops // len(request.prompts))
    (encoded,) = encode_groups(components, config, tokenizers, [prompts], request.text)
    device = tree.leaves(encoded.texts)[0].device
    places = torch.linspace(0, stops - 1, frames.count, device=device, dtype=torch.float32)
    return Prepared(request, encoded, keys=keys, places=places)
