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
import json, os, sys
import torch
from functional_sd3 import weights
from functional_sd3.core import tree
torch.set_num_threads(1)

# A process for each case, forked: an interpreter that imports torch takes longer than all it measures.
for path, dtype in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
else:
    sys.exit(0)
dtype = getattr(torch, dtype, None)

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
print(json.dumps([resident("VmHWM:") - before, tree.nbytes(model.params)]), flush=True)
os._exit(0)
"""
CASES = [("folder", "stored"), ("folder", "bfloat16"), ("folder", "float64"), ("file", "stored"), ("file", "float16")]


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
def test_peak_memory_of_loading_is_that_of_the_weights(folder, file):
    places = {"folder": str(folder), "file": str(file)}
    cases = [(places[where], dtype) for where, dtype in CASES]
    script = [sys.executable, "-c", MEASURE, json.dumps(cases)]
    output = subprocess.run(script, capture_output=True, text=True, timeout=300, check=True)
    for case, line in zip(CASES, output.stdout.splitlines(), strict=True):
        peak, size = json.loads(line)
        assert size > 80e6, case
        assert peak <= 1.15 * size, case


def test_every_parameter_is_contiguous_and_without_gradient(folder):
    model = weights.load(folder)
    assert all(leaf.is_contiguous() and not leaf.requires_grad for leaf in tree.leaves(model.params))
