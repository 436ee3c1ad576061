"""Start-up time: imports, the command line, loading, compiling."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import prng, tree
from functional_sd3.core import spec as specs
from functional_sd3.image import vae
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config, Model, shipped

DIFFUSERS = """
import sys, warnings; warnings.simplefilter("ignore")
import torch
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipe(
    "a large red circle on a white background", num_inference_steps=28, guidance_scale=5.0, height=64, width=64,
    max_sequence_length=24, generator=torch.Generator().manual_seed(0),
).images[0].save(sys.argv[2])
"""


_SIDES = {"ours": "ours", "theirs": "diffusers"}


def run(*command):
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_imports(versus):
    versus(
        "import functional_sd3",
        lambda: run("-c", "import functional_sd3"),
        lambda: run("-c", "import torch"),
        peer="import torch",
        tolerance=None,
        rounds=9,
    )


def test_cold_generate(versus, tmp_path):
    command = ("-m", "functional_sd3", "generate", "a large red circle on a white background")
    versus(
        "a picture with params/tiny from a cold start",
        lambda: run(*command, "--out", str(tmp_path / "ours.png")),
        lambda: run("-c", DIFFUSERS, str(shipped.folder()), str(tmp_path / "theirs.png")),
        peer="a diffusers script",
        tolerance=None,
        rounds=5,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformer and a VAE of about 1.2 GB in float32."""
    config = Config(
        transformer=mmdit.Config(depth=6, heads=16, position_size=64, sample_size=64, qk_norm=True), vae=vae.SD3_VAE
    )
    params = specs.map_params(lambda path, param: torch.rand(param.shape), weights.spec(config))
    path = tmp_path_factory.mktemp("large") / "model"
    weights.save(path, Model(params, config), shard_bytes=200_000_000)
    return path


@pytest.mark.parametrize("finite", [False, True], ids=["mapped", "every value looked at"])
def test_loading(versus, folder, finite):
    """As diffusers does it, and as this project does by default, which refuses weights that hold NaN or infinity."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    def touched(tensors):
        # One number of every page, so that what was only mapped is read.
        return sum(tensor.reshape(-1)[::1024].sum() for tensor in tensors)

    def theirs():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = [
                SD3Transformer2DModel.from_pretrained(folder / "transformer"),
                AutoencoderKL.from_pretrained(folder / "vae"),
            ]
        return touched(parameter.detach() for part in parts for parameter in part.parameters())

    versus(
        f"loading a transformer and a VAE of 1.2 GB in shards, every page read{', every value looked at' * finite}",
        lambda: touched(tree.leaves(weights.load(folder, finite=finite).params)),
        theirs,
        tolerance=None,
        rounds=5,
    )


_PEAK = """
import sys
sys.path.insert(0, sys.argv[3])
# Not resource.getrusage, whose maximum is inherited from the process that starts this one.
peak = lambda: 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
if sys.argv[1] == "ours":
    from functional_sd3 import weights
    from functional_sd3.core import tree
    import torch
    before = peak()
    tensors = list(tree.leaves(weights.load(sys.argv[2]).params))
else:
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    before = peak()
    kinds = {"transformer": SD3Transformer2DModel, "vae": AutoencoderKL}
    parts = [kind.from_pretrained(f"{sys.argv[2]}/{name}") for name, kind in kinds.items()]
    tensors = [parameter.detach() for part in parts for parameter in part.parameters()]
sum(tensor.reshape(-1)[::1024].sum() for tensor in tensors)
held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
print((peak() - before) / held)
"""


def test_peak_of_loading(versus, folder):
    """The most resident memory beyond the imports, over the bytes of the weights; in processes of their own."""
    root = str(shipped.folder().parents[1])
    peaks = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, "-W", "ignore", "-c", _PEAK, side, str(folder), root]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[_SIDES[side]] = f"{float(output.splitlines()[-1]):.2f} of the weights"
    versus.record("peak resident memory of loading 1.2 GB, every page read", **peaks)


def test_recompiles(versus):
    """Four resolutions and three prompts of different lengths through one compiled velocity."""
    from diffusers import SD3Transformer2DModel

    config = mmdit.Config(depth=2, heads=4, position_size=64, sample_size=32, qk_norm=True)
    params = mmdit.init(prng.key(0), config)
    module = SD3Transformer2DModel(
        sample_size=32, num_layers=2, num_attention_heads=4, pos_embed_max_size=64, qk_norm="rms_norm",
        joint_attention_dim=4096, caption_projection_dim=256, pooled_projection_dim=2048,
    ).eval()  # fmt: skip

    def graphs(call):
        torch._dynamo.reset()
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()
        compiled = torch.compile(call, backend=counter)
        with torch.no_grad():
            for side in (32, 48, 64, 80):
                for tokens in (77, 154, 333):
                    compiled(torch.zeros(2, 16, side, side), torch.zeros(2, tokens, 4096), torch.zeros(2, 2048))
        return counter.frame_count

    t = torch.tensor([0.5, 0.5])
    ours = graphs(lambda x, context, pooled: mmdit.apply(params, config, x, t, context, pooled))
    theirs = graphs(lambda x, context, pooled: module(x, context, pooled, t, return_dict=False)[0])
    versus.record("graphs compiled for 4 resolutions x 3 prompt lengths", ours=ours, diffusers=theirs)


_COMPILE = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch
from bench import bench_transformer
from functional_sd3.core import transform
from functional_sd3.transformer import mmdit
torch.set_num_threads(2)
pair, (x, t, context, pooled) = bench_transformer.model(4, 32, 4)
start = time.perf_counter()
with torch.no_grad():
    if sys.argv[1] == "ours":
        mmdit.apply(pair.params, pair.config, x, t, context, pooled, block_transform=transform.compile)
    else:
        for block in pair.module.transformer_blocks:
            block.compile(fullgraph=True)
        pair.module(x, context, pooled, 1000 * t)
print(time.perf_counter() - start)
"""


def test_compile_time(versus, tmp_path):
    """Into an empty cache, in processes of their own."""
    seconds = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, "-W", "ignore", "-c", _COMPILE, side, str(shipped.folder().parents[1])]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / side)}
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        seconds[_SIDES[side]] = f"{float(output.splitlines()[-1]):.1f} s"
    versus.record("compiling an MMDiT of 4 blocks, width 256, block by block, first call", **seconds)
