"""The end of `make test` says what was skipped for want of what, and how to bring it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import skips

TESTS = Path(__file__).resolve().parent
_REASON = re.compile(r"""(?:pytest\.skip\(|skipif\(.*?reason=)f?(["'])(.+?)\1""")
BODY = """
import pytest

@pytest.mark.parametrize("number", range(4))
def test_that_skips(number):
    pytest.skip("needs a C++ compiler")

def test_that_runs():
    pass
"""


def test_skips_are_counted_by_reason_with_a_remedy():
    reasons = ["odd", *["Skipped: needs the real SD3.5 tokenizer files"] * 3, *["Skipped: needs a GPU of Nvidia's"] * 2]
    first, second, third = skips.skip_lines(reasons)
    assert first.startswith("3 tests skipped: needs the real SD3.5 tokenizer files; to run: put the folders tokenizer")
    assert second.startswith("2 tests skipped: needs a GPU of Nvidia's; to run: run on a machine with an Nvidia GPU")
    assert third == "1 test skipped: odd"
    assert skips.skip_lines([]) == []


def test_every_reason_in_the_tests_has_a_remedy():
    pages = {path: path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py") if path != Path(__file__).resolve()}
    reasons = [(path.name, reason) for path, text in pages.items() for _, reason in _REASON.findall(text)]
    assert len(reasons) > 5
    assert not [each for each in reasons if skips.remedy(each[1]) is None], "add it to REMEDIES in tests/skips.py"


@pytest.mark.parametrize("workers", [("-p", "no:xdist"), ("-n", "2")], ids=["one process", "two workers"])
def test_the_summary_has_the_reports_of_all_processes(workers, tmp_path):
    (tmp_path / "test_it.py").write_text(BODY, encoding="utf-8")
    options = ["-q", "-p", "tests.skips", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    words = [sys.executable, "-m", "pytest", *options, *workers, str(tmp_path / "test_it.py")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    said = subprocess.run(words, capture_output=True, text=True, cwd=TESTS.parent, env=environment, timeout=300)
    assert "4 tests skipped: needs a C++ compiler; to run: install g++" in said.stdout, said.stdout + said.stderr
