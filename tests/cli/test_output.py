"""Where images go: forms, folders, names that no two processes share, and what is there when a run is cut short."""

import os
import shlex
import stat
import subprocess
import sys

import pytest
import torch
from PIL import Image

from functional_sd3 import cli, pipeline, weights
from functional_sd3.cli import image_settings, output

PROMPT = "a large red circle on a white background"
FORMS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".JPG": "JPEG"}


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def shown(path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.tensor(list(image.convert("RGB").tobytes()))


def generate(folder, out, *words) -> int:
    return run("generate", PROMPT, "--params", folder, "--steps", 1, "--out", out, *words)


@pytest.mark.parametrize("suffix", FORMS)
def test_the_suffix_is_the_form_and_the_settings_are_inside(folder, tmp_path, capsys, suffix):
    out = tmp_path / f"x{suffix}"
    assert generate(folder, out, "--seed", 4, "--negative", "é\nblue") == 0
    with Image.open(out) as image:
        assert image.format == FORMS[suffix] and image.size == (64, 64)
    capsys.readouterr()
    assert run("inspect", out) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert "--seed 4" in line and "$'é\\u000ablue'" in line
    settings = image_settings.read_record(out)["command"]
    assert settings["negative"] == "é\nblue" and settings["seed"] == 4


def test_jpeg_and_webp_show_what_png_does(folder, tmp_path):
    for suffix in (".png", ".jpg", ".webp"):
        assert generate(folder, tmp_path / f"x{suffix}") == 0
    png, jpeg, webp = (shown(tmp_path / f"x{suffix}") for suffix in (".png", ".jpg", ".webp"))
    assert torch.equal(png, webp) and 0 < (png - jpeg).abs().float().mean() < 12


def test_settings_too_long_for_a_jpeg_are_noted(tmp_path, capsys):
    output.save(tmp_path / "x.jpg", Image.new("RGB", (8, 8)), {"prompts": ["x" * 70_000]})
    assert "do not fit into a JPEG" in capsys.readouterr().err
    assert image_settings.read_record(tmp_path / "x.jpg") is None


@pytest.mark.parametrize("name", ["x.tiff", "a.b", "v1.0", "x.gif", "x.pngg", "x.safetensors", ".x.bmp"])
def test_an_unknown_suffix_is_an_error_that_names_the_known_ones(tmp_path, capsys, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (("generate", "x"), ("edit", __file__, "--from", "x", "--to", "y")):
        assert run(*words, "--out", name) == 1
        error = capsys.readouterr().err
        assert ".png, .jpg, .jpeg, .webp" in error and f"end it with / if it is to be a folder: {name}/" in error
    assert not list(tmp_path.iterdir())
    assert output.destination(f"{name}/") == (tmp_path.__class__(name), False)
    (tmp_path / name).mkdir()
    assert output.destination(name) == (tmp_path.__class__(name), False)


def test_a_file_without_a_suffix_is_no_folder(tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    assert run("generate", "x", "--out", tmp_path / "notes") == 1
    assert "is a file that has no suffix of an image" in capsys.readouterr().err
    assert (tmp_path / "notes").read_text() == "mine"


def test_checking_where_to_write_changes_nothing(tmp_path, capsys):
    for name in (".functional-sd3-probe", ".x.json.probe", "x.json"):
        (tmp_path / name).write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    output.destination(str(tmp_path))
    output.destination(str(tmp_path / "x.png"))
    output.destination(str(tmp_path / "new" / "newer"))
    assert run("likelihood", tmp_path / "none.png", "--prompt", "x", "--json", tmp_path / "x.json") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", f"{dir}/tmp1234")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    assert run("generate", "x", "--out", tmp_path / "deep" / "out") == 1
    assert f"Permission denied: {tmp_path}\n" in capsys.readouterr().err


def test_an_overwritten_image_keeps_its_mode_and_a_link_is_written_through(folder, tmp_path):
    (tmp_path / "real.png").write_bytes(b"old")
    os.chmod(tmp_path / "real.png", 0o640)
    (tmp_path / "link.png").symlink_to("real.png")
    assert generate(folder, tmp_path / "link.png") == 0
    assert (tmp_path / "link.png").is_symlink() and image_settings.read_record(tmp_path / "real.png")["command"]
    assert stat.S_IMODE((tmp_path / "real.png").stat().st_mode) == 0o640


def test_new_files_have_the_mode_that_files_have(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert output.write_new(tmp_path, "x", ".png", b"1").stat().st_mode == plain.stat().st_mode


WITHOUT_LINKS = """
import os
def refuse(*_): raise OSError(1, "no links")
os.link = refuse
"""
WRITERS = """
import sys
from pathlib import Path
from functional_sd3.cli import output
for index in range(40):
    output.write_new(Path(sys.argv[1]), "grid", ".png", f"{sys.argv[2]} {index}".encode())
"""


@pytest.mark.parametrize("links", [True, False])
def test_processes_that_write_into_one_folder_lose_nothing(tmp_path, links):
    script = ("" if links else WITHOUT_LINKS) + WRITERS
    out = tmp_path / "out"
    started = [subprocess.Popen([sys.executable, "-c", script, str(out), str(number)]) for number in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    found = sorted(path.read_text() for path in out.iterdir())
    assert found == sorted(f"{number} {index}" for number in range(3) for index in range(40))
    assert {path.name for path in out.iterdir()} == {"grid.png", *(f"grid-{number}.png" for number in range(2, 121))}


def test_a_broken_link_is_not_written_through_by_a_new_file(tmp_path):
    (tmp_path / "x.png").symlink_to(tmp_path / "elsewhere")
    assert output.write_new(tmp_path, "x", ".png", b"1").name == "x-2.png"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("offload", [(), ("--offload",)])
def test_every_batch_is_written_when_it_is_drawn(folder, tmp_path, capsys, monkeypatch, offload):
    counts, decode = [], pipeline.decode_latents

    def counted(*arguments, **options):
        counts.append(len(list(tmp_path.glob("out/*.png"))))
        return decode(*arguments, **options)

    monkeypatch.setattr(pipeline, "decode_latents", counted)
    assert generate(folder, tmp_path / "out", "--count", 5, "--batch", 2, *offload) == 0
    assert counts == [0, 2, 4] and len(list(tmp_path.glob("out/*"))) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory"), OSError(28, "No space left")])
@pytest.mark.parametrize("single", [True, False])
def test_a_run_cut_short_says_what_was_written(folder, tmp_path, capsys, monkeypatch, error, single):
    decode, batches = pipeline.decode_latents, []

    def failing(*arguments, **options):
        batches.append(1)
        if len(batches) == 3:
            raise error
        return decode(*arguments, **options)

    monkeypatch.setattr(pipeline, "decode_latents", failing)
    out = tmp_path / ("all.png" if single else "out")
    status = generate(folder, out, "--count", 6, "--batch", 2)
    printed, text = capsys.readouterr()
    interrupted = isinstance(error, KeyboardInterrupt)
    assert status == (130 if interrupted else 1) and "Traceback" not in text
    assert ("while decoding, 4 of 6 written" if interrupted else "4 of 6 written") in text
    if single:
        with Image.open(out) as image:
            assert image.size == (2 * 66 - 2, 2 * 66 - 2)
        record = image_settings.read_record(out)
        assert shlex.split(image_settings.command(record["command"]))[2] == PROMPT
        # Of the four images that the file shows, not of the six that were wanted.
        assert record["request"]["prompts"] == [PROMPT] * 4 and record["command"]["count"] == 4
    else:
        assert len(printed.split()) == 4 and all(os.path.exists(path) for path in printed.split())


def test_settings_of_a_run_cut_short_within_a_prompt_draw_all_that_its_file_shows():
    jobs = [image_settings.Job(prompt, seed) for prompt in ("a", "b") for seed in range(3)]
    assert image_settings.joint_settings(jobs[:4], {}) == {"prompts": ["a", "b"], "seed": 0, "count": 3}
    assert image_settings.joint_settings(jobs[:2], {}) == {"prompts": ["a"], "seed": 0, "count": 2}


def test_a_disk_that_fills_up_leaves_what_was_written(folder, tmp_path, capsys, monkeypatch):
    synced, fsync = [], os.fsync

    def full(descriptor):
        synced.append(1)
        if len(synced) > 3:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert generate(folder, tmp_path / "out", "--count", 6, "--batch", 2) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "3 of 6 written" in error
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".png"] * 3


def test_a_grid_that_a_form_cannot_hold_is_said_before_the_work(folder, tmp_path, capsys):
    assert generate(folder, tmp_path / "x.webp", "--count", 100_000) == 1
    error = capsys.readouterr().err
    assert "the image would be 20920x20854, but .webp has at most 16,383" in error
    assert not list(tmp_path.iterdir())


def test_a_folder_gets_no_grid_that_no_viewer_opens(folder, tmp_path, capsys, monkeypatch):
    from functional_sd3.cli import writer

    monkeypatch.setattr(writer, "_MAX_GRID", 2 * 64 * 64)
    assert generate(folder, tmp_path / "two", "--count", 2) == 0
    assert generate(folder, tmp_path / "three", "--count", 3) == 0
    assert [len(list((tmp_path / name).iterdir())) for name in ("two", "three")] == [3, 3]


def test_the_word_tiny_is_the_shipped_model_wherever_a_model_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ("--params", "tiny", "--steps", 1, "--guidance", "auto:params=tiny")
    assert run("generate", PROMPT, *common, "--out", "x.png") == 0
    assert run("inspect", "tiny", "--quick") == run("inspect", "tiny", "--against", "tiny") == 0
    assert run("convert", "tiny", "x.safetensors", "--layout", "single") == 0
    assert run("quantize", "tiny", "--steps", 0) == 0
    assert run("merge", "tiny", "tiny", "--out", "merged") == 0
    assert image_settings.read_record(tmp_path / "x.png")["command"]["params"] == ["tiny"]
    assert run("inspect", tmp_path / "x.png") == 0 and "--params tiny" in capsys.readouterr().out
    # What lies here under that name comes first.
    (tmp_path / "tiny").mkdir()
    assert run("generate", PROMPT, "--params", "tiny", "--out", "y.png") == 1


def test_a_reader_that_goes_away_does_not_end_the_drawing(folder, tmp_path):
    words = ["generate", PROMPT, "--params", str(folder), "--steps", "1", "--count", "6", "--batch", "2"]
    command = [sys.executable, "-m", "functional_sd3", *words, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0 and error.count("note: standard output was closed") == 1
    assert len(list((tmp_path / "out").iterdir())) == 7


@pytest.mark.parametrize("place", ["", "file"], ids=["none", "a file"])
@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "tiny", "--out"],
        ["merge", "tiny", "tiny", "--out"],
        ["lora", "merge", "tiny", "none.safetensors", "--out"],
        ["convert", "--layout", "native", "tiny"],
        ["train", "--data", "shapes", "--steps", "1", "--out"],
        ["reward", "--reward", "shapes", "--steps", "1", "--out"],
        ["distill", "--to", "4", "--steps", "1", "--out"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_weights_that_cannot_be_written_are_not_computed(words, place, tmp_path, capsys, monkeypatch):
    """An empty --out is the folder that one stands in, which a model would fill; a file is noticed before the work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("weights were read"))
    assert cli.main([*words, place]) == 1
    said = capsys.readouterr().err
    assert f"{place!r} must be a" in said if not place else "file is a file" in said
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
