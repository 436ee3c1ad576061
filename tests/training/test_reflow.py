"""Reflow pairs: each by its own key, read again where they fit, drawn again where not; flow matching on given noise."""

import pytest
import torch

from functional_sd3.core import prng
from functional_sd3.formats import files
from functional_sd3.formats.errors import WeightsError
from functional_sd3.training import objectives, reflow

KEY, SHAPE = prng.key(5), (2, 3, 3)


class Teacher:
    """A draw that counts what it drew."""

    def __init__(self):
        self.drawn = []

    def __call__(self, numbers, noise):
        self.drawn += numbers
        return 2 * noise + torch.tensor(list(numbers)).float()[:, None, None, None]


def test_pairs_do_not_depend_on_their_files_and_are_drawn_once(tmp_path):
    teacher = Teacher()
    first = reflow.pairs(tmp_path / "a", KEY, 7, SHAPE, teacher, contents="x", rows=3)
    assert teacher.drawn == list(range(7)) and len(list((tmp_path / "a").iterdir())) == 3
    torch.testing.assert_close(first["latents"], Teacher()(range(7), first["noise"]))
    again = reflow.pairs(tmp_path / "a", KEY, 7, SHAPE, teacher, contents="x", rows=3)
    other = reflow.pairs(tmp_path / "b", KEY, 7, SHAPE, Teacher(), contents="x", rows=5)
    assert len(teacher.drawn) == 7
    for name in ("noise", "latents"):
        assert torch.equal(first[name], again[name]) and torch.equal(first[name], other[name])


def test_a_set_that_was_cut_goes_on_where_it_was(tmp_path):
    class Cut(Teacher):
        def __call__(self, numbers, noise):
            if numbers.start == 3:
                raise KeyboardInterrupt
            return super().__call__(numbers, noise)

    with pytest.raises(KeyboardInterrupt):
        reflow.pairs(tmp_path, KEY, 7, SHAPE, Cut(), contents="x", rows=3)
    rest = Teacher()
    pairs = reflow.pairs(tmp_path, KEY, 7, SHAPE, rest, contents="x", rows=3)
    assert rest.drawn == [3, 4, 5, 6]
    whole = reflow.pairs(tmp_path / "whole", KEY, 7, SHAPE, Teacher(), contents="x", rows=7)
    assert torch.equal(pairs["latents"], whole["latents"])


def test_files_of_other_contents_or_broken_ones_are_drawn_again_and_said(tmp_path):
    reflow.pairs(tmp_path, KEY, 4, SHAPE, Teacher(), contents="x", rows=4)
    (path,) = tmp_path.iterdir()
    write = lambda tensors: files.write_atomic(path, tensors, metadata={"contents": "y"})  # noqa: E731
    for spoil in (
        lambda: None,
        lambda: path.write_bytes(b"no file of tensors"),
        lambda: write({"noise": torch.ones(4, *SHAPE)}),
        lambda: write({name: torch.full((4, *SHAPE), torch.nan) for name in ("noise", "latents")}),
    ):
        spoil()
        notes, teacher = [], Teacher()
        pairs = reflow.pairs(tmp_path, KEY, 4, SHAPE, teacher, contents="y", rows=4, note=notes.append)
        assert len(notes) == 1 and "drawn again" in notes[0] and teacher.drawn == [0, 1, 2, 3]
        assert torch.isfinite(pairs["latents"]).all()


def test_a_flow_that_ends_in_nan_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(WeightsError, match="the teacher's flow of pairs 0 to 2 ends in"):
        reflow.pairs(tmp_path, KEY, 7, SHAPE, lambda numbers, noise: noise / 0 * 0, contents="x", rows=3)
    assert not list(tmp_path.glob("*.safetensors"))


def test_given_noise_is_the_other_end_of_the_line(tiny):
    keys = prng.split(prng.key(3), 4)
    loss = objectives.flow_loss(tiny.config)
    drawn = prng.normal(prng.split(keys, 3)[:, 1], (16, 4, 4))
    usual = loss(tiny.params, tiny.batch, keys)[0]
    assert loss(tiny.params, {**tiny.batch, "noise": drawn}, keys)[0].item() == usual.item()
    assert loss(tiny.params, {**tiny.batch, "noise": drawn + 1}, keys)[0].item() != usual.item()
