"""Aspect-ratio buckets: their sizes, the images in them, and the order of their batches."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sd3.core import prng
from functional_sd3.training import buckets, loop, order

SIDES = st.integers(1, 4000)
OPTIONS = st.builds(
    buckets.Options,
    st.lists(st.integers(64, 1440), min_size=1, max_size=3).map(tuple),
    st.sampled_from([16, 32, 64]),
    st.floats(1.0, 4.0),
    st.integers(1, 6),
)


@given(OPTIONS)
def test_a_size_fills_its_area_in_steps_and_within_the_ratio(options):
    for area in options.areas:
        square = (area // options.step * options.step,) * 2
        sizes = buckets.sizes(area, options, 1536)
        assert square in sizes
        for width, height in sizes:
            assert width % options.step == height % options.step == 0 and max(width, height) <= 1536
            assert width * height <= area * area and max(width, height) <= options.ratio * min(width, height)
            assert (height, width) in sizes
            # One more step is too much in one of the directions at least.
            larger = [(width + options.step, height), (width, height + options.step)]
            assert (width, height) == square or any(a * b > area * area or max(a, b) > 1536 for a, b in larger)


def test_the_sizes_of_1024_are_the_fullest_of_those_of_sdxl():
    """Appendix I of arXiv:2307.01952 lists 704 x 1344, 832 x 1152, 896 x 1088 and 960 x 1024 besides."""
    tall = [(704, 1408), (768, 1280), (768, 1344), (832, 1216), (896, 1152), (960, 1088)]
    assert set(buckets.sizes(1024, buckets.Options((1024,)), 2048)) == {*tall, *(s[::-1] for s in tall), (1024, 1024)}


@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=30), OPTIONS)
def test_every_image_has_a_bucket_and_no_bucket_is_small(images, options):
    assigned = buckets.assign(images, options, 1536)
    known = {size for area in options.areas for size in buckets.sizes(area, options, 1536)}
    assert set(assigned.sizes) <= known and assigned.sizes == tuple(sorted(set(assigned.sizes)))
    counts = Counter(assigned.of_image)
    assert len(assigned.of_image) == len(images) and sorted(counts) == list(range(len(assigned.sizes)))
    assert len(counts) == 1 or min(counts.values()) >= options.least
    assert buckets.assign(images, options, 1536) == assigned


def test_images_go_to_the_largest_area_that_they_fill_and_the_nearest_ratio():
    options = buckets.Options((512, 1024), ratio=2.0)
    images = [(1024, 1024), (1000, 1024), (3000, 2000), (10, 10), (600, 600), (5000, 100)]
    assigned = buckets.assign(images, options, 2048)
    sizes = [assigned.sizes[number] for number in assigned.of_image]
    assert sizes[:5] == [(1024, 1024), (512, 512), (1216, 832), (512, 512), (512, 512)]
    # Beyond the ratio: the widest there is.
    assert sizes[5] == max(buckets.sizes(512, options, 2048), key=lambda size: size[0] / size[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (buckets.Options((64,), 20), "--bucket-step 20 must be a multiple of 16"),
        (buckets.Options((64,), 16, 0.5), "--bucket-ratio 0.5 must be at least 1"),
        (buckets.Options((64, 256), 16), "--buckets 256 must be a side from --bucket-step 16 to the 128 pixels"),
    ],
)
def test_sizes_that_a_model_does_not_take_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        buckets.check(options, 16, 128)


@st.composite
def bucketed(draw):
    batch = draw(st.integers(1, 7))
    counts = draw(st.lists(st.integers(batch, 3 * batch + 5), min_size=1, max_size=4))
    numbers = [index for index, count in enumerate(counts) for _ in range(count)]
    mixed = draw(st.permutations(numbers))
    return batch, mixed


@settings(max_examples=15)
@given(bucketed(), st.integers(0, 2**20))
def test_a_batch_is_of_one_bucket_and_no_image_comes_oftener_than_there_were_epochs(drawn, seed):
    batch, numbers = drawn
    rows_of = order.of_buckets(prng.key(seed), batch, numbers)
    counts = Counter(numbers)
    seen: Counter[int] = Counter()
    step = 0
    for epoch in range(1, 6):
        end = sum(epoch * count // batch for count in counts.values())
        while step < end:
            rows, passes = rows_of(step)
            assert rows.shape == (batch,) and len(set(rows.tolist())) == batch
            assert len({numbers[row] for row in rows.tolist()}) == 1
            # A row comes for the k-th time in pass k - 1: in each pass exactly once.
            for row, turn in zip(rows.tolist(), passes.tolist(), strict=True):
                assert seen[row] == turn
                seen[row] += 1
            step += 1
        assert {seen[row] for row in range(len(numbers))} <= {epoch - 1, epoch}


@settings(max_examples=15)
@given(bucketed(), st.integers(0, 400))
def test_a_batch_depends_on_its_step_alone(drawn, step):
    batch, numbers = drawn
    in_order = order.of_buckets(prng.key(1), batch, numbers)
    for earlier in range(0, step, max(step // 5, 1)):
        in_order(earlier)
    fresh = order.of_buckets(prng.key(1), batch, numbers)
    assert all(torch.equal(*pair) for pair in zip(in_order(step), fresh(step), strict=True))


@pytest.mark.parametrize("count", [6, 7, 8, 9])
def test_batches_over_the_end_of_many_short_passes_hold_nothing_twice(count):
    """Where a pass is shorter than two batches, its end depends on all passes since one that began with a batch."""
    for seed in range(3):
        rows_of = order.of_buckets(prng.key(seed), 5, [0] * count)
        assert all(len(set(rows_of(step).rows.tolist())) == 5 for step in range(2 * count))


def test_epochs_are_shuffled_and_depend_on_the_key():
    numbers = [0] * 40 + [1] * 40
    rows_of = order.of_buckets(prng.key(0), 4, numbers)
    epochs = [torch.stack([rows_of(20 * epoch + step).rows for step in range(20)]) for epoch in range(3)]
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert not torch.equal(order.of_buckets(prng.key(1), 4, numbers)(0).rows, epochs[0][0])
    # Buckets alternate at random, not one after the other.
    turns = [numbers[int(rows[0])] for rows in epochs[0]]
    assert turns != sorted(turns) and sum(turns) == 10


def test_a_bucket_that_cannot_fill_a_batch_is_named():
    with pytest.raises(ValueError, match=r"--batch-size 4 is more than the images of a bucket \(3 in bucket 1\)"):
        order.of_buckets(prng.key(0), 4, [0] * 5 + [1] * 3)


def test_numbers_of_buckets_that_no_image_has_are_passed_over():
    """As where some images of a set are held out."""
    one, other = order.of_buckets(prng.key(0), 2, [1, 1, 4, 4, 4]), order.of_buckets(prng.key(0), 2, [0, 0, 1, 1, 1])
    assert all(torch.equal(one(step).rows, other(step).rows) for step in range(9))


def test_one_size_keeps_the_order_that_it_had():
    rows_of, before = order.of_one_size(prng.key(3), 4, 6), loop.order(prng.key(3), 4, 6)
    assert all(torch.equal(rows_of(step).rows, before(step)) for step in range(9))
    assert torch.cat([rows_of(step).passes for step in range(3)]).tolist() == [0] * 6 + [1] * 6


@settings(max_examples=10)
@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 99))
def test_a_row_comes_in_every_view_before_it_comes_in_one_again(count, views, seed):
    key = prng.key(seed)
    samples = order.with_views(order.of_one_size(key, 3, count), key, views)
    seen = torch.cat([samples(step) for step in range(count * views * 2)])
    by_row: dict[int, list[int]] = {}
    for sample in seen.tolist():
        by_row.setdefault(sample // views, []).append(sample % views)
    for shown in by_row.values():
        assert all(len(set(shown[start : start + views])) == views for start in range(len(shown) - views))
