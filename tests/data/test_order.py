"""The sampler: every epoch a permutation, the same batches at every world size, messages that help."""

import json
import pickle
import re
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from itertools import permutations as permutations_of
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kit.loaders import take, training_loader
from kit.sources import in_memory
from sslx import rng
from sslx.data.backends import dali
from sslx.data.order import Order, Pieces, Repeated, Sequential, Shuffled
from sslx.data.views import ViewSpec
from sslx.errors import ConfigError

WORLD_SIZES = (1, 2, 3, 4)


def shuffled(seed: int = 5, *, num_samples: int = 103, batch_size: int = 12, **more: Any) -> Shuffled:
    return Shuffled(num_samples=num_samples, batch_size=batch_size, seed=seed, **more)


def of_ranks(world_size: int, **arguments: Any) -> list[Shuffled]:
    return [shuffled(**arguments, rank=rank, world_size=world_size) for rank in range(world_size)]


def epoch(order: Shuffled, number: int) -> np.ndarray:
    start = number * order.num_batches
    return np.concatenate([order.batch(t) for t in range(start, start + order.num_batches)])


def test_the_incomplete_last_batch_is_dropped_and_is_another_one_each_epoch() -> None:
    order = shuffled()
    assert order.num_batches == 8
    left_out = []
    for number in range(20):
        seen = epoch(order, number)
        assert len(seen) == len(set(seen)) == 96
        assert 0 <= seen.min() <= seen.max() < 103
        left_out.append(set(range(103)) - set(seen))
    assert len(set().union(*left_out)) > 50


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    order = shuffled()
    backwards = [order.batch(t) for t in reversed(range(24))][::-1]
    np.testing.assert_array_equal(np.concatenate(backwards), np.concatenate([shuffled().batch(t) for t in range(24)]))
    assert [order.epoch(t) for t in (0, 7, 8, 15, 16)] == [0, 0, 1, 1, 2]
    for other in (epoch(order, 1), epoch(shuffled(6), 0), np.arange(96)):
        assert (epoch(order, 0) == other).mean() < 0.1


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_shares_of_all_ranks_are_the_batch_of_one(world_size: int, accumulate: int) -> None:
    whole = shuffled(batch_size=36)
    ranks = of_ranks(world_size, batch_size=36, accumulate=accumulate)
    assert {order.num_batches for order in ranks} == {2 * accumulate}
    assert {order.per_rank for order in ranks} == {36 // accumulate // world_size}
    for step in range(10):
        micro = range(step * accumulate, (step + 1) * accumulate)
        parts = [order.batch(t) for t in micro for order in ranks]
        assert {len(part) for part in parts} == {36 // accumulate // world_size}
        np.testing.assert_array_equal(np.concatenate(parts), whole.batch(step))
        assert {order.epoch(t) for t in micro for order in ranks} == {whole.epoch(step)}
    assert not any(order.finished(10**9) for order in ranks)


@pytest.mark.parametrize(("batch_size", "world_size", "accumulate"), [(10, 4, 1), (100, 3, 2), (3, 4, 1), (257, 2, 1)])
def test_a_batch_that_cannot_be_cut_names_a_near_one_that_can(
    batch_size: int, world_size: int, accumulate: int
) -> None:
    share = world_size * accumulate
    with pytest.raises(ConfigError, match=rf"batch size {batch_size} .*{world_size} x {accumulate}") as caught:
        shuffled(num_samples=1000, batch_size=batch_size, accumulate=accumulate, world_size=world_size)
    suggested = int(re.findall(r"--batch-size (\d+)", str(caught.value))[0])
    assert abs(suggested - batch_size) < share
    shuffled(num_samples=1000, batch_size=suggested, accumulate=accumulate, world_size=world_size)
    assert "\n" not in str(caught.value)


def test_a_batch_larger_than_the_source_names_the_largest_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"128 is more than the 50 images .*--batch-size 48 or less"):
        Shuffled(num_samples=50, batch_size=128, seed=0, world_size=4)
    assert Shuffled(num_samples=50, batch_size=48, seed=0, world_size=4).num_batches == 1
    with pytest.raises(ConfigError, match=r"the source has 3 images, too few to train on: .* needs 8 or more"):
        Shuffled(num_samples=3, batch_size=4, seed=0, world_size=4)
    with pytest.raises(ConfigError, match=r"the source has 1 image, too few to train on: .* needs 2 or more"):
        Shuffled(num_samples=1, batch_size=64, seed=0)


@pytest.mark.parametrize("num_samples", [1, 3, 22, 24])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sequential_covers_each_sample_once(world_size: int, num_samples: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        order = Sequential(num_samples=num_samples, per_rank=5, rank=rank, world_size=world_size)
        batches = [order.batch(t) for t in range(order.num_batches)]
        assert all(len(batch) == 5 for batch in batches[:-1])
        assert all(1 <= len(batch) <= 5 for batch in batches)
        assert [order.finished(t) for t in range(order.num_batches + 1)] == [False] * len(batches) + [True]
        assert order.epoch(order.num_batches) == 0
        assert order.batch(order.num_batches).tolist() == []
        for t, batch in enumerate(batches):
            np.testing.assert_array_equal(batch, np.arange(rank, num_samples, world_size)[5 * t : 5 * t + 5])
        seen += [int(i) for batch in batches for i in batch]
    assert sorted(seen) == list(range(num_samples))


def test_256_ranks_see_every_sample_once_however_often_they_are_stopped() -> None:
    """Two epochs without a remainder, restarted at odd steps, once on half of the ranks."""
    seen = np.zeros((2, 5_120), np.int64)
    step = 0
    for stop, world_size in ((3, 256), (4, 256), (7, 128), (10, 256)):  # each start knows its step and no more
        ranks = of_ranks(world_size, num_samples=5_120, batch_size=1_024)
        for t in range(step, stop):
            for order in ranks:
                np.add.at(seen[order.epoch(t)], order.batch(t), 1)
        step = stop
    assert (seen == 1).all()


def in_blocks(lengths: Sequence[int], window: int, *, seed: int = 5, batch_size: int = 1) -> Shuffled:
    blocks = np.cumsum([0, *lengths[:-1]])
    return shuffled(seed, num_samples=sum(lengths), batch_size=batch_size, blocks=blocks, window=window)


def assert_windows(order: Shuffled, number: int, lengths: Sequence[int], window: int) -> None:
    """Of an epoch, by brute force: whole blocks, so many at a time, whose samples come before those of any other."""
    block_of = np.repeat(np.arange(len(lengths)), lengths)
    samples = epoch(order, number)
    assert sorted(samples) == list(range(sum(lengths)))
    seen = 0
    while seen < len(samples):
        blocks = list(dict.fromkeys(block_of[samples[seen:]].tolist()))[:window]  # those that are not empty
        stop = seen + sum(lengths[b] for b in blocks)
        inside = set(block_of[samples[seen:stop]].tolist())
        if 0 not in lengths:
            assert len(inside) == len(blocks)
        assert stop - seen == sum(lengths[b] for b in inside)
        seen = stop


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_blocks_are_read_a_window_at_a_time_and_every_sample_once(window: int) -> None:
    random = np.random.default_rng()
    holes = [0, 3, 0, 0, 4, 0], [3, 0, 0], [0, 0, 3]
    for lengths in ([5], [1] * 9, [4] * 8, random.integers(1, 30, size=13).tolist(), *holes):
        order = in_blocks(lengths, window, seed=int(random.integers(2**32)))
        for number in range(2):
            assert_windows(order, number, lengths, window)


def test_the_windows_of_another_order_are_found_out() -> None:
    lengths = [20] * 12
    whole = shuffled(num_samples=240, batch_size=1)
    for wrong, window in ((whole, 2), (in_blocks(lengths, 3), 2), (in_blocks(lengths, 2), 3)):
        with pytest.raises(AssertionError):
            assert_windows(wrong, 0, lengths, window)


def test_blocks_and_the_samples_of_a_window_come_in_another_order_each_epoch() -> None:
    order = in_blocks([10] * 40, 4, batch_size=40)
    firsts = Counter[int]()
    for number in range(100):
        samples = epoch(order, number)
        firsts.update(np.unique(samples[:40] // 10).tolist())
        assert (np.diff(samples) == 1).sum() < 40  # 10 of the 400 are expected to follow the one before them
    assert len(firsts) == 40
    assert max(firsts.values()) < 25  # 10 are expected, with a standard deviation of 3
    assert (epoch(order, 0) != epoch(order, 1)).any()
    assert (epoch(order, 0) != epoch(in_blocks([10] * 40, 4, batch_size=40, seed=6), 0)).any()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_and_restarts_see_the_windows_of_one(world_size: int) -> None:
    lengths = np.random.default_rng().integers(1, 9, size=30).tolist()
    arguments: dict[str, Any] = {"num_samples": sum(lengths), "blocks": np.cumsum([0, *lengths[:-1]]), "window": 3}
    one = shuffled(**arguments)
    whole = [one.batch(t) for t in range(3 * one.num_batches)]
    for t in np.random.default_rng().permutation(len(whole)).tolist():
        parts = [order.batch(t) for order in of_ranks(world_size, **arguments)]
        np.testing.assert_array_equal(np.concatenate(parts), whole[t])


def test_blocks_cost_no_memory_for_their_samples() -> None:
    blocks = np.arange(0, 10**9, 10**5)
    tracemalloc.start()
    order = shuffled(num_samples=10**9, batch_size=4096, blocks=blocks, window=8)
    seen = np.concatenate([order.batch(t) for t in (0, 1, 10**5, 10**6, 10**9)])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**22
    assert len(set(seen[:8192].tolist())) == 8192
    assert len(set((seen[:8192] // 10**5).tolist())) == 8


@pytest.mark.parametrize("blocks", [[], [1, 5], [0, 7, 5], [0, 5, 104]])
def test_blocks_that_are_none_are_refused(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"ascending from 0 to at most 103, the number of samples; got \["):
        shuffled(blocks=np.array(blocks, dtype=np.int64))
    with pytest.raises(ValueError, match="at least 1 block, got 0"):
        in_blocks([3, 4], 0)


ORDERS = [
    shuffled(),
    in_blocks([7] * 6, 2, batch_size=12),
    shuffled(accumulate=3),
    Sequential(num_samples=22, per_rank=5, rank=1, world_size=2),
    Repeated(index=np.array([4, 1, 7]), num_epochs=3),
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
def test_an_order_is_found_again_where_its_state_says(order: Order) -> None:
    for t in range(30):
        state = json.loads(json.dumps(order.state(t)))
        assert order.seek(state) == t
        if not order.finished(t):
            assert 1 <= len(order.batch(t)) <= order.per_rank


def test_a_state_counts_samples_so_that_ranks_and_steps_of_accumulation_may_change() -> None:
    for step in range(20):
        for accumulate, world_size in ((1, 1), (2, 3), (3, 4), (12, 1)):
            order = shuffled(accumulate=accumulate, world_size=world_size)
            assert order.seek(shuffled().state(step)) == step * accumulate
            assert order.state(step * accumulate) == shuffled().state(step)


@pytest.mark.parametrize("other", [shuffled(6), shuffled(batch_size=8)], ids=["seed", "batch size"])
def test_a_state_of_another_seed_or_batch_size_is_refused(other: Shuffled) -> None:
    with pytest.raises(ConfigError, match="another seed or batch size than this run's"):
        other.seek(shuffled().state(3))


def test_a_state_of_another_window_is_refused() -> None:
    windows = [shuffled(num_samples=30, batch_size=10), in_blocks([10] * 3, 1, batch_size=10)]
    windows.append(in_blocks([10] * 3, 2, batch_size=10))
    for order, other in permutations_of(windows, 2):
        words = r"were shuffled (as a whole|in windows of \d blocks), and this run's are"
        with pytest.raises(ConfigError, match=words):
            other.seek(order.state(1))


@pytest.mark.parametrize("num_samples", [10**4, 10**9, 2**32])
def test_any_position_of_an_order_of_any_length_costs_memory_for_its_batch_only(num_samples: int) -> None:
    order = shuffled(num_samples=num_samples, batch_size=4096)
    tracemalloc.start()
    last = order.batch(order.num_batches - 1)
    order.batch(10**9)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**20
    assert len(pickle.dumps(order)) < 2**17
    assert len(set(last.tolist())) == 4096
    assert 0 <= last.min() <= last.max() < num_samples


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """How often each batch has been computed: by its epoch and first position."""
    batches = Counter[tuple[int, int]]()
    right = rng.permuted

    def counted(seed: int, name: str, *counters: int, size: int, positions: npt.NDArray[np.integer]) -> Any:
        batches[counters[0], int(positions[0])] += 1
        return right(seed, name, *counters, size=size, positions=positions)

    monkeypatch.setattr(rng, "permuted", counted)
    return batches


@pytest.mark.parametrize("ahead", [0, 1, 3, 6])
def test_a_batch_is_computed_once_whoever_reads_ahead(ahead: int, computed: Counter[tuple[int, int]]) -> None:
    order = shuffled()
    for t in range(5 * order.num_batches):
        for position in (t + ahead, t, t + ahead // 2):
            order.batch(position)
    assert len(computed) == 5 * order.num_batches + ahead
    assert set(computed.values()) == {1}
    assert len(order._recent) <= 16


def test_nor_more_often_where_dali_prefetches_as_on_a_gpu(
    computed: Counter[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dali.PREFETCHED, "cpu", dali.PREFETCHED["cuda"])
    source = in_memory(np.zeros((60, 8, 8, 3), dtype=np.uint8), size=8)
    loader = training_loader(source, "dali", [ViewSpec(size=8)])
    take(loader, 35)
    loader.close()
    assert computed.keys() >= {(t // 10, t % 10 * 6) for t in range(35)}
    assert set(computed.values()) == {1}


def test_a_batch_of_a_piece_does_not_depend_on_the_other_pieces():
    def batches(*pieces: int) -> list[list[int]]:
        order = Pieces(num_samples=26, per_rank=4, length=10, pieces=pieces)
        assert all(order.seek(order.state(t)) == t for t in range(order.num_batches))
        assert order.finished(order.num_batches)
        return [order.batch(t).tolist() for t in range(order.num_batches)]

    assert batches(0, 1, 2) == batches(0) + batches(1) + batches(2)
    assert batches(1, 2) == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19], [20, 21, 22, 23], [24, 25]]
    assert batches() == []
