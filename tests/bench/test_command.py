"""`python -m bench` as a command: its help is its own, not pytest's."""

import pytest

import bench.__main__ as command


@pytest.mark.parametrize("options", [["--help"], ["image", "-h"]], ids=str)
def test_help_is_that_of_the_benchmarks(options, capsys, monkeypatch):
    monkeypatch.setattr(command.pytest, "main", lambda words: pytest.fail(f"pytest ran with {words}"))
    assert command.main(options) == 0
    said = capsys.readouterr().out
    assert "--cpu-time" in said and "-k ROW" in said and len(said.splitlines()) < 20
