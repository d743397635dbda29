"""Loader workers that die, are stopped or hang: named and replaced, without a change in any batch, or ended."""

import faulthandler
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kit.errors import raises_one_line
from kit.hanging import hanging
from kit.loaders import BACKENDS, Backend, assert_same, every_backend, take, training_loader
from kit.processes import children, ended, until
from kit.sources import folder as kit_folder
from kit.sources import paths_of
from sslx.data import Loader, sources
from sslx.data.backends import torchvision
from sslx.data.batch import Batch
from sslx.data.codecs.formats import Levels
from sslx.data.codecs.headers import File
from sslx.data.facts import Channels
from sslx.data.sources import Source
from sslx.data.views import Augment, ViewSpec
from sslx.data.waiting import StopWaiting, WaitPolicy
from sslx.data.workers import Deadly, Pool, WorkerError, answer_alone
from sslx.errors import ConfigError, StorageError
from sslx.machine.interrupts import STOPPING

SPECS = (ViewSpec(size=32, augment=Augment()), ViewSpec(size=16, augment=Augment()))
Said = list[str]
Expected = dict[str, list[Batch]]


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return sources.build(kit_folder(folder), "train")


def train(source: Source, said: Said, threads: int, backend: str = "torchvision", **options: Any) -> Loader:
    return training_loader(source, backend, SPECS, threads=threads, say=said.append, **options)


@pytest.fixture(scope="module")
def expected(source: Source) -> Expected:
    """Backend -> its first batches."""
    return {name: take(train(source, [], int(name == "dali"), name), 12) for name in BACKENDS}


# whole loaders


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_or_stopped_is_named_and_replaced(
    source: Source, expected: Expected, number: signal.Signals
) -> None:
    said = Said()
    others = children(os.getpid())
    loader = train(source, said, 2)
    got = take(loader, 1)
    workers = [pid for pid in children(os.getpid()) if pid not in others]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, number)
    got += take(loader, 11)
    assert_same(got, expected["torchvision"])
    named = [pid for pid in workers for line in said if f"loader worker {pid} " in line]
    assert sorted(named) == workers
    word = "SIGKILL" if number == signal.SIGKILL else "was stopped"
    assert all(word in line and "replaced by" in line for line in said)
    loader.close()
    until(lambda: all(map(ended, workers)), "the workers' end", 10)


@pytest.mark.parametrize("number", [*STOPPING, signal.SIGUSR1])
def test_what_is_sent_to_the_whole_process_group_ends_no_worker(
    source: Source, expected: Expected, number: signal.Signals
) -> None:
    said = Said()
    others = children(os.getpid())
    loader = train(source, said, 1)
    got = take(loader, 1)
    for pid in set(children(os.getpid())) - set(others):
        os.kill(pid, number)
    assert_same(got + take(loader, 7), expected["torchvision"][:8])
    assert not said


@every_backend
def test_a_file_that_does_not_answer_ends_the_wait_at_the_limit(
    source: Source, expected: Expected, backend: Backend
) -> None:
    said = Said()
    loader = train(source, said, 1, backend, timeout_s=1.0)
    with hanging(paths_of(source)), raises_one_line(StorageError, "waited 1 s for data (--data.timeout-s)") as caught:
        next(loader)
    if backend != "dali":
        assert any(path in str(caught.value) for path in paths_of(source))
        assert "loader worker" in str(caught.value)
    assert said[0].startswith("waiting for data for ")
    assert_same(take(loader, 3), expected[backend][:3])


@every_backend
def test_a_signal_ends_a_wait_and_no_batch_is_lost(source: Source, expected: Expected, backend: Backend) -> None:
    loader = train(source, [], 1, backend)
    waits: list[float] = []

    def stop(waited_s: float) -> bool:
        waits.append(waited_s)
        return waited_s > 0.3

    loader.listen(stop, lambda _: None)
    start = time.monotonic()
    with hanging(paths_of(source)), pytest.raises(StopWaiting):
        next(loader)
    assert time.monotonic() - start < 20  # the lease would end after 45
    assert waits == sorted(waits)
    loader.listen(lambda _: False, lambda _: None)
    assert_same(take(loader, 3), expected[backend][:3])


def test_a_worker_that_a_file_ends_sets_that_file_aside(
    source: Source, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a decoder does whose memory a damaged file corrupts."""
    victim = int(expected["torchvision"][1].index[2])
    path = paths_of(source)[victim]
    decode = torchvision.decode

    def deadly(file: File, levels: Levels, channels: Channels) -> Tensor:
        if file == path:
            faulthandler.disable()  # pytest's, which would print a death that is meant
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode(file, levels, channels)

    monkeypatch.setattr(torchvision, "decode", deadly)
    said = Said()
    loader = train(source, said, 2, max_bad=0.5)
    got = take(loader, 4)
    assert loader.bad == {victim: path}
    assert [path in line and "SIGSEGV" in line for line in said] == [True, True]  # replaced, set aside
    for batch, plain in zip(got, expected["torchvision"], strict=False):
        others = batch.index != victim
        assert torch.equal(batch.views[0][others], plain.views[0][others])


# pools of other work


def work(number: int, place: Tensor, begin: Callable[[int], None]) -> int:
    begin(number)
    if number == 5:
        raise MemoryError("no room")
    if number == 6:
        raise RuntimeError("a bad file")
    if number == 7:
        raise KeyError("a mistake")
    if number == 8:
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGABRT)
    if number == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    place[: number + 1] = number
    return number * number


@pytest.fixture
def pool() -> Iterator[Callable[..., Iterator[tuple[int, int, int]]]]:
    pools: list[Pool] = []

    def results(*numbers: int, workers: int = 2, said: Said | None = None) -> Iterator[tuple[int, int, int]]:
        wait_policy = WaitPolicy(say=(said if said is not None else []).append)
        pools.append(Pool(work, workers, place_bytes=200, wait_policy=wait_policy, name=lambda i: f"number {i}"))
        return pools[-1].results(numbers or count(), lambda n, answer, place: (n, answer, int(place[: n + 1].sum())))

    yield results
    for one in pools:
        one.close()


def test_results_come_in_order_with_what_was_written_beside_them(pool: Any) -> None:
    numbers = [*range(5), *range(10, 60)]
    assert list(pool(*numbers, workers=3)) == [(n, n * n, n * (n + 1)) for n in numbers]
    assert list(pool(3, workers=3)) == [(3, 9, 12)]


def test_what_work_raises_comes_through(pool: Any) -> None:
    for number, error in ((5, MemoryError), (6, RuntimeError), (7, WorkerError)):
        results = pool(1, number)
        assert next(results) == (1, 1, 2)
        with pytest.raises(error, match=r"(?s)no room|a bad file|in work.*KeyError: 'a mistake'"):
            next(results)


def test_a_pipeline_that_is_garbage_when_a_worker_starts_does_not_hang_it(source: Source) -> None:
    """Where DALI's pipeline ends it waits for its threads, which a forked process does not have."""
    loader = train(source, [], 1, "dali")
    next(loader)
    cycle: list[Any] = [loader]
    cycle.append(cycle)
    enabled = gc.isenabled()
    gc.disable()
    del loader, cycle
    try:
        told = Said()
        wait_policy = WaitPolicy(limit_s=20, say=told.append)
        pool = Pool(collect, 1, place_bytes=200, wait_policy=wait_policy, name=str)
        assert len(list(pool.results(range(3), answer_alone))) == 3
        pool.close()
    finally:
        if enabled:
            gc.enable()
    assert told == []


def collect(*_: object) -> int:
    return gc.collect()


def test_work_that_ends_two_workers_is_not_given_to_a_third(pool: Any) -> None:
    said = Said()
    with pytest.raises(Deadly, match="SIGABRT") as caught:
        list(pool(8, said=said))
    assert caught.value.index == 8
    assert len(said) == 1
    assert "number 8" in said[0]


def test_workers_that_are_killed_again_and_again_end_the_wait(pool: Any) -> None:
    said = Said()
    with raises_one_line(ConfigError, "3 loader workers ", " SIGKILL", " take fewer --data.threads"):
        list(pool(9, said=said))
    assert len(said) == 2
