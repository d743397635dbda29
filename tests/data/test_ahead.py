"""What is prepared ahead: in order, errors in their place, and nothing left over when it ends."""

import os
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kit.loaders import CPU, assert_same, take, training_loader
from kit.sources import in_memory
from sslx.data import Loader
from sslx.data.ahead import DEPTH, ahead
from sslx.data.order import Sequential, Shuffled
from sslx.data.planner import Planner
from sslx.data.views import Augment, ViewSpec

SPECS = (ViewSpec(size=16, augment=Augment()), ViewSpec(size=8, augment=Augment()))


EARLIER = set[int | None]()


@pytest.fixture(autouse=True)
def earlier_threads() -> None:
    """Those that loaders of other tests have left behind."""
    EARLIER.clear()
    EARLIER.update(thread.ident for thread in threading.enumerate())


def threads() -> set[str]:
    new = [thread for thread in threading.enumerate() if thread.ident not in EARLIER]
    return {thread.name for thread in new if thread.name.startswith("ahead")}


def test_results_come_in_order_up_to_none_and_the_thread_ends() -> None:
    assert list(ahead(lambda t: t if t < 9 else None, 2, CPU)) == [2, 3, 4, 5, 6, 7, 8]
    assert list(ahead(lambda _: None, 0, CPU)) == []
    assert not threads()


def test_so_many_are_made_before_they_are_asked_for_and_no_more() -> None:
    made, enough = list[int](), threading.Event()

    def make(t: int) -> int:
        made.append(t)
        if t == DEPTH:
            enough.set()
        return t

    results = ahead(make, 0, CPU)
    assert next(results) == 0
    assert enough.wait(10), "the next ones are made while nobody asks"
    time.sleep(0.05)
    assert made == list(range(DEPTH + 1))
    results.close()
    assert not threads()


def test_an_error_comes_in_its_results_place() -> None:
    def make(t: int) -> int:
        if t == 3:
            raise RuntimeError("an unreadable image")
        return t

    results = ahead(make, 0, CPU)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="an unreadable image"):
        next(results)
    assert not threads()


def loader_of(backend: str) -> Loader:
    rng = np.random.default_rng(4)
    source = in_memory(rng.integers(0, 256, (40, 20, 20, 3), dtype=np.uint8), np.arange(40))
    return training_loader(source, backend, SPECS, batch_size=8, threads=1)


@pytest.mark.parametrize("backend", ["resident", "dali"])
def test_a_loader_goes_back_and_leaves_no_thread(backend: str) -> None:
    loader = loader_of(backend)
    expected = take(loader, 9)
    assert threads()
    for delivered in (2, 7, 0):
        loader.back_to(delivered)
        assert not threads()
        assert_same(take(loader, 1), expected[delivered : delivered + 1])
    loader.close()
    assert not threads()


def test_a_child_that_is_forked_meanwhile_ends_by_itself() -> None:
    loader = loader_of("resident")
    next(loader)
    child = os.fork()
    if child == 0:
        loader.close()
        os._exit(17)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 17
    next(loader)
    loader.close()


@pytest.mark.parametrize(
    "order",
    [
        lambda: Shuffled(num_samples=40, batch_size=8, seed=3, blocks=np.array([0, 10, 15])),
        lambda: Sequential(num_samples=21, per_rank=5),
    ],
)
def test_a_planner_is_pickled_and_its_work_is_the_same(order: Callable[[], Any]) -> None:
    planner = Planner(order=order(), specs=SPECS, seed=3, along=lambda t: {"t": np.array([t])})
    again = pickle.loads(pickle.dumps(planner))
    for t in range(8):
        work, other = planner(t), again(t)
        assert (work is None) == (other is None) == (t > 4 and planner.order.finished(t))
        if work is None or other is None:
            continue
        assert work.along["t"] == t
        assert other.along == {}, "nothing travels from a process that reads images"
        np.testing.assert_array_equal(work.index, other.index)
        np.testing.assert_array_equal(work.files, other.files)
        for a, b in zip(work.draws, other.draws, strict=True):
            assert a is not None
            assert b is not None
            for name, values in vars(a).items():
                np.testing.assert_array_equal(values, vars(b)[name])
