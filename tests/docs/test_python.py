"""Every Python block of README.md and docs/ runs in a clean interpreter; every name that the pages use exists.

Those of the course, docs/learn/, are run by test_learn.py.
"""

import json
import os
import re
import subprocess
import sys

import pytest

import functional_sd3 as sd3
from tests.docs import interpreter, markdown

PROGRAMS = [
    pytest.param(page, blocks, id=f"{page.name}:{blocks[0].line}")
    for page in markdown.PAGES
    if page.parent.name != "learn"
    for blocks in markdown.programs(page.read_text(encoding="utf-8"))
]
_DOTTED = re.compile(r"(?<![\w./-])[a-z]\w*(?:\.[A-Za-z_]\w*)+(?![\w./-])")
_FILES = (".py", ".md", ".safetensors", ".json", ".png")


@pytest.fixture(scope="module")
def interpreters():
    """A process that runs programs, each in a clean interpreter."""
    paths = os.pathsep.join([str(markdown.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        [sys.executable, interpreter.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield process


def traceback_of(interpreters, folder, name: str, blocks: list[markdown.Block]) -> str:
    described = [{"name": name, "line": line, "text": text} for _, line, text in blocks]
    interpreters.stdin.write(json.dumps({"folder": str(folder), "blocks": described}) + "\n")
    interpreters.stdin.flush()
    return json.loads(interpreters.stdout.readline())


@pytest.mark.parametrize("page, blocks", PROGRAMS)
def test_every_block_runs_by_itself_or_after_those_it_says_it_continues(page, blocks, folder, interpreters):
    said = traceback_of(interpreters, folder, str(page), blocks)
    assert not said, said


@pytest.mark.parametrize(
    "text, said",
    [
        ("import functional_sd3 as sd3\nsd3.pipeline.generation", "has no attribute 'generation'"),
        ("torch.zeros(1)", "name 'torch' is not defined"),
        ("import os\nos._exit(3)", "ended with status"),
    ],
)
def test_a_block_that_does_not_run_is_a_failure(text, said, tmp_path, interpreters):
    assert said in traceback_of(interpreters, tmp_path, "page", [markdown.Block("python", 1, text)])


@pytest.mark.parametrize("page", markdown.PAGES, ids=lambda page: page.name)
def test_every_dotted_name_of_a_public_module_exists(page):
    absent = []
    for name in sorted(set(_DOTTED.findall(page.read_text(encoding="utf-8")))):
        first, *rest = name.removeprefix("sd3.").split(".")
        if name.endswith(_FILES) or not (name.startswith("sd3.") or first in sd3.__all__):
            continue
        value = sd3
        for part in (first, *rest):
            value = getattr(value, part, None)
        absent += [name] if value is None else []
    assert not absent
