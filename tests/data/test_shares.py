"""Weighted shares of samples: whole passes and a fraction, each position by itself, every pass another augmentation."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from kit.errors import raises_one_line
from kit.loaders import AS_STORED, take, training_loader
from kit.sources import in_memory
from sslx.data.facts import Share
from sslx.data.lineage import Training
from sslx.data.order import Shuffled
from sslx.data.shares import Weighted
from sslx.data.sources import Pixels
from sslx.data.views import Augment, ViewSpec
from sslx.errors import ConfigError

SHARES = (Share(num_samples=30, weight=1), Share(num_samples=7, weight=2.5), Share(num_samples=23, weight=0.5))
PER_EPOCH = (30, 18, 12)
SPECS = (ViewSpec(size=12, augment=Augment(jitter=0, gray=0, blur=0), **AS_STORED),)


def share_of(samples: np.ndarray) -> np.ndarray:
    return np.digitize(samples, (30, 37))


def test_an_epoch_is_whole_passes_and_a_fraction_of_each_share() -> None:
    seed = int(np.random.default_rng().integers(1000))
    seen: list[tuple[int, int]] = []
    for epoch in range(6):
        order = Weighted(seed, epoch, SHARES)
        assert order.num_samples == sum(PER_EPOCH)
        positions = np.random.default_rng().permutation(60)
        samples, passes = order.samples(positions)
        np.testing.assert_array_equal(np.bincount(share_of(samples)), PER_EPOCH)
        inverse = {position: (s, p) for position, s, p in zip(positions, samples, passes, strict=True)}
        for sample in np.random.default_rng().permutation(60)[:12].tolist():
            where, numbers = order.positions(sample)
            found = {(position, number) for position, number in zip(where.tolist(), numbers.tolist(), strict=True)}
            assert found == {(int(k), int(p)) for k, (s, p) in inverse.items() if s == sample}
        for share in range(3):
            first, last = passes[share_of(samples) == share].min(), passes[share_of(samples) == share].max()
            assert first == epoch * PER_EPOCH[share] // SHARES[share].num_samples
            assert last == ((epoch + 1) * PER_EPOCH[share] - 1) // SHARES[share].num_samples
        seen += zip(samples.tolist(), passes.tolist(), strict=True)
    assert len(set(seen)) == len(seen), "a sample comes once in a pass"
    times = Counter(sample for sample, _ in seen)
    for sample in range(60):
        share = int(share_of(np.array(sample)))
        assert abs(times[sample] - 6 * PER_EPOCH[share] / SHARES[share].num_samples) < 1
    again = Weighted(seed, 3, SHARES).samples(np.arange(60))[0]
    assert (again != Weighted(seed, 4, SHARES).samples(np.arange(60))[0]).mean() > 0.5
    one, other = Weighted(seed, 7, SHARES).samples(np.array([11])), Weighted(seed, 7, SHARES).samples(np.arange(60))
    assert (one[0][0], one[1][0]) == (other[0][11], other[1][11])


def test_weights_of_one_and_large_shares() -> None:
    order = Weighted(1, 5, (Share(num_samples=9, weight=1), Share(num_samples=4, weight=1)))
    samples, passes = order.samples(np.arange(13))
    assert sorted(samples) == list(range(13))
    assert set(passes) == {5}
    billions = (Share(num_samples=10**9, weight=0.001), Share(num_samples=3, weight=1000))
    samples, _ = Weighted(1, 999, billions).samples(np.arange(1000))
    assert samples.max() < 10**9 + 3
    assert Share(num_samples=3, weight=0.01).num_per_epoch == 1


def order(**options: Any) -> Shuffled:
    return Shuffled(**{"num_samples": 60, "batch_size": 12, "seed": 4, "shares": SHARES, **options})


def test_ranks_share_each_batch_and_a_restart_needs_the_same_weights() -> None:
    whole = order()
    assert whole.num_batches == 5
    for t in (0, 4, 5, 17):
        parts = [order(world_size=3, rank=rank) for rank in range(3)]
        np.testing.assert_array_equal(np.concatenate([part.batch(t) for part in parts]), whole.batch(t))
        np.testing.assert_array_equal(np.concatenate([part.passes(t) for part in parts]), whole.passes(t))
    assert order(world_size=2, batch_size=12).seek(whole.state(17)) == 17
    others = (SHARES[0], SHARES[1], replace(SHARES[2], weight=1.0))
    with raises_one_line(ConfigError, "[1, 2.5, 0.5]", "[1, 2.5, 1.0]", "--source.weights"):
        order(shares=others).seek(whole.state(17))
    with raises_one_line(ConfigError, "weights of 1", "--source.weights"):
        order(shares=None).seek(whole.state(3))
    with raises_one_line(ConfigError, "more than the 60 images of an epoch"):
        order(batch_size=64)
    with pytest.raises(ValueError, match="add up to all samples"):
        order(num_samples=61)
    assert isinstance(order(shares=None).passes(7), int)


def weighted_source() -> Pixels:
    random = np.random.default_rng()
    images = np.empty(60, dtype=object)
    for i in range(60):
        images[i] = random.integers(0, 256, (*random.integers(16, 40, 2), 3), dtype=np.uint8)
    source = in_memory(images)
    return replace(source, facts=replace(source.facts, shares=SHARES))


def test_claims_of_lineage_are_what_the_loader_delivered() -> None:
    source = weighted_source()
    batches = take(training_loader(source, "torchvision", SPECS, batch_size=12, threads=0, seed=4), 10)
    training = Training(order=order(), num_steps=10, specs=SPECS, seed=4)
    num_claims, crops = 0, set[tuple[int, ...]]()
    for index in range(60):
        height, width = source.pixels[index].shape[:2]
        boxes = list[tuple[int, ...]]()
        for claim in training.appearances([index], height, width):
            batch = batches[claim.step - 1]
            top, left, bottom, right = claim.box
            crop = torch.from_numpy(source.pixels[index][top:bottom, left:right]).permute(2, 0, 1)
            made = F.resize(crop, [12, 12], antialias=True).float()
            made = made.flip(-1) if claim.draws["flip"] else made
            rows = np.flatnonzero(batch.index.numpy() == index)
            assert min(float((batch.views[0][row] - made).abs().max()) for row in rows) < 2, claim
            boxes.append(claim.box)
            num_claims += 1
        crops |= {(index, *box) for box in boxes}
    assert num_claims == 10 * 12
    assert len(crops) > 0.9 * num_claims, "each pass draws other crops, also within an epoch"


def test_a_restart_in_mid_epoch_on_another_world_size_goes_on_exactly() -> None:
    source = weighted_source()
    settings = {"batch_size": 12, "threads": 0, "seed": 4}
    loader = training_loader(source, "torchvision", SPECS, **settings)
    take(loader, 7)
    state = loader.state_dict()
    expected = take(loader, 4)
    shares = []
    for rank in range(2):
        part = training_loader(source, "torchvision", SPECS, rank=rank, world_size=2, **settings)
        part.load_state_dict(state)
        shares.append(take(part, 4))
    for one, parts in zip(expected, zip(*shares, strict=True), strict=True):
        index = torch.cat([part.index for part in parts])
        views = torch.cat([part.views[0] for part in parts])
        assert torch.equal(index, one.index)
        assert torch.equal(views, one.views[0])
