"""Numeric options of every command: one mechanism refuses infinity, NaN and what is out of range, by name."""

import argparse

import pytest

from functional_sd3 import cli
from functional_sd3.cli import numbers, parser
from functional_sd3.cli.numbers import OutOfRange, Range


def numeric_options() -> list:
    return list(_numeric_options())


def _numeric_options():
    for leaf in parser.leaves(parser.build()):
        for action in leaf._actions:
            if getattr(action.type, "__qualname__", "").startswith("reader."):
                yield pytest.param(action, id=f"{leaf.prog.partition(' ')[2]} {action.option_strings[0]}")


def test_no_numeric_option_is_read_in_another_way():
    options = [action for leaf in parser.leaves(parser.build()) for action in leaf._actions]
    assert len(numeric_options()) > 60
    assert not [action.option_strings for action in options if action.type in (int, float)]


@pytest.mark.parametrize("action", numeric_options())
def test_infinity_nan_and_huge_numbers_are_refused_by_name(action):
    for text in ("inf", "-inf", "nan", "1e999", "9" * 400, "9" * 5000, "", "one", "0x10"):
        with pytest.raises((OutOfRange, argparse.ArgumentTypeError)) as caught:
            action.type(text)
        assert len(str(caught.value)) < 300
        if isinstance(caught.value, OutOfRange):
            assert str(caught.value).startswith(action.option_strings[0] + " ")


@pytest.mark.parametrize("action", numeric_options())
def test_every_default_is_in_range(action):
    if action.default is not None:
        assert action.type(str(action.default)) == action.default


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate x --steps -3", "--steps -3 must be at least 1"),
        ("generate x --count 0", "--count 0 must be at least 1"),
        ("generate x --batch 0", "--batch 0 must be at least 1"),
        ("generate x --cfg nan", "--cfg nan must be a finite number"),
        ("generate x --strength inf", "--strength inf must be a finite number"),
        ("generate x --rtol 0", "--rtol 0.0 must be above 0"),
        ("generate x --atol=-inf", "--atol -inf must be a finite number"),
        ("generate x --seed 9223372036854775808", "the seeds that there are"),
        ("generate x --seed 9223372036854775807 --count 2", "--seed and --count 2: the last seed"),
        ("generate x --variation 1:nan", "the amount 'nan' must be a finite number"),
        ("generate x --variation 99999999999999999999:0.1", "the seeds that there are"),
        ("generate x --guidance zero-star:scale=inf", "scale cannot be 'inf'"),
        ("generate x --guidance skip-layer:layers=0,start=nan", "start cannot be 'nan'"),
        ("generate x --control canny=x.png:1e999", "its scale '1e999' must be a finite number"),
        ("generate x --region 0,0,8x8@inf=y", "its weight 'inf' must be a finite number"),
        ("generate x --size 0x64", "width and height must be from 1 to"),
        ("generate x --size 99999999999x64", "width and height must be from 1 to"),
        ("generate x --tile 0", "--tile 0"),
        ("interpolate x --seeds 1,99999999999999999999", "the seeds that there are"),
        ("interpolate x y --fps inf", "--fps inf must be a finite number"),
        ("edit {} --from x --to y --source-cfg nan", "--source-cfg nan must be a finite number"),
        ("edit {} --from x --to y --window 0-nan", "--window '0-nan' must be START-END"),
        ("likelihood {} --prompt x --draws 0", "--draws 0 must be at least 1"),
        ("merge a b --out c --weights 1,nan", "--weights 1,nan"),
        ("merge a b --out c --method slerp --t inf", "--t inf must be a finite number"),
        ("train --data x --out y --crops 0", "--crops 0 must be at least 1, which is the middle"),
        ("cache --data x --out y --bucket-min 0", "--bucket-min 0 must be at least 1"),
        ("train --data x --out y --block-swap 0", "--block-swap 0 must be at least 1 block; leave it out for none"),
        ("train --data x --out y --lr nan", "--lr nan must be a positive number"),
        ("evaluate prompts --cfg inf", "--cfg inf must be a finite number"),
        ("convert a b --layout single --shard-size 1e999GB", "--shard-size"),
    ],
)
def test_a_number_that_cannot_be_is_said_before_the_work(capsys, words, message):
    assert cli.main([word.replace("{}", __file__) for word in words.split()]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("bounds", "good", "bad"),
    [
        (Range(1, 10), (1, 10), (0, 11)),
        (Range(0, 1, above=True), (0.1, 1), (0, 1.1)),
        (Range(), (-1e300, 1e300), ()),
        (Range(0), (0, 1e9), (-1e-9,)),
    ],
)
def test_a_range_is_what_it_says(bounds, good, bad):
    read = numbers.reader(float, "--x", bounds)
    assert [read(repr(value)) for value in good] == list(good)
    for value in bad:
        with pytest.raises(OutOfRange, match="--x .* must be"):
            read(repr(value))
