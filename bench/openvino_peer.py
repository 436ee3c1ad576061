"""OpenVINO as a peer: networks of diffusers and transformers as people on CPUs run them, by optimum-intel's converter.

An extra of its own (`pip install -e ".[bench]"`); rows go without it where it is not installed.
"""

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.timing import Beside

PRECISIONS = {torch.float32: ("float32", "f32", 1e-4), torch.bfloat16: ("bfloat16", "bf16", 1e-1)}
"""dtype -> its name, OpenVINO's, and the largest relative difference: OpenVINO's bfloat16 rounds more of an MMDiT than
PyTorch's does (3.5e-2 against 9e-3 of the float32 velocity)."""


def available() -> bool:
    """True where OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def version() -> str:
    """Of the package that is installed."""
    return importlib.metadata.version("openvino")


def beside(
    call: Callable[..., Tensor], inputs: tuple[Tensor, ...], *modules: torch.nn.Module, dtype: torch.dtype
) -> Mapping[str, Beside]:
    """The argument `beside` of a row: `call(*inputs)`, which uses the modules, by OpenVINO; empty without it.

    The modules and inputs are float32: OpenVINO computes in `dtype` by its own choice of what that is good for.
    """
    if not available():
        return {}
    name, _, tolerance = PRECISIONS[dtype]
    network = compiled(call, inputs, *modules, dtype=dtype)
    return {f"OpenVINO {name}": Beside(lambda: network(*inputs), tolerance, version())}


def loops(
    loop: Callable[[Callable[..., Tensor]], Tensor],
    call: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *modules: torch.nn.Module,
) -> Mapping[str, Beside]:
    """The argument `beside` of a row of `loop(call)`: the loop over OpenVINO's network of `call`, in float32."""
    if not available():
        return {}
    network = compiled(call, inputs, *modules, dtype=torch.float32)
    return {"OpenVINO float32 in this loop": Beside(lambda: loop(network), 1e-3, version())}


def pipelines(pipeline: Any, latents: Tensor, *text: Tensor, run: Callable[[], Tensor]) -> Mapping[str, Beside]:
    """The argument `beside` of a row of `run()`, which calls diffusers' pipeline: the same as optimum-intel has it,
    with its transformer and its VAE's decoder as networks of OpenVINO, compiled before, under diffusers' scheduler.

    latents, text: of one step with guidance, the text as the transformer takes it (context, pooled); float32. Encoders
    stay PyTorch's: of these rows they are small.
    """
    if not available():
        return {}
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    transformer, vae = pipeline.transformer, pipeline.vae
    step = compiled(
        lambda *inputs: transformer(*inputs, return_dict=False)[0],
        (latents, *text, torch.full((len(latents),), 500.0)),
        transformer,
        dtype=torch.float32,
    )
    decode = compiled(lambda x: vae.decode(x, return_dict=False)[0], (latents[:1],), vae, dtype=torch.float32)

    def forward(*_: Any, **inputs: Any) -> tuple[Tensor]:
        return (step(*(inputs[name] for name in names)),)

    def run_with_networks() -> Tensor:
        with (
            mock.patch.object(transformer, "forward", forward),
            mock.patch.object(vae, "decode", lambda x, **_: (decode(x),)),
        ):
            return run()

    return {"OpenVINO float32 in diffusers' pipeline": Beside(run_with_networks, 1e-3, version())}


def compiled(
    call: Callable[..., Tensor], inputs: tuple[Tensor, ...], *modules: torch.nn.Module, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """`call` of tensors of these shapes as a network of OpenVINO, on as many threads as PyTorch's."""
    import openvino

    with torch.no_grad(), warnings.catch_warnings():
        # The converter traces by torch.jit, which warns of its age.
        warnings.simplefilter("ignore")
        network = openvino.convert_model(_Called(call, *modules), example_input=inputs)
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype][1],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(network, "CPU", options).create_infer_request()

    def run(*inputs: Tensor) -> Tensor:
        # It keeps the memory of its result for the next call.
        return torch.from_numpy(request.infer([x.numpy() for x in inputs])[0].copy())

    return run


class _Called(torch.nn.Module):
    """A function of modules as a module, which is what the converter takes."""

    def __init__(self, call: Callable[..., Tensor], *modules: torch.nn.Module) -> None:
        super().__init__()
        self.call = call
        self.parts = torch.nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)
