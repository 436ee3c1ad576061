"""Methods of distillation: their registry, their settings, and students with parameters that their teachers lack."""

import dataclasses

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.cli import distill_options, train_model
from functional_sd3.core import prng, tree
from functional_sd3.flow import distilled
from functional_sd3.training import distill_methods, learner
from functional_sd3.training.distill_methods import METHODS, DistillMethod, Settings, with_defaults
from functional_sd3.transformer import mmdit


def test_the_command_line_knows_the_methods_and_their_own_options():
    assert set(distill_options.METHODS) == set(METHODS)
    owners = {}
    for name, method in METHODS.items():
        assert method.kind in distilled.KINDS
        for option in method.options:
            owners.setdefault(option, []).append(name)
    assert {name: set(methods) for name, methods in distill_options.OWN.items()} == {
        name: set(methods) for name, methods in owners.items()
    }


def test_settings_of_a_method_are_filled_in_and_those_of_others_are_errors():
    loss = METHODS["segments"].loss
    methods = {"segments": METHODS["segments"], "other": DistillMethod("meanflow", loss)}
    assert with_defaults(methods, Settings(to=4)).inner == 3
    assert with_defaults(methods, Settings(to=4, inner=5)).inner == 5
    assert with_defaults(methods, Settings(to=4, method="other")).inner is None
    with pytest.raises(ValueError, match="inner is for method segments, not for other"):
        with_defaults(methods, Settings(to=4, method="other", inner=3))
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
