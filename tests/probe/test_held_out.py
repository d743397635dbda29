"""The part of the training images that is held out: always the same, stratified, never a class's only image."""

import numpy as np
import pytest

from sslx.probe import held_out


def test_a_fifth_but_at_most_two_thousand() -> None:
    assert [held_out.num_held_out(size) for size in (1, 4, 10, 300, 10_000, 1_000_000)] == [1, 1, 2, 60, 2_000, 2_000]
    assert [held_out.num_held_out(size, minimum=50) for size in (1, 30, 100, 300)] == [1, 30, 50, 60]


@pytest.mark.parametrize("labels", [None, np.arange(1000) % 7])
def test_it_is_a_function_of_the_index_and_no_more_than_grows(labels: np.ndarray | None) -> None:
    few, more = (held_out.rows(1000, labels, num) for num in (50, 200))
    assert (len(few), len(more)) == (50, 200)
    assert set(few.tolist()) < set(more.tolist())
    assert np.array_equal(few, held_out.rows(1000, labels, 50))
    assert np.array_equal(np.sort(np.concatenate([more, held_out.remaining_rows(1000, more)])), np.arange(1000))
    assert (np.bincount(more // 100, minlength=10) > 5).all(), "from all over the list"


def test_without_labels_an_image_keeps_its_place_in_the_order_when_others_come() -> None:
    first = set(held_out.rows(500, None, 100).tolist())
    both = held_out.rows(1000, None, 200)
    assert len(first & set(both.tolist())) > 75, "a hash of the index, not a permutation of the number of images"


def test_each_class_has_its_share_and_keeps_an_image() -> None:
    labels = np.array([0] * 600 + [1] * 300 + [2] * 97 + [3] * 2 + [4])
    rows = held_out.rows(1000, labels, 200)
    counts = np.bincount(labels[rows], minlength=5)
    np.testing.assert_allclose(counts, [120, 60, 19.4, 0.4, 0], atol=1)
    assert counts[4] == 0
    assert np.array_equal(held_out.rows(1000, 4 - labels, 200), rows), "the classes' numbers do not matter"
    every = held_out.rows(1000, labels, 1000)
    assert np.bincount(labels[held_out.remaining_rows(1000, every)], minlength=5).tolist() == [1, 1, 1, 1, 1]
