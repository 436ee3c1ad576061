"""The names that `dir` and `help` show of the package and of its modules."""

import pydoc
import types

import pytest
import torch

import functional_sd3 as sd3


def test_dir_of_the_package_has_its_modules_and_its_version_alone():
    assert dir(sd3) == sorted([*sd3.__all__, "__version__"])


@pytest.mark.parametrize("name", sd3.__all__)
def test_dir_of_a_module_has_the_public_names_that_it_defines(name):
    module = getattr(sd3, name)
    names = dir(module)
    assert names and not [shown for shown in names if shown.startswith("_")]
    for shown in names:
        value = getattr(module, shown)
        if not isinstance(value, types.ModuleType):
            owner = getattr(value, "__module__", None) or "functional_sd3"
            assert owner.split(".")[0] in ("functional_sd3", "builtins", "typing", "types", "collections"), shown
        else:
            assert shown in module.__all__


def test_dir_of_the_transformer_has_its_functions_and_not_what_it_imports():
    assert {"Config", "SD35_MEDIUM", "apply", "init", "modulations", "spec"} <= set(dir(sd3.mmdit))
    assert not {"Tensor", "torch", "partial", "TIME_FREQUENCIES", "layers"} & set(dir(sd3.mmdit))


@pytest.mark.parametrize("name", ["mmdit", "weights"])
def test_a_module_is_looked_up_once_and_then_bound(name, monkeypatch):
    module = getattr(sd3, name)
    monkeypatch.setattr("importlib.import_module", lambda path: pytest.fail(f"{path} is imported again"))
    assert getattr(sd3, name) is module and vars(sd3)[name] is module


def test_help_says_a_line_of_each_module():
    lines = {line.strip().partition(":")[0]: line.partition(":")[2] for line in (sd3.__doc__ or "").splitlines()}
    for name in sd3.__all__:
        assert len(lines[name]) > 20, f"{name} has no docstring"
    assert "Random numbers" in lines["prng"]


def test_help_has_what_a_module_exports_again_and_an_unknown_name_suggests_the_nearest():
    shown = pydoc.plain(pydoc.render_doc(sd3.tree))
    for name in ("map", "flatten_paths", "unflatten_paths"):
        assert f"\n    {name}(" in shown
    for module, wrong, right in ((sd3, "mmditt", "mmdit"), (sd3.tree, "flaten_paths", "flatten_paths")):
        with pytest.raises(AttributeError, match=f"has no attribute '{wrong}'") as caught:
            getattr(module, wrong)
        assert caught.value.name == wrong and right in dir(caught.value.obj)


def test_a_model_and_a_state_of_training_print_their_parts_and_no_numbers():
    model = sd3.weights.load(sd3.shipped.folder(), dtype=torch.float32)
    state = sd3.step.init(sd3.prng.key(0), model.params["transformer"], sd3.optim.adamw(0.1), trainable="*bias")
    for value, part in ((model, "transformer"), (state, "params"), (model.tokenizers, "bpe.Tables(608 tokens")):
        assert len(repr(value)) < 1000 and part in repr(value) and "tensor(" not in repr(value)
