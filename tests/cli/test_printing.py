"""What is printed: nothing that a terminal acts on, one command line and no other, JSON that stays JSON, quiet."""

import ast
import io
import json
import shlex
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from functional_sd3 import cli, weights
from functional_sd3.cli import image_settings, output, report
from functional_sd3.formats.printable import escape
from tests import models

ROOM = Path(cli.__file__).parent
HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\n\u202eevil\x9b31m\x7f"
SETTINGS = {"prompts": ["a red circle"], "seed": 1, "steps": 2, "cfg": 4.5}


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def assert_harmless(text: str) -> None:
    assert escape(text, keep="\n") == text


def image_with(path: Path, text: str) -> Path:
    info = PngInfo()
    info.add_itxt(image_settings.METADATA, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.name)
def test_one_module_prints(path):
    """So that what is printed is escaped, and silent with --quiet, everywhere."""
    if path.name == "report.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = node.func if isinstance(node, ast.Call) else None
        assert not (isinstance(called, ast.Name) and called.id == "print"), f"{path.name}:{node.lineno} prints"
        # The parser of the command line escapes what it writes itself.
        writes = isinstance(called, ast.Attribute) and ast.unparse(called) in ("sys.stdout.write", "sys.stderr.write")
        assert not writes or path.name == "parser.py", f"{path.name}:{node.lineno} writes"


def test_names_and_metadata_of_a_file_are_escaped(tmp_path, capsys):
    path = tmp_path / f"a{HOSTILE.replace('/', '')}.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {f"k{HOSTILE}": HOSTILE}, f"t{HOSTILE}": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    for words in (
        ("inspect", path),
        ("lora", "info", path),
        ("convert", path, tmp_path / "x", "--layout", "native"),
        ("generate", "x", "--params", path),
        ("inspect", tmp_path / HOSTILE),
        ("generate", "x", "--params", HOSTILE),
        ("generate", "x", "--image", HOSTILE),
        ("generate", "x", "--method", HOSTILE),
        ("generate", "x", "--size", HOSTILE),
        ("generate", "x", "--out", f"x.{HOSTILE}"),
        ("generate", "x", "--prompts", HOSTILE),
        ("train", "--data", HOSTILE, "--out", tmp_path / "o"),
        ("evaluate", "clip", HOSTILE),
        ("quantize", HOSTILE),
    ):
        assert run(*words) == 1
        printed, error = capsys.readouterr()
        assert_harmless(printed + error)
        assert error and "Traceback" not in error, words


@pytest.mark.parametrize("words", [(f"--x{HOSTILE}",), ("x", f"{HOSTILE}y"), ("inspect", "a", f"--{HOSTILE}")])
def test_words_that_are_no_command_line_are_escaped(capsys, words):
    with pytest.raises(SystemExit):
        run(*words)
    assert_harmless(capsys.readouterr().err)


def test_a_lora_is_described_without_its_escapes(tmp_path, capsys):
    from safetensors.torch import save_file

    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "l.safetensors", metadata={f"note{HOSTILE}": HOSTILE})
    run("lora", "info", tmp_path / "l.safetensors", "--all")
    run("inspect", tmp_path / "l.safetensors")
    printed = capsys.readouterr()
    assert_harmless(printed.out + printed.err)


def test_a_prompt_of_several_lines_is_one_command_line_that_a_shell_reads(tmp_path, capsys):
    prompt = "a 'red'\ncircle\\n \x1b[1m é \U0001f600"
    image = image_with(tmp_path / "x.png", json.dumps({**SETTINGS, "prompts": [prompt]}))
    assert run("inspect", image) == 0
    printed = capsys.readouterr().out
    assert_harmless(printed)
    *_, line = printed.splitlines()
    assert sum(row.startswith("functional-sd3") for row in printed.splitlines()) == 1
    shell = ["bash", "-c", line.replace("functional-sd3", "printf '%s\\0'", 1)]
    words = (
        subprocess.run(shell, capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}).stdout.decode().split("\0")
    )
    assert words[:2] == ["generate", prompt]


@pytest.mark.parametrize(
    "forged",
    [
        {"out": "/home/me/.bashrc"},
        {"subcommand": "train"},
        {"subcommand": "convert; rm -rf ~"},
        {"subcommand": ["generate"]},
        {"x; rm -rf ~ #": 1},
        {"x\nfunctional-sd3 train": True},
        {"seed": "1; rm -rf ~"},
        {"seed": True},
        {"seed": 2**70},
        {"cfg": [1, 2]},
        {"steps": 1.5},
        {"negative": 3},
        {"weighted": "yes"},
        {"dtype": "float23"},
        {"prompts": "text"},
        {"prompts": [["x"]]},
        {"prompts": []},
        {"picture": "x.png"},
        {"json": "x"},
        {"help": True},
        {"debug": True},
        {"offload": True},
        {"guidance": {"a": 1}},
    ],
)
def test_settings_that_no_drawing_command_wrote_are_not_printed(tmp_path, capsys, forged):
    image = image_with(tmp_path / "x.png", json.dumps({**SETTINGS, **forged}))
    assert run("inspect", image) == 1
    printed, error = capsys.readouterr()
    assert not printed and "holds settings that are not this program's" in error and error.count("\n") == 1
    assert_harmless(error)


@pytest.mark.parametrize(
    "text", ["", "[]", "1", "null", "{", '{"prompts": ["a"], "cfg": NaN}', "[" * 100_000, '{"a":1,"a":2}']
)
def test_settings_that_are_no_json_object_are_refused(tmp_path, capsys, text):
    assert run("inspect", image_with(tmp_path / "x.png", text)) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_every_recorded_option_is_read_again():
    """A command that records an option which `check` refuses would make images that `inspect` cannot explain."""
    from functional_sd3.cli import controls, edit, inputs, interpolate, options

    values = {
        "count": 2,
        "steps": 3, "cfg": 4.5, "rtol": 1e-3, "atol": 1e-3, "seed": 1, "strength": 0.5, "soften": 2.0, "overlap": 8,
        "eta": 0.5, "source_cfg": 1.5, "frames": 4, "fps": 8.0, "weighted": True, "long": True, "restore": True,
        "exact": True, "direct": True, "slerp": True, "trajectory": True, "denoised": True, "dtype": "float32",
        "control_after_last": True, "params": ["a", "b"], "embedding": ["a"], "lora": ["a=0.5"], "region": ["a"],
        "guidance": ["cfg"], "control": ["a"], "controlnet": ["b"], "without": ["t5"],
    }  # fmt: skip
    run_options = [*options._RECORDED, "guidance", "control", "controlnet", "control_after_last"]
    recorded = {
        "generate": [*run_options, *inputs._RECORDED, "region", "tile", "size", "seed", "count", "variation"],
        "edit": [*run_options, *edit._RECORDED],
        "interpolate": [*run_options, *interpolate._RECORDED, "size"],
    }
    assert controls.settings.__doc__
    for subcommand, names in recorded.items():
        words = {"picture": "x.png", "from": "a", "to": "b"} if subcommand == "edit" else {"prompts": ["a"]}
        image_settings.check(
            {"subcommand": subcommand, **words, **{name: values.get(name, "text") for name in names if name != "count"}}
        )


def test_json_stays_json_and_harmless(capsys):
    data = {"path": HOSTILE, "\x1b": ["é", "\udc80", float("nan"), "\U000e0001"], "n": 1}
    content = report.as_json(data)
    assert_harmless(content)
    assert json.loads(content) == {"path": HOSTILE, "\x1b": ["é", "\udc80", None, "\U000e0001"], "n": 1}
    assert "é" in content
    report.emit("-", report.Report(("text",), data))
    assert json.loads(capsys.readouterr().out)["n"] == 1


def test_a_stream_that_lacks_a_letter_gets_its_escape(monkeypatch):
    import io

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    report.say("1.0 ± 0.1")
    assert stream.buffer.getvalue() == b"1.0 \\xb1 0.1\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random"
    weights.save(path, models.random_model())
    return path


def test_quiet_prints_results_alone(model, tmp_path, capsys):
    common = ("--params", model, "--steps", 1, "--quiet")
    image = tmp_path / "x.png"
    assert run("generate", "a", "b", "red " * 300, "--cfg", 0, "--negative", "x", *common, "--out", image) == 0
    assert run("edit", image, "--from", "a", "--to", "b", *common, "--out", tmp_path / "y.png") == 0
    assert run("interpolate", "a", "b", *common, "--frames", 2, "--out", tmp_path / "z.png") == 0
    assert run("--quiet", "likelihood", image, "--prompt", "a", "--by", "loss", "--draws", 1, "--params", model,
               "--json", "-") == 0  # fmt: skip
    printed, error = capsys.readouterr()
    assert error == ""
    assert printed.splitlines()[:3] == [str(image), str(tmp_path / "y.png"), str(tmp_path / "z.png")]
    assert json.loads(printed.split("\n", 3)[3])["by"] == "loss"
    assert run("train", "--data", "shapes", "--out", tmp_path / "o", "--pictures", 2, "--batch-size", 1, "--steps", 1,
               "--sample-every", 0, "--lora", 1, "--quiet") == 0  # fmt: skip
    assert capsys.readouterr().err == ""
    # Errors stay.
    assert run("generate", "x", "--steps", 0, "--quiet") == 1
    assert "--steps 0 must be at least 1" in capsys.readouterr().err


def test_results_go_to_standard_output_and_notes_to_standard_error(model, tmp_path, capsys):
    assert run("generate", "a", "b", "--params", model, "--steps", 1, "--out", tmp_path / "out") == 0
    printed, error = capsys.readouterr()
    assert all(Path(line).is_file() for line in printed.splitlines()) and len(printed.splitlines()) == 3
    assert "note: 2 prompts of one word each" in error and "s in all" in error
    assert (
        shlex.split(image_settings.command(image_settings.read_record(printed.splitlines()[0])["command"]))[1]
        == "generate"
    )
    assert output.slug("a/../b") == "a-b"


def test_help_has_one_word_for_images():
    from functional_sd3.cli import parser

    for leaf in [parser.build(), *parser.leaves(parser.build())]:
        words = leaf.format_help().replace("--pictures", "").replace("PICTURES", "")
        assert "picture" not in words, leaf.prog


def test_streams_that_are_closed_end_no_drawing(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert run("generate", "--prompts", "-", "--params", model) == 1
    assert "--prompts -: standard input is closed" in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr", None)
    assert run("generate", "a", "--params", model, "--steps", 1, "--out", tmp_path / "x.png") == 0
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "a", "--out", "-"), "--out - must be a file"),
        (("generate", "a", "--out", ".png"), "--out .png must be a file"),
        (("convert", "tiny", "x.safetensors", "--layout", "diffusers"), "--layout diffusers writes a folder"),
    ],
)
def test_names_of_files_do_not_become_folders(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_options_with_one_hyphen_and_words_for_options_are_suggested(capsys):
    for words, near in ((("generate", "a b", "-steps", "3"), "--steps"), (("version",), "--version")):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert f"did you mean {near}?" in capsys.readouterr().err


def test_lines_are_printed_between_progress_bars(monkeypatch):
    """A bar ends without a line end, and standard output and error are one terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    bar = report.progress_bar(3)
    bar.update()
    report.say("out/x.png")
    report.message("note: slow")
    bar.close()
    content = terminal.getvalue()
    assert "0/3" in content
    assert [line.rpartition("\r")[2] for line in content.split("\n")][:2] == ["out/x.png", "note: slow"]
