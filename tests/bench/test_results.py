"""bench/RESULTS.md: its rows are those of the code, one table a setting; rows are written one by one."""

import pytest
import torch

import bench.__main__ as command
from bench import gpu_attention, gpu_training, table

PAGE = (table.HERE / "RESULTS.md").read_text(encoding="utf-8")
TEMPLATES = [row for name in table.groups() for row in table.rows_of_file(table.HERE / f"bench_{name}.py")]
HERE, ELSEWHERE = (table.Setting(name, "1 thread, wall time, 2026-11-30", {"torch": "2"}) for name in ("A", "B"))


def measured(name, seconds):
    facts = {"row": name, "peer": "peer", "repeat": 1, "theirs": [1.0]}
    return {"extra_info": facts, "stats": {"median": seconds, "iqr": 0.0}}


def test_every_row_of_the_results_is_one_that_the_code_measures():
    names = [table.name_of(line) for lines in table.read(PAGE).values() for line in lines]
    assert len(names) == len(set(names)) > 30
    assert [name for name in names if not any(row.pattern.fullmatch(name) for row in TEMPLATES)] == []
    assert not any(row.pattern.fullmatch("peak memory of sampling, with packed weights") for row in TEMPLATES)


def test_every_table_says_where_and_when_it_was_measured():
    for heading in table.read(PAGE):
        assert "thread" in heading and "time, 20" in heading and "torch " in heading and "Python " in heading


def test_a_row_replaces_that_of_its_name_and_stands_in_the_table_of_its_setting():
    page = table.updated("", HERE, measured("one", 0.5))
    page = table.updated(page, HERE, measured("two", 0.7))
    page = table.updated(page, ELSEWHERE, measured("one", 0.25))
    sections = table.read(page)
    assert list(sections) == [HERE.heading, ELSEWHERE.heading]
    assert [[table.name_of(line) for line in lines] for lines in sections.values()] == [["two"], ["one"]]
    assert "| one | 250.0 ms | 1.00 s | **0.25** |" in page
    assert table.HERE / "RESULTS.md" and table.updated(page, HERE, measured("two", 0.7)) == page


def test_names_select_files_and_unknown_ones_are_refused(capsys):
    assert command.select(["attention", "text", "-k", "clip"]) == (["attention", "text"], ["-k", "clip"])
    assert command.main(["text", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "T5 forward" in printed and "of attention" not in printed
    assert command.main(["texts"]) == 2
    assert "there are: attention" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_its_rows_are_refused(capsys):
    assert gpu_attention.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_rows_for_a_gpu_run_in_a_small_size(tmp_path, capsys):
    out = tmp_path / "table.md"
    assert gpu_attention.main(["--device", "cpu", "--size", "small", "--rounds", "1", "--out", str(out)]) == 0
    lines = out.read_text(encoding="utf-8").splitlines()[4:]
    assert len(lines) == 7 and "MeanFlow step" in lines[-1]
    differences = [float(line.split(" | ")[4]) for line in lines[:-1]]
    assert max(differences) < 0.05


def test_the_training_rows_for_a_gpu_run_in_a_small_size(tmp_path):
    out = tmp_path / "table.md"
    assert gpu_training.main(["--device", "cpu", "--size", "small", "--rounds", "1", "--out", str(out)]) == 0
    lines = out.read_text(encoding="utf-8").splitlines()[6:]
    assert len(lines) == len(gpu_training.FULL) + 1 and lines[-1].startswith("| LoRA of rank 16")
    assert all(float(line.split(" | ")[3].strip("*")) > 0 for line in lines)
