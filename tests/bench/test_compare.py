"""The gate over two runs of the benchmarks."""

import json

import pytest

from bench import compare, table


def run_of(**ratios):
    """A run in pytest-benchmark's format whose peers all take one second."""
    rows = [
        {
            "extra_info": {"row": name, "peer": "peer", "repeat": 2, "theirs": [1.0, 1.0, 1.0]},
            "stats": {"median": 2 * ratio, "iqr": 0.1},
        }
        for name, ratio in ratios.items()
    ]
    machine = {"versions": {"torch": "2"}, "python_version": "3.11"}
    return {"benchmarks": rows, "machine_info": machine, "threads": 2}


def files(folder, old, new):
    paths = folder / "old.json", folder / "new.json"
    for path, run in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(run))
    return [str(path) for path in paths]


@pytest.mark.parametrize(
    ("new", "status"),
    [({"a": 0.8, "b": 0.9}, 0), ({"a": 0.91, "b": 0.5}, 0), ({"a": 0.93, "b": 0.5}, 1), ({"a": 0.8}, 1)],
    ids=["equal", "14 % slower", "16 % slower", "row gone"],
)
def test_a_row_that_got_slower_against_its_peer_fails(tmp_path, capsys, new, status):
    assert compare.main(files(tmp_path, run_of(a=0.8, b=0.9), run_of(**new))) == status
    assert ("slower" in capsys.readouterr().out.splitlines()[0]) or status == 1


def test_what_is_no_run_is_said_so(tmp_path, capsys):
    assert compare.main(files(tmp_path, {"x": 1}, run_of(a=1.0))) == 2
    assert "not a run" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "missing.json"), str(tmp_path / "new.json")]) == 2


def test_the_page_shows_ratios_of_single_calls():
    setting = table.Setting("cpu", "1 thread", {})
    page = table.updated("", setting, run_of(attention=0.8)["benchmarks"][0])
    assert "| attention | 800.0 ms | 1.00 s | **0.80** |" in page
