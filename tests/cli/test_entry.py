"""The command line before any work: help and mistakes without torch, near names, Ctrl-C, tracebacks, memory."""

import subprocess
import sys
import textwrap

import pytest

from functional_sd3 import cli
from functional_sd3.cli import failures, options, parser

PROMPT = "a large red circle on a white background"
WITHOUT_TORCH = textwrap.dedent("""
    import contextlib, io, sys
    from functional_sd3.cli import SUBCOMMANDS, main
    lines = [["--version"], ["--help"], [], ["genrate"], ["generate", "x", "--step", "3"], ["generate", "x", "--cfg"]]
    lines += [[name, "--help"] for name in SUBCOMMANDS] + [["evaluate", "fid", "--help"], ["lora", "merge", "--help"]]
    lines += [["generate", "x", *words] for words in (["--steps", "0"], ["--cfg", "nan"], ["--seed", "1e3"],
        ["--size", "big"], ["--out", "x.tiff"], ["--method", "eulr"], ["--guidance", "zero"], ["--params", "nowhere"],
        ["--strength", "2"], ["--image", "nowhere.png"], ["--tile", "x"], ["--variation", "x"], ["--prompts", "none"])]
    lines += [["evaluate", "prompts", "--method", "eulr"], ["evaluate", "fid", "a", "--json", "no/where.json"]]
    lines += [["likelihood", "nowhere.png", "--prompt", "x"], ["edit", "nowhere.png", "--from", "x", "--to", "y"]]
    lines += [["interpolate", "x"], ["generate"]]
    for words in lines:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
            try:
                status = main(words)
            except SystemExit as exit:
                status = exit.code
        assert (status != 0) == ("--help" not in words and "--version" not in words), (words, status)
        assert "Traceback" not in said.getvalue() and said.getvalue(), words
    print(sorted({"torch", "numpy", "PIL"} & set(sys.modules)))
""")


def said(capsys, *words) -> tuple[int, str]:
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().err


def test_help_versions_and_mistakes_cost_no_import_of_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_names_known_without_torch_are_those_of_the_program():
    from functional_sd3.cli import evaluate
    from functional_sd3.flow import ode
    from functional_sd3.metrics import inception, preprocess

    assert options.METHODS == ode.NAMES and options.ADAPTIVE == tuple(ode.ADAPTIVE)
    assert evaluate.MODES == tuple(sorted(preprocess.MODES)) and evaluate.TAPS == inception.TAPS


def test_version(capsys):
    import functional_sd3

    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"functional-sd3 {functional_sd3.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("genrate", "x"), "did you mean generate?"),
        (("evaluate", "fdi", "a", "b"), "did you mean fid?"),
        (("lora", "marge"), "did you mean merge?"),
        (("generate", "x", "--step", 3), "unrecognized arguments: --step; did you mean --steps?"),
        (("generate", "x", "--neg=blue"), "unrecognized arguments: --neg; did you mean --negative?"),
        (("generate", "x", "--dtype", "float23"), "did you mean float32?"),
        (("generate", "x", "--method", "eulr"), "did you mean euler?"),
        (("generate", "x", "--guidance", "zero-str"), "did you mean zero-star?"),
        (("generate", "x", "--params", "tiyn"), "did you mean tiny?"),
        (("edit", "in.png", "--fro", "x", "--to", "y"), "did you mean --from?"),
        (("edit", "in.png", "--from", "x", "--to", "a", "blue", "star"), "a text of several words needs quotes"),
        (("train", "--dta", "x", "--out", "y"), "did you mean --data?"),
        (("generate", "x", "--guidance-scale", 3), "--guidance-scale; did you mean --cfg?"),
        (("generate", "x", "--num_inference_steps=3"), "--num_inference_steps; did you mean --steps?"),
        (("generate", "x", "--width", 64), "did you mean --size?"),
        (("generate", "x", "-o", "y"), "did you mean --out?"),
        (("generate", "x", "--slg"), "did you mean --guidance skip-layer:layers=7,8,9?"),
        (("generate", "--prompt", "x"), 'a prompt is given without an option: functional-sd3 generate "a large'),
        (("likelihood", "x.png", "--promt", "y"), "did you mean --prompt?"),
        (("train", "--data", "x", "--out", "y", "--rank", 4), "--rank; did you mean --lora?"),
        (("train", "--data", "x", "--out", "y", "--instance_prompt", "z"), "did you mean --caption?"),
        (("train", "--data", "x", "--out", "y", "--use_8bit_adam"), "did you mean --optimizer adamw8bit?"),
        # An equivalent that the command lacks is not suggested.
        (("inspect", "x", "--denoise", 3), "unrecognized arguments: --denoise (see"),
    ],
)
def test_the_nearest_name_is_suggested(capsys, words, message):
    status, error = said(capsys, *words)
    assert status in (1, 2) and message in error and error.count("\n") == 1


def test_equivalents_of_other_programs_are_options_that_exist():
    from functional_sd3.cli import foreign_options, parser

    tables = {"generate": foreign_options._NAMES, "train": foreign_options._TRAINING}
    for command, table in tables.items():
        known = set(parser.subparser(command)._option_string_actions)
        assert {option.split()[0] for option in table} <= known
        assert not {f"--{name}" for names in table.values() for name in names.split()} & known
    listed = [name for table in tables.values() for names in table.values() for name in names.split()]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    "caught",
    ["", "except BaseException: pass", "except KeyboardInterrupt: raise ImportError('numpy is broken') from None"],
)
def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path, caught):
    """Also where an imported module swallows it or makes another error of it: nothing goes on."""
    interrupt = "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n"
    (tmp_path / "torch.py").write_text(
        interrupt + (caught or "finally: pass") + f"\nopen({str(tmp_path / 'went on')!r}, 'x')\n"
    )
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from functional_sd3.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "generate", PROMPT, "--out", str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.strip() == "stopped" and not (tmp_path / "went on").exists()


def test_a_handler_of_the_caller_is_left_as_it_was():
    import signal

    before = signal.getsignal(signal.SIGINT)
    cli.main(["generate", "x", "--steps", "0"])
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_prints_the_traceback_too(capsys, place):
    words = ["generate", "x", "--steps", "2", "--size", "3"]
    words = ["--debug", *words] if place == "before" else [*words, "--debug"]
    status, error = said(capsys, *words)
    assert status == 1 and "Traceback" in error and error.splitlines()[-1].startswith("functional-sd3 generate: --size")


def test_a_fault_of_the_program_is_one_line_that_names_debug(capsys, monkeypatch):
    def fault(text):
        raise KeyError("weights")

    monkeypatch.setattr(options, "size", fault)
    status, error = said(capsys, "generate", "x")
    assert status == 1 and error.count("\n") == 1
    assert "a fault of this program: KeyError: 'weights' (--debug prints where)" in error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_without_memory_the_options_that_save_it_are_named(capsys, monkeypatch, error):
    def exhausted(text):
        raise error

    monkeypatch.setattr(options, "size", exhausted)
    status, text = said(capsys, "generate", "x")
    assert status == 1 and text.count("\n") == 1 and "out of memory" in text
    assert all(option in text for option in ("--batch 1", "--offload", "--tile", "--dtype bfloat16"))
    status, text = said(capsys, "likelihood", __file__, "--prompt", "x")
    assert "--batch-size 1" in text and "--offload" in text and "--tile" not in text and "--batch 1" not in text


def test_memory_that_torch_lacks_is_recognised():
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert failures.is_out_of_memory(caught.value)
    assert failures.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not failures.is_out_of_memory(RuntimeError("shapes differ"))


def test_every_command_has_quiet_and_debug():
    leaves = list(parser.leaves(parser.build()))
    assert len(leaves) > 15
    for leaf in leaves:
        assert {"--quiet", "--debug"} <= leaf._option_string_actions.keys() and not leaf.allow_abbrev
