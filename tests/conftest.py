"""Settings and fixtures of all tests."""

import gc
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from functional_sd3 import weights
from functional_sd3.core import tree
from functional_sd3.weights import shipped
from tests.processes import Pool
from tests.skips import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]

# Two workers on two cores: more threads in each only get in one another's way.
torch.set_num_threads(1)
# Inductor's cache does not tell instruction sets apart: code compiled under another ATEN_CPU_CAPABILITY gives garbage.
_CACHE = f"torchinductor-tests-{torch.backends.cpu.get_cpu_capability()}-{torch.__version__}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / _CACHE))
# A shell that starts the suite in the background makes it ignore SIGINT, which the tests of interruption send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Wall time says nothing on a shared machine; derandomised so that every run tests the same examples.
settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")


def pytest_configure(config) -> None:
    """Removes libraries that a killed run left empty in inductor's cache, where they would fail every later run."""
    if hasattr(config, "workerinput"):
        return
    for path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).glob("*/*.so"):
        # One that is being linked now is empty too.
        if path.stat().st_size == 0 and time.time() - path.stat().st_mtime > 600:
            path.unlink(missing_ok=True)


def pytest_collection() -> None:
    """No search for cycles while nine thousand tests are made, nearly all of which stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Modules and tests are there to the end: later searches for cycles leave them out.

    With Python's thresholds, 700 new objects and 70,000, the searches took a tenth of the processor's time.
    """
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Thousands of saves need not outlive a loss of power; `weights/test_atomic.py` counts the syncs of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _checked)
        yield


@pytest.fixture(scope="session")
def model():
    """A small model of random weights (`tests.models`), shared by all tests: none writes into it."""
    from tests import models

    return models.random_model()


@pytest.fixture(scope="module")
def folder(model, request, tmp_path_factory):
    """Files of `model` under diffusers' names, in its own dtype or the module's STORED."""
    path = tmp_path_factory.mktemp("saved") / "model"
    weights.save(path, model, dtype=getattr(request.module, "STORED", None))
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizer files, kept beside the checkout because they are not the project's."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "tokenizers").is_dir():
        pytest.skip("needs the real SD3.5 tokenizer files")
    return folder


@pytest.fixture(scope="session", params=["shipped", "real"])
def tokenizer_files(request) -> Path:
    """A folder with tokenizer/, tokenizer_2/ and tokenizer_3/: that of params/tiny, and SD3.5's where it is kept."""
    if request.param == "shipped":
        return shipped.folder()
    return request.getfixturevalue("shared_data") / "tokenizers"


@pytest.fixture(scope="session")
def processes():
    """`processes(count, fn, *args)`: results of fn in `count` processes of a gloo group (`tests.processes`)."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def same():
    """Whether two trees are equal bit for bit, dtypes too."""

    def compare(ours, theirs) -> bool:
        one, other = tree.flatten_paths(ours), tree.flatten_paths(theirs)
        return one.keys() == other.keys() and all(
            one[path].dtype == other[path].dtype
            and one[path].shape == other[path].shape
            and torch.equal(_bits(one[path]), _bits(other[path]))
            for path in one
        )

    return compare


def _checked(descriptor: int) -> None:
    """What is left of a sync: an error where the descriptor is none of an open file."""
    os.fstat(descriptor)


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)
