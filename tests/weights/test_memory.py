"""What loading costs: the weights, once."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from functional_sd3 import weights
from functional_sd3.core import spec as specs
from functional_sd3.core import tree
from functional_sd3.image import vae
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config, Model

MEASURE = """
import json, sys
import torch
from functional_sd3 import weights
from functional_sd3.core import tree
torch.set_num_threads(1)
path, dtype = sys.argv[1], getattr(torch, sys.argv[2], None)

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def load():
    model = weights.load(path, dtype=dtype)
    # Every byte is read, so that pages which were only mapped count as well.
    return model, sum(leaf.view(-1)[::256].sum().item() for leaf in tree.leaves(model.params))

model, first = weights.load(path, only="vae"), 0.0
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmHWM:")
model, total = load()
print(json.dumps([resident("VmHWM:") - before, tree.nbytes(model.params)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """About 190 MB in float32, a third of which is fused when it is loaded."""
    config = Config(
        transformer=mmdit.Config(
            depth=2, heads=24, head_dim=32, position_size=8, sample_size=16, qk_norm=True, dual_attention_layers=(0,)
        ),
        vae=vae.Config(channels=(64, 64), groups=8),
    )
    leaf = lambda path, param: torch.rand(1).expand(param.shape).contiguous()  # noqa: E731
    path = tmp_path_factory.mktemp("large") / "model"
    weights.save(path, Model(specs.map_params(leaf, weights.spec(config)), config), shard_bytes=100_000_000)
    for file in path.rglob("*.safetensors"):
        # By name, as everyone else writes them: queries, keys and values apart.
        save_file({name: value.clone() for name, value in load_file(file).items()}, file)
    return path


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    """The same under Stability's names in one file, whose attention is fused already."""
    path = tmp_path_factory.mktemp("large") / "x.safetensors"
    weights.save(path, weights.load(folder), layout="single")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("where", "dtype"),
    [("folder", "stored"), ("folder", "bfloat16"), ("folder", "float64"), ("file", "stored"), ("file", "float16")],
)
def test_peak_memory_of_loading_is_that_of_the_weights(request, where, dtype):
    script = [sys.executable, "-c", MEASURE, str(request.getfixturevalue(where)), dtype]
    output = subprocess.run(script, capture_output=True, text=True, timeout=300, check=True)
    peak, size = json.loads(output.stdout)
    assert size > 80e6
    assert peak <= 1.15 * size


def test_every_parameter_is_contiguous_and_without_gradient(folder):
    model = weights.load(folder)
    assert all(leaf.is_contiguous() and not leaf.requires_grad for leaf in tree.leaves(model.params))
