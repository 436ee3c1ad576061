"""Files are read within bounds, and only files are."""

import os
import re

import pytest

from functional_sd3.formats import bounded, printable
from functional_sd3.formats.errors import WeightsError


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="pipe: is a named pipe, not a file"):
        bounded.read_bytes(tmp_path / "pipe", 10)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=re.escape(f"{tmp_path}: ")):
        bounded.open_file(tmp_path)
    with pytest.raises(WeightsError, match="absent: cannot be opened: no such file"):
        bounded.open_file(tmp_path / "absent")
    with pytest.raises(WeightsError, match="is not a path"):
        bounded.open_file("a\0b")


def test_no_more_bytes_are_read_than_allowed(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert bounded.read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(WeightsError, match="larger than 4 bytes"):
        bounded.read_bytes(tmp_path / "x", 4)


def test_characters_that_a_terminal_acts_on_are_escaped():
    assert printable.escape("a\x1b[31m\u202eb\n\ud800") == r"a\x1b[31m\u202eb\n\ud800"
    assert printable.escape("日本語 é 🎨") == "日本語 é 🎨"
    assert printable.escape("a\nb", keep="\n") == "a\nb"
    assert printable.shorten("a" * 10**6, 10) == "aaaaaaa..."
    assert "\x1b" not in str(WeightsError("key \x1b]0;owned\x07 is unexpected"))
