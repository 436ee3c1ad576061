"""Files of Inception weights: the published ones, their variants and invalid files."""

import pickle

import pytest
import torch

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.metrics import inception
from functional_sd3.metrics.inception import file as files
from functional_sd3.weights import WeightsError
from tests.metrics import references

unknown = pytest.mark.filterwarnings("ignore::functional_sd3.metrics.inception.file.UnknownWeights")


@pytest.fixture(scope="module")
def state():
    return tree.flatten_paths(references.random_params())


@pytest.fixture(scope="module")
def published(state, tmp_path_factory):
    """As the published file: an ordered state with counters, in torch's format of 2019."""
    path = tmp_path_factory.mktemp("published") / files.FILE
    counters = {
        name.replace("weight", "num_batches_tracked"): torch.tensor(0) for name in state if name.endswith("bn.weight")
    }
    assert len(state | counters) == 566
    torch.save(state | counters, path, _use_new_zipfile_serialization=False)
    return path


def same(params, state) -> bool:
    actual = tree.flatten_paths(params)
    return actual.keys() == state.keys() and all(torch.equal(actual[name], state[name]) for name in state)


@unknown
def test_the_published_form_loads(published, state):
    assert same(inception.load(published), state)


@unknown
def test_a_file_without_counters_and_one_of_safetensors_hold_the_same(tmp_path, state, published):
    torch.save(state, tmp_path / "x.pth")
    weights.files.write_atomic(tmp_path / "x.safetensors", state)
    for name in ("x.pth", "x.safetensors"):
        params = inception.load(tmp_path / name)
        assert same(params, state), name
    assert inception.fingerprint(params) == inception.fingerprint(inception.load(published))


@unknown
def test_the_dtype_is_the_requested_one(published):
    params = inception.load(published, dtype=torch.bfloat16)
    assert {leaf.dtype for leaf in tree.leaves(params)} == {torch.bfloat16}


def test_unknown_weights_give_a_warning_and_an_error_when_strict(published):
    actual = files.sha256(published)
    with pytest.warns(inception.UnknownWeights, match=f"SHA-256 {actual} is not that of {files.FILE}"):
        inception.load(published)
    with pytest.raises(WeightsError, match=actual):
        inception.load(published, strict=True)


def test_known_weights_load_silently(published, monkeypatch):
    monkeypatch.setattr(files, "SHA256", files.sha256(published))
    inception.load(published, strict=True)


def test_missing_unexpected_and_misshapen_tensors_are_named_together(tmp_path, state):
    broken = {name: value for name, value in state.items() if name != "fc.bias"}
    broken |= {"AuxLogits.fc.weight": torch.zeros(2), "Mixed_5b.branch1x1.conv.weight": torch.zeros(64, 192, 3, 3)}
    broken["Conv2d_1a_3x3.bn.bias"] = torch.zeros(32, dtype=torch.int64)
    torch.save(broken, tmp_path / "x.pth")
    with pytest.raises(WeightsError) as caught:
        inception.load(tmp_path / "x.pth")
    said = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for part in ("fc.bias is missing", "AuxLogits.fc.weight is unexpected", "branch1x1.conv.weight has shape", "int64"):
        assert part in said


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_files_without_tensors_are_refused(tmp_path, published):
    class Trap:
        def __reduce__(self):
            return print, ("executed",)

    program = torch.jit.trace(torch.nn.ReLU(), torch.zeros(1))
    torch.jit.save(program, tmp_path / "program.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("<!DOCTYPE html>")
    (tmp_path / "cut.pth").write_bytes(published.read_bytes()[:1_000_000])
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "nested.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 5)
    (tmp_path / "folder.pth").mkdir()
    for path in [*tmp_path.iterdir(), tmp_path / "absent.pth", tmp_path / "absent.safetensors"]:
        with pytest.raises(WeightsError, match=path.name):
            inception.load(path)


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"fc.bias": Trap()}, tmp_path / "x.pth")
    with pytest.raises(WeightsError):
        inception.load(tmp_path / "x.pth")
    assert "executed" not in capsys.readouterr().out
