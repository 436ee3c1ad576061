"""Text encoders divided over processes by their heads are the encoders, derivatives too."""

import pytest
import torch

from functional_sd3 import t5
from functional_sd3.core import transform
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel import tensor
from functional_sd3.text import clip
from tests.parallel.examples import differences, filled

IDS = torch.arange(10, dtype=torch.int64).view(2, 5)
CLIP = clip.Config(vocab=10, length=6, width=16, layers=2, heads=2, mlp_width=24, projection_width=8)
T5 = t5.Config(vocab=10, width=12, layers=2, heads=4, head_dim=4, mlp_width=20)
ENCODERS = {"clip": (clip.spec, clip.apply, CLIP), "t5": (t5.spec, t5.apply, T5)}


def errors_of(name):
    spec_of, apply, config = ENCODERS[name]
    mesh, spec = meshes.init({"tensor": 2}), spec_of(config)
    params = filled(spec)
    own = tensor.cut(params, spec, mesh, heads=config.heads)

    def loss(params, mesh=None, **options):
        output = apply(params, config, IDS, mesh=mesh, **options)
        parts = output if isinstance(output, tuple) else [output]
        return sum((part * torch.linspace(-1, 1, part.numel()).view(part.shape)).sum() for part in parts)

    wanted = torch.func.grad_and_value(loss)(params)
    gradient, value = torch.func.grad_and_value(loss)(own, mesh, block_transform=transform.remat)
    return differences(wanted, (tensor.whole(gradient, spec, mesh), value))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_divided_text_encoder_is_that_of_one_process(processes, name):
    assert max(processes(2, errors_of, name)) < 3e-6


def test_heads_of_a_text_encoder_that_do_not_divide_are_refused(processes):
    with pytest.raises(AssertionError, match="tensor=4, but the 2 heads of the attention divide over 1, 2 processes"):
        processes(4, refused)


def refused():
    clip.apply(filled(clip.spec(CLIP)), CLIP, IDS, mesh=meshes.init({"tensor": 4}))
