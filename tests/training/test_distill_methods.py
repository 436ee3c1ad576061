"""Methods of distillation: their registry, their settings, and students with parameters that their teachers lack."""

import argparse
import dataclasses

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.cli import distill_options as command_line
from functional_sd3.cli import train_model
from functional_sd3.core import prng, tree
from functional_sd3.flow import distilled
from functional_sd3.training import distill_methods, distill_options, learner
from functional_sd3.training.distill_methods import METHODS, Settings, with_defaults
from functional_sd3.transformer import mmdit


def test_the_command_line_knows_the_methods_and_their_own_options():
    assert distill_options.METHODS == tuple(METHODS)
    assert all(method.kind in distilled.KINDS for method in METHODS.values())
    fields = {field.name for field in dataclasses.fields(Settings)}
    for name, option in distill_options.OPTIONS.items():
        assert name in fields and set(option.defaults) <= set(METHODS)
    parser = argparse.ArgumentParser()
    command_line.add_arguments(parser)
    known = vars(parser.parse_args(["--to", "4", "--out", "x"]))
    assert all(known[name] is None for name in distill_options.OPTIONS)
    said = parser.format_help().replace("\n", " ")
    assert "default 0.5 of meanflow or imeanflow; 0.875 of shortcut" in " ".join(said.split())


def test_settings_of_a_method_are_filled_in_and_those_of_others_are_errors():
    assert with_defaults(Settings(to=4)).inner == 3
    assert with_defaults(Settings(to=4, inner=5)).inner == 5
    assert with_defaults(Settings(to=4, method="scm")).inner is None
    with pytest.raises(ValueError, match="inner is for method segments, not for scm"):
        with_defaults(Settings(to=4, method="scm", inner=3))
    with pytest.raises(ValueError, match="equal is for method meanflow, imeanflow or shortcut, not for scm"):
        with_defaults(Settings(to=4, method="scm", equal=0.5))
    assert distill_methods.Settings is Settings


def test_a_student_with_new_parameters_starts_as_its_teacher(tiny):
    wider = dataclasses.replace(tiny.config, transformer=dataclasses.replace(tiny.config.transformer, interval_size=8))
    model = weights.Model(tiny.params, tiny.config, weights.Tokenizers())
    student = learner.extended(prng.key(0), model, wider)
    fresh = tree.flatten_paths(student.params["transformer"])
    assert {name: leaf.shape for name, leaf in fresh.items()} == {
        name: param.shape for name, param in mmdit.specs.paths(mmdit.spec(wider.transformer)).items()
    }
    assert "interval" not in tiny.params["transformer"] and fresh["interval.in.weight"].abs().sum() > 0
    inputs = [prng.normal(prng.key(1), shape) for shape in ((2, 16, 4, 4), (2, 3, 32), (2, 32))]
    x, context, pooled = inputs
    t = torch.tensor([0.3, 0.9])
    before, after = (
        mmdit.apply(params["transformer"], config.transformer, x, t, context, pooled)
        for params, config in ((tiny.params, tiny.config), (student.params, student.config))
    )
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_new_parameters_are_stored_in_the_commonest_dtype():
    stored = {"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(2, dtype=torch.float16), "c": torch.ones(2)}
    learned = {**{name: torch.full((2,), 0.5) for name in stored}, "new": {"d": torch.full((2,), 7e5)}}
    saved = train_model.as_stored({**learned, "e": torch.ones(2)}, stored)
    assert {name: leaf.dtype for name, leaf in tree.flatten_paths(saved).items()} == {
        "a": torch.float16, "b": torch.float16, "c": torch.float32, "new.d": torch.float32, "e": torch.float16,
    }  # fmt: skip
