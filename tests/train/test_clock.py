"""Throughput, the wait for data and the straggler: on gloo ranks of which one is slow in a known place."""

import math
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sslx import distributed, parallel
from sslx.methods.base import Step
from sslx.train.clock import REPEAT_AFTER_S, REPORT_AFTER_S, Clock, DataWaits, watch_waits
from sslx.train.stop_flag import StopFlag

SLOW_S = 0.15
CPU = torch.device("cpu")


class Slow(nn.Module):
    """A model whose forward sleeps, with a batch norm's buffers and a gather as a contrastive loss has it."""

    def __init__(self, sleep_s: float) -> None:
        super().__init__()
        self.norm, self.sleep_s = nn.BatchNorm1d(16), sleep_s

    def forward(self, x: torch.Tensor) -> Step:
        time.sleep(self.sleep_s)
        z = self.norm(x)
        return Step((z @ distributed.all_gather(z).T).square().mean())


def measured(where: str, slow_rank: int, steps: int, readings: int) -> list[tuple[dict[str, float], str]]:
    """What a Clock says of ranks of which one sleeps in every step, in the loader, the forward or after the step."""
    torch.manual_seed(0)
    late_s = SLOW_S if distributed.rank() == slow_rank else 0.0
    model = Slow(late_s if where == "forward" else 0.0)
    wrapped = parallel.wrap(model, device=torch.device("cpu"))
    watch_waits(wrapped)
    clock, flag = Clock(8, [f"host{rank}" for rank in range(distributed.world_size())], CPU), StopFlag()
    said: list[tuple[dict[str, float], str]] = []
    for _ in range(readings):
        for _ in range(steps):
            with clock.waiting_for_data():
                time.sleep(late_s if where == "loader" else 0.0)
            wrapped(torch.randn(4, 16)).loss.backward()
            time.sleep(late_s if where == "after" else 0.0)
            clock.steps += 1
            flag.exchange(0)
        clock.arrive()
        distributed.sum_over_ranks(torch.ones(1))
        remarks: list[str] = []
        numbers = clock.read(remarks.append)
        said.append((numbers, "".join(remarks)))
    flag.receive()
    return said


@pytest.mark.parametrize("where", ["loader", "forward", "after"])
@pytest.mark.parametrize(
    ("world_size", "slow_rank"),
    [(2, 1), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)],
)
def test_the_slow_rank_is_found_wherever_it_is_slow(ranks: Any, where: str, world_size: int, slow_rank: int) -> None:
    for readings in ranks(world_size, measured, where, slow_rank, 3, 2):
        numbers, _ = readings[1]
        assert numbers["slowest_rank"] == slow_rank
        assert numbers["slowest_rank_s"] > SLOW_S
        assert numbers["other_ranks_s"] < numbers["slowest_rank_s"] - SLOW_S / 2
        assert numbers["samples_per_s"] < 8 / SLOW_S
        data_s = numbers["data_wait"] * 8 / numbers["samples_per_s"]
        assert data_s > 0.9 * SLOW_S if where == "loader" else data_s < SLOW_S / 2


@pytest.mark.slow
def test_a_straggler_is_named_once_with_the_cause(ranks: Any) -> None:
    steps = math.ceil(REPORT_AFTER_S / SLOW_S / 4)
    for where, cause in (("loader", "of it waiting for data: its disk is slow"), ("after", "see what else runs")):
        for readings in ranks(2, measured, where, 1, steps, 7):
            remarks = [remark for _, remark in readings if remark]
            assert len(remarks) == 1, "once in ten minutes"
            assert remarks[0].startswith("rank 1 on host1 keeps the others waiting: its own part of a step takes 0.")
            assert cause in remarks[0]
            assert readings[0][1] == ""
    assert REPEAT_AFTER_S > 60


def test_one_rank_has_nobody_to_wait_for(ranks: Any) -> None:
    ((numbers, remark),) = ranks(1, measured, "loader", 0, 2, 1)[0]
    assert numbers.keys() == {"samples_per_s", "data_wait"}
    assert numbers["data_wait"] > 0.5
    assert remark == ""


def alarm(rings: bool) -> bool:
    clock = Clock(8, ["a", "b"], CPU)
    clock.arrive()
    clock.read(print, is_lost=rings and distributed.rank() == 0)
    return clock.is_lost


def test_what_rank_0_has_lost_all_know(ranks: Any) -> None:
    assert ranks(2, alarm, True) == [True, True]
    assert ranks(2, alarm, False) == [False, False]


class Queue:
    """A device that computes what it is given, in order, while the host goes on: a thread, with a clock of its own."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[float | threading.Event | None] = queue.SimpleQueue()
        self._times: dict[threading.Event, float] = {}
        self.busy: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        while (item := self._work.get()) is not None:
            if isinstance(item, float):
                began = time.perf_counter()
                time.sleep(item)
                self.busy.append((began, time.perf_counter()))
            else:
                self._times[item] = time.perf_counter()
                item.set()

    def launch(self, seconds: float) -> None:
        self._work.put(seconds)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def restart(self) -> None:
        self.mark().wait()

    def mark(self) -> threading.Event:
        mark = threading.Event()
        self._work.put(mark)
        return mark

    def ended_s(self, mark: threading.Event, *, wait: bool) -> float | None:
        if wait:
            mark.wait()
        return self._times[mark] if mark.is_set() else None


@pytest.fixture
def device() -> Iterator[Queue]:
    device = Queue()
    yield device
    device.close()


@pytest.mark.parametrize(("read_s", "step_s"), [(0.01, 0.06), (0.06, 0.01), (0.03, 0.03)])
def test_only_what_a_device_stands_idle_counts_as_a_wait_for_data(device: Queue, read_s: float, step_s: float) -> None:
    waits, blind, spans = DataWaits(device), DataWaits(), list[tuple[float, float]]()
    device.launch(step_s)
    waits.restart()
    device.launch(step_s)
    for _ in range(6):
        began = time.perf_counter()
        with waits, blind:
            time.sleep(read_s)
        spans.append((began, time.perf_counter()))
        device.launch(step_s)
    late_s = waits.late_s()
    device.mark().wait()
    busy_s = sum(max(0.0, min(b, d) - max(a, c)) for a, b in spans for c, d in device.busy)
    assert late_s == pytest.approx(sum(b - a for a, b in spans) - busy_s, abs=0.015)
    assert late_s > 6 * 0.03 if read_s > step_s else late_s < waits.host_s
    assert blind.late_s() == pytest.approx(blind.host_s)
    assert blind.late_s() >= 6 * read_s, "on a CPU all of it counts"
    waits.restart()
    assert waits.late_s() == waits.host_s == 0


def test_waits_that_are_never_read_do_not_pile_up(device: Queue) -> None:
    waits = DataWaits(device)
    for _ in range(50):
        with waits:
            device.mark().wait()
    assert len(waits._pending) < 3


@pytest.mark.gpu
def test_a_gpus_clock_is_compared_with_the_hosts() -> None:
    waits = DataWaits.on(torch.device("cuda"))
    torch.cuda._sleep(int(2e9))  # a second or so
    with waits:
        time.sleep(0.05)
    assert waits.late_s() == 0.0
    with waits:
        time.sleep(0.05)
    assert waits.late_s() == pytest.approx(0.05, abs=0.01)
