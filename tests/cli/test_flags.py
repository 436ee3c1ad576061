"""Errors of a command name its options, not the arguments of the functions that raise them."""

import argparse

import pytest

from functional_sd3 import cli
from functional_sd3.cli import flags, parser

COMMANDS = {leaf.prog.partition(" ")[2]: leaf for leaf in parser.leaves(parser.build())}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_argument_of_several_words_is_named_as_its_option(command):
    actions = [action for action in COMMANDS[command]._actions if action.option_strings]
    options = argparse.Namespace(**{action.dest: None for action in actions})
    for action in (action for action in actions if "_" in action.dest):
        flag = action.option_strings[0]
        assert flags.with_flags(f"{action.dest} 9 is wrong", options) == f"{flag} 9 is wrong"
        assert flags.with_flags(f"9 is wrong: leave out {action.dest}", options) == f"9 is wrong: leave out {flag}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('it is not split: use layout="native" with a folder', "it is not split: use --layout native with a folder"),
        ("load it with dtype=torch.bfloat16, or not", "load it with --dtype bfloat16, or not"),
        ("give offload=True, or their tree", "give --offload, or their tree"),
        ("strength 2 must be between 0 and 1", "--strength 2 must be between 0 and 1"),
        ("above shard_bytes 7", "above --shard-size 7"),
        # Words that no option has, other values, paths, quotations and parts of options stay.
        ("strength 3 is that of another", "strength 3 is that of another"),
        ("out/shard_size/layout.json: dtype float8 is none", "out/shard_size/layout.json: dtype float8 is none"),
        ("'shard_size' is no key of shard_size.json", "'shard_size' is no key of shard_size.json"),
        ("--guidance interval:offload=True", "--guidance interval:offload=True"),
    ],
)
def test_what_is_written_as_an_option(text, expected):
    options = argparse.Namespace(layout="single", dtype=None, offload=False, strength=2, shard_size="7")
    assert flags.with_flags(text, options) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("look star --attention-blocks 9 --steps 1 --out {}/look", "look: --attention-blocks [9] are not among"),
        ("convert tiny {}/x.safetensors --layout single --shard-size 1MB", "above --shard-size 1000000"),
    ],
)
def test_commands_name_their_options(words, said, tmp_path, capsys):
    assert cli.main(words.format(tmp_path).split()) == 1
    assert said in capsys.readouterr().err
