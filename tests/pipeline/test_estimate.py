"""Memory of drawing images from specs alone: what small machines can draw, and figures that were measured."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from functional_sd3 import cli
from functional_sd3.core import live_bytes
from functional_sd3.core.attention import attention
from functional_sd3.image import vae
from functional_sd3.pipeline import estimate
from functional_sd3.text import clip, t5
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config

LARGE = Config(clip.CLIP_L, clip.CLIP_G, t5.T5_XXL, mmdit.SD35_LARGE, vae.SD3_VAE)
BASE = estimate.Choice(128, 128)
"""An image of 1024 x 1024 with guidance in bfloat16."""
CPU = replace(BASE, on_device=False, computed=torch.float32)


@functools.cache
def gigabytes(choice):
    return [size / 1e9 for size in estimate.peak(estimate.stages(LARGE, choice), on_device=choice.on_device)]


def test_large_with_all_encoders_draws_on_a_device_of_8_gb():
    """By swapped blocks, with less than 8 GB of pinned memory too, or by weights of a byte."""
    device, host = gigabytes(replace(BASE, swapped=24))
    assert device < 6 and host < 8
    assert gigabytes(replace(BASE, swapped=0, quantized=True))[0] < 7
    assert gigabytes(replace(BASE, offload=True))[0] > 16 and gigabytes(replace(BASE, swapped=0))[0] > 8


def test_large_draws_on_a_machine_of_16_gb_from_mapped_files():
    assert gigabytes(replace(CPU, swapped=38))[1] < 9
    assert gigabytes(replace(CPU, computed=torch.bfloat16, offload=True))[1] < 8
    assert gigabytes(replace(CPU, offload=True))[1] > 30


def test_what_is_computed_takes_what_a_gpu_was_measured_to_take():
    """MiB beyond the weights on an H100 in bfloat16 (bench/GPU.md)."""
    of = {stage.name: stage.results / 2**20 for stage in estimate.stages(LARGE, BASE)}
    assert of["decoding"] == pytest.approx(2178, rel=0.2)  # Workspaces of cuDNN are not known here.
    table = 28 * 2 * sum(
        (12 if index < 37 else 8) * 2432 * 2 for index in range(38)
    ) / 2**20  # fmt: skip
    assert of["steps"] - table == pytest.approx(473, rel=0.1)


def test_more_swapped_blocks_never_take_more():
    devices = [gigabytes(replace(BASE, swapped=count))[0] for count in (0, 24, 37)]
    assert devices == sorted(devices, reverse=True)


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_bytes_are_held_until_the_last_view_is_gone():
    def run():
        x = empty(1000)  # 4,000 bytes
        y = x[:10]
        del x
        z = y + 1  # 40 more
        del y
        return z + empty(500)[:10]  # 40 + 2,000, and the sum of 40

    assert live_bytes.peak_bytes(run) == 4040


def test_what_is_given_is_not_counted_and_what_is_returned_is():
    given = empty(100)
    assert live_bytes.peak_bytes(lambda: [given.view(10, 10), given + 1], [given]) == 400


def test_attention_holds_no_scores():
    query = empty(1, 2, 4096, 64, dtype=torch.bfloat16)
    held = live_bytes.peak_bytes(lambda: attention(query, query, query), [query])
    assert held == query.nbytes + 4 * 2 * 4096


def test_the_command_line_prints_it_for_a_device_that_is_not_here(capsys):
    """As docs/guides/scale.md has it."""
    words = ["generate", "--estimate", "--params", "sd3.5-large", "--device", "cuda", "--block-swap", "24"]
    assert cli.main([*words, "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sd3.5-large: 1 of 1024 x 1024, bfloat16, computed by the device")
    device, host = gigabytes(replace(BASE, swapped=24))
    guide = (Path(__file__).parents[2] / "docs/guides/scale.md").read_text(encoding="utf-8")
    assert all(line in guide for line in lines[1:] if not line.startswith("this command"))
    this = next(line for line in lines if line.startswith("this command")).split()
    assert this[-3:-1] == [f"{device:.2f}", f"{host:.2f}"]


def test_the_command_line_reads_the_sizes_of_files(capsys):
    assert cli.main(["generate", "a star", "--estimate", "--count", "4", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("tiny: 4 of 64 x 64, ")
