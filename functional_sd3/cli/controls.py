"""ControlNets on the command line: `--control KIND=IMAGE[:SCALE[:START-END]]` with `--controlnet [KIND=]PATH`."""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_sd3.cli import numbers

if TYPE_CHECKING:
    from functional_sd3.transformer.control import Control
    from functional_sd3.weights.controlnets import ControlNet

_NUMBER = r"[-+]?[0-9.]+(?:[eE][-+]?\d+)?"
_FORM = re.compile(
    rf"(?P<kind>\w+)=(?P<image>.+?)(?::(?P<scale>{_NUMBER})(?::(?P<start>{_NUMBER})-(?P<end>{_NUMBER}))?)?"
)


class ControlSpec(NamedTuple):
    """One `--control`: the kind of its image, the path, the scale, and the part of the run as fractions."""

    kind: str
    image: Path
    scale: float
    start: float
    end: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="KIND=IMAGE[:SCALE[:START-END]]",
        help="an image to follow, such as canny=edges.png:0.8 (blur, canny, depth, ...); START and END are fractions "
        "of the run. May be repeated; needs --controlnet",
    )
    parser.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="[KIND=]PATH",
        help="the ControlNet that reads it: a folder of diffusers' or a file of Stability's",
    )
    parser.add_argument(
        "--control-after-last",
        action="store_true",
        help="add its residuals after the last block too, as Stability's reference does",
    )


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of ControlNets, for the settings in an image; none where there are none."""
    if not arguments.control:
        return {}
    return {name: getattr(arguments, name) for name in ("control", "controlnet", "control_after_last")}


def parse(text: str) -> ControlSpec:
    """Raises ValueError where the words are not of the form, the kind is unknown or a number is none."""
    from functional_sd3.transformer import controlnet

    match = _FORM.fullmatch(text)
    if not match:
        raise ValueError(f"--control {text!r} must be KIND=IMAGE, KIND=IMAGE:SCALE or KIND=IMAGE:SCALE:START-END")
    if match["kind"] not in controlnet.KINDS:
        raise ValueError(f"--control {text!r}: kind {match['kind']!r} must be one of {', '.join(controlnet.KINDS)}")
    limits = (("scale", "1"), ("start", "0"), ("end", "1"))
    values = [numbers.number(match[name] or usual, f"--control {text!r}: its {name}") for name, usual in limits]
    return ControlSpec(match["kind"], Path(match["image"]), *values)


def prepare(arguments: argparse.Namespace, config, fetch, size: tuple[int, int], dtype, device) -> "list[Control]":
    """The controls of the options, their images encoded; size (width, height) of what is drawn, in pixels.

    config: of the model; fetch: a component's name -> its parameters.

    Raises ValueError for words that make no sense, ControlNets made for another model, and images of other
    proportions than what is drawn; WeightsError for files that cannot be read.
    """
    import torch

    from functional_sd3 import pipeline
    from functional_sd3.transformer import control

    specs = [parse(text) for text in arguments.control]
    if not specs and not arguments.controlnet:
        return []
    controls = []
    for one, net in zip(specs, _nets(specs, arguments.controlnet, dtype, device), strict=True):
        nothing = torch.zeros(1, 1, 1, 1, dtype=torch.float32, device="cpu")
        made = control.Control(
            net.params, net.config, nothing, one.scale, one.start, one.end, arguments.control_after_last
        )
        control.check(made, config.transformer)
        images, mask = _image(one.image, size, net.config.extra_channels > 0)
        with torch.no_grad():
            latents = pipeline.control_latents(
                {"vae": fetch("vae")},
                config,
                images.to(device),
                net.config,
                mask=None if mask is None else mask.to(device),
            )
        controls.append(made._replace(image_latents=latents))
    return controls


def _nets(specs: list[ControlSpec], paths: list[str], dtype, device) -> "list[ControlNet]":
    """A ControlNet for each image: the one named for its kind, that whose file states its kind, the next unnamed."""
    from functional_sd3 import weights

    named: dict[str, ControlNet] = {}
    unnamed = []
    for text in paths:
        called, path = net_source(text)
        net = weights.load_controlnet(path, dtype=dtype, device=device)
        if called and net.config.kind not in (None, called):
            raise ValueError(f"--controlnet {text}: its file says that it reads images of {net.config.kind}")
        if kind_of_net := called or net.config.kind:
            named[kind_of_net] = net
        else:
            unnamed.append(net)
    if len(paths) > len(specs):
        raise ValueError(f"{len(paths)} --controlnet for {len(specs)} images; give a --control KIND=IMAGE for each")
    nets = []
    for one in specs:
        if one.kind not in named and not unnamed:
            raise ValueError(f"--control {one.kind}={one.image} needs --controlnet {one.kind}=PATH: what reads it")
        net = named[one.kind] if one.kind in named else unnamed.pop(0)
        nets.append(net._replace(config=dataclasses.replace(net.config, kind=one.kind)))
    return nets


def net_source(text: str) -> tuple[str | None, str]:
    """The kind (None: that of the file) and the path of one `--controlnet`."""
    from functional_sd3.transformer import controlnet

    kind, equals, path = text.partition("=")
    return (kind, path) if equals and kind in controlnet.KINDS else (None, text)


def _image(path: Path, size: tuple[int, int], masked: bool):
    """(1, 3, height, width) in [0, 1] and, where wanted, the mask: 1 where the image is transparent.

    Greyscale of more than 8 bits keeps them: depth maps do.
    """
    import numpy
    import torch
    from PIL import Image

    from functional_sd3.cli import report
    from functional_sd3.image import files, pixels

    try:
        image = (files.read_transparent if masked else files.read_deep)(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if image.size[0] * size[1] != image.size[1] * size[0]:
        has, wants = ("x".join(map(str, sides)) for sides in (image.size, size))
        raise ValueError(f"{path} is {has}, but what is drawn is {wants}: crop it to these proportions, or give --size")
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    if image.mode == "F":
        grey = torch.from_numpy(numpy.array(image)).clamp(0, 1)
        return grey.expand(1, 3, *grey.shape).contiguous(), None
    if not masked:
        return pixels.from_pil(image), None
    hidden = torch.from_numpy(numpy.array(image.getchannel("A")) < 128)[None, None]
    if not hidden.any():
        report.note(f"{path} has no transparent part: its ControlNet is given all of it, and no place to paint anew")
    return pixels.from_pil(image.convert("RGB")), hidden.float()
