"""Every JSON file of a model with a field of the wrong kind: one WeightsError or a whole model, in time and memory."""

import json
import shutil
import time
import tracemalloc
import warnings

import pytest

from functional_sd3 import weights
from functional_sd3.flow import schedule
from functional_sd3.formats.notes import Note
from functional_sd3.image import taesd, vae
from functional_sd3.transformer import mmdit
from functional_sd3.weights import Config, Model, WeightsError

TINY = Config(
    transformer=mmdit.Config(depth=1, heads=1, head_dim=4, context_width=2, pooled_width=2, position_size=1),
    vae=vae.Config(channels=(1,), blocks_per_level=1, groups=1, latent_channels=1),
    taesd=taesd.Config(width=1, latent_channels=1, encoder_blocks=(1,), decoder_blocks=(1,)),
    schedule=schedule.Config(),
)
FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "taesd/config.json",
)
VALUES = (
    "null", "true", "5", "0", "-1", "0.5", "1e400", "NaN", "9" * 400, '"x"', '""', "[]", "{}", "[[]]", "[null]",
    '["a", 5]', "[1, 2, 3]", "[" * 200 + "]" * 200, '{"a": {"b": []}}', "1000000000", "[" + "9999," * 5000 + "9]",
    '"\\ud800"', '"../../etc/passwd"',
)  # fmt: skip
SECONDS, BYTES = 20.0, 2**28
"""Generous: less than a tenth is needed; a sixth of the values for each field keeps the test short."""


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "model"
    weights.save(folder, make_model(TINY), shard_bytes=3_000)
    weights.load(folder)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_field_of_the_wrong_kind_is_a_weights_error_or_a_whole_model(name, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    place = folder / name
    original = json.loads(place.read_text())
    tracemalloc.start()
    try:
        for number, field in enumerate([None, *original]):
            for value in VALUES[0 if field is None else number % 6 :: 1 if field is None else 6]:
                if field is None:
                    place.write_text(value)
                else:
                    kept = {one: content for one, content in original.items() if one != field}
                    place.write_text(json.dumps(kept)[:-1] + f", {json.dumps(field)}: {value}}}")
                check(folder, f"{name}: {field} = {value[:40]}")
    finally:
        tracemalloc.stop()


def check(folder, what: str) -> None:
    started = time.process_time()
    tracemalloc.reset_peak()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            found = weights.outline(folder)
        assert isinstance(found, Model), what
    except WeightsError as error:
        assert error.problems and all(str(folder) in problem for problem in error.problems), (what, error.problems)
    assert time.process_time() - started < SECONDS, what
    assert tracemalloc.get_traced_memory()[1] < BYTES, what
