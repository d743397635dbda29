"""Masks are functions of the sample alone, and no patch is seen more often than another."""

import numpy as np

from sslx.data.draws import Draws
from sslx.methods import masks


def draws(index: np.ndarray, seed: int) -> Draws:
    return Draws(seed=seed, epoch=2, batch=7, index=index)


def test_random_patches_are_cut_in_two_whatever_the_batch():
    seed, index = int(np.random.default_rng().integers(1000)), np.arange(50)
    visible, masked = masks.random(draws(index, seed), 12, 5)
    assert (visible.shape, masked.shape) == ((50, 5), (50, 7))
    np.testing.assert_array_equal(np.sort(np.hstack([visible, masked]), axis=1), np.tile(np.arange(12), (50, 1)))
    few = masks.random(draws(index[[9, 3]], seed), 12, 5)
    np.testing.assert_array_equal(few[0], visible[[9, 3]])


def test_every_patch_is_seen_equally_often():
    num, num_patches, num_visible = 20_000, 16, 4
    visible, _ = masks.random(draws(np.arange(num), 3), num_patches, num_visible)
    counts, expected = np.bincount(visible.ravel(), minlength=num_patches), num * num_visible / num_patches
    deviation = (expected * (1 - num_visible / num_patches)) ** 0.5
    assert np.abs(counts - expected).max() < 5 * deviation
