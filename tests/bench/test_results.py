"""bench/RESULTS.md: its rows are those of the code, one table a setting; rows are written one by one."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import bench.__main__ as command
from bench import gpu_attention, gpu_training, openvino_peer, table, timing

PATHS = [table.HERE / "RESULTS.md", *sorted((table.HERE / "results").glob("*.md"))]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in PATHS}
TEMPLATES = [row for name in table.groups() for row in table.rows_of_file(table.HERE / f"bench_{name}.py")]
HERE, ELSEWHERE = (table.Setting(name, "1 thread, wall time, 2026-11-30", {"torch": "2"}) for name in ("A", "B"))


def measured(name, seconds):
    facts = {"row": name, "peer": "peer", "repeat": 1, "theirs": [1.0]}
    return {"extra_info": facts, "stats": {"median": seconds, "iqr": 0.0}}


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_the_results_is_one_that_the_code_measures(page):
    names = [table.name_of(line) for lines in table.read(PAGES[page]).values() for line in lines]
    assert len(names) == len(set(names)) > 10
    assert [name for name in names if not any(row.pattern.fullmatch(name) for row in TEMPLATES)] == []
    assert not any(row.pattern.fullmatch("peak memory of sampling, with packed weights") for row in TEMPLATES)


@pytest.mark.parametrize("page", PAGES)
def test_every_table_says_where_and_when_it_was_measured(page):
    for heading in table.read(PAGES[page]):
        assert "thread" in heading and "time, 20" in heading and "torch " in heading and "Python " in heading


@pytest.mark.parametrize("page", PAGES)
def test_one_setting_has_one_table(page):
    titles = [heading.split("\n")[0] for heading in table.read(PAGES[page])]
    assert len(titles) == len(set(titles))


def test_each_processor_has_its_page():
    processors = [{heading.split(",")[0] for heading in table.read(page)} for page in PAGES.values()]
    assert len(processors) > 1 and not set.intersection(*processors)


def test_a_row_replaces_that_of_its_name_and_stands_in_the_table_of_its_setting():
    page = table.updated("", HERE, measured("one", 0.5))
    page = table.updated(page, HERE, measured("two", 0.7))
    page = table.updated(page, ELSEWHERE, measured("one", 0.25))
    sections = table.read(page)
    assert list(sections) == [HERE.heading, ELSEWHERE.heading]
    assert [[table.name_of(line) for line in lines] for lines in sections.values()] == [["two"], ["one"]]
    assert "| one | 250.0 ms | 1.00 s | **0.25** |" in page
    assert table.updated(page, HERE, measured("two", 0.7)) == page
    notes = f"\n{table.NOTES}\n\n| what | us |\n|---|---|\n| one | 5 |\n"
    assert table.updated(page + notes, HERE, measured("two", 0.7)) == page + notes
    assert table.read(page + notes) == sections


def test_further_peers_are_rows_of_their_own_with_the_same_seconds_of_ours():
    several = measured("one", 0.5)
    several["extra_info"] |= {"repeat": 2, "beside": {"OpenVINO": {"theirs": [0.5, 0.5], "difference": 1e-6}}}
    first, second = table.rows_of(several)
    assert (first.name, first.peer, first.ratio) == ("one", "peer", 0.25)
    assert (second.name, second.peer, second.ratio) == ("one, against OpenVINO", "OpenVINO", 0.5)
    assert second.facts == {"difference": 1e-6} and table.rows({"benchmarks": [several]}) == [first, second]
    page = table.updated(table.updated("", HERE, several), HERE, several)
    assert [table.name_of(line) for line in table.read(page)[HERE.heading]] == ["one", "one, against OpenVINO"]
    text = [line.split() for line in table.printed([first, second]).splitlines()]
    assert text == [
        ["ours", "theirs", "ratio", "row,", "other", "side"],
        ["250.0", "ms", "1.00", "s", "0.25", "one,", "peer"],
        ["250.0", "ms", "500.0", "ms", "0.50", "one,", "OpenVINO"],
    ]


def test_further_peers_run_in_the_rounds_of_the_row_and_must_agree():
    rows, calls = [], []

    class Benchmark:
        extra_info = {}
        stats = SimpleNamespace(stats=SimpleNamespace(median=1.0, iqr=0.0))

        def pedantic(self, run, setup=lambda: None, rounds=1):
            for _ in range(rounds):
                setup()
                run()

    versus = timing.Versus(Benchmark(), on_row=rows.append)
    peer = timing.Beside(lambda: calls.append(1) or torch.ones(2) * 1.01, 0.1)
    versus("row", lambda: torch.ones(2), lambda: torch.ones(2), rounds=3, beside={"third": peer})
    (row,) = rows
    third = row["extra_info"]["beside"]["third"]
    assert len(third["theirs"]) == 3 and len(calls) == 4 and third["difference"] == pytest.approx(0.01, rel=0.02)
    with pytest.raises(ValueError, match="the sides differ by 9.90e-03, more than 1e-03"):
        versus("row", lambda: torch.ones(2), None, beside={"third": peer._replace(tolerance=1e-3)})


def test_rows_with_further_peers_have_names_for_them():
    labels = [row.label for row in TEMPLATES]
    sampling = ("28 steps with guidance, the latents alone", "28 steps with guidance, width 512")
    for start in ("MMDiT forward", "T5 forward", "VAE decode, 256x256", *sampling):
        assert any(label.startswith(start) and table.AGAINST in label for label in labels)


@pytest.mark.skipif(not openvino_peer.available(), reason="could not import 'openvino'")
def test_openvino_computes_the_same_function():
    layer, x = torch.nn.Linear(8, 4), torch.ones(3, 8)
    (peer,) = openvino_peer.beside(lambda x: layer(x).tanh(), (x,), layer, dtype=torch.float32).values()
    with torch.no_grad():
        torch.testing.assert_close(peer.run(), layer(x).tanh(), rtol=1e-5, atol=1e-6)
    loops = openvino_peer.loops(lambda call: call(call(x)[:, :1].expand(3, 8)), lambda x: layer(x), (x,), layer)
    with torch.no_grad():
        expected = layer(layer(x)[:, :1].expand(3, 8))
    torch.testing.assert_close(next(iter(loops.values())).run(), expected, rtol=1e-5, atol=1e-6)


class _Transformer(torch.nn.Linear):
    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict=True, **_):
        weighted = timestep[:, None] * super().forward(hidden_states) + encoder_hidden_states - 2 * pooled_projections
        return (weighted,)


class _Vae(torch.nn.Linear):
    def decode(self, latents, return_dict=True):
        return (self(latents),)


@pytest.mark.skipif(not openvino_peer.available(), reason="could not import 'openvino'")
def test_a_pipeline_runs_with_openvinos_networks_and_is_left_as_it_was():
    transformer, vae, calls = _Transformer(4, 4), _Vae(4, 2), []
    latents, context, pooled = (torch.full((2, 4), value) for value in (1.0, 2.0, 3.0))
    for module in (transformer, vae):
        module.register_forward_hook(lambda *_: calls.append(1))

    def run():
        inputs = {"timestep": torch.full((2,), 0.5), "pooled_projections": pooled, "encoder_hidden_states": context}
        (x,) = transformer(hidden_states=latents, joint_attention_kwargs=None, return_dict=False, **inputs)
        return vae.decode(x[:1], return_dict=False)[0]

    pipeline = SimpleNamespace(transformer=transformer, vae=vae)
    (peer,) = openvino_peer.pipelines(pipeline, latents, context, pooled, run=run).values()
    with torch.no_grad():
        calls.clear()
        found = peer.run()
        assert len(calls) == 1  # the transformer's module around the network; the decoder's is not called
        expected = run()
        assert len(calls) == 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_openvino_rows_have_no_further_peer(monkeypatch):
    monkeypatch.setattr(openvino_peer, "available", lambda: False)
    assert openvino_peer.beside(None, (), dtype=torch.float32) == openvino_peer.loops(None, None, ()) == {}
    assert openvino_peer.pipelines(None, None, run=None) == {}


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


def test_processor_time_has_that_of_processes_that_have_ended():
    code = "import time\nwhile time.process_time() < 0.3: pass"
    own, whole = time.process_time(), timing.processor_time()
    subprocess.run([sys.executable, "-S", "-c", code], check=True)
    taken, own = timing.processor_time() - whole, time.process_time() - own
    assert taken - own >= 0.25
