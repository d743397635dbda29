"""Where a run's time goes on each rank: throughput, the wait for data, and the rank that keeps the others waiting.

Because ranks run in lockstep, a step takes equally long on all.  A straggler therefore shows in its own time: that of a
step without what it spends waiting for other ranks.  That wait is measured on the host, in the collectives of
``distributed`` and in DDP's.  On GPUs, the host runs ahead of its device, so a rank whose GPU alone is slow cannot be
told from the others.  Nothing here waits for a device, except a reading, which comes when the device has just been
waited for.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from sslx import distributed, parallel
from sslx.machine import stopwatch

MIN_RATIO, MIN_SHARE = 1.5, 0.1
"""A straggler's own time is at least this many times the others', and exceeds it by at least this share of a step."""
REPORT_AFTER_S, REPEAT_AFTER_S = 5.0, 600.0
"""Seconds for which a rank must be the straggler to be reported, and seconds until it is reported again."""


class Timeline(Protocol):
    """The timeline of a device that computes while the host does other things."""

    def restart(self) -> None:
        """Synchronize the device's clock with the host's."""
        ...

    def mark(self) -> Any:
        """Return a mark for the end of everything that the device has been given so far."""
        ...

    def ended_s(self, mark: Any, *, wait: bool) -> float | None:
        """Return when the mark was reached, on time.perf_counter(); None if it was not and ``wait`` is False."""
        ...


class GpuTimeline:
    """The timeline of the current GPU, measured by events on the current stream."""

    def restart(self) -> None:
        self._zero = self.mark()
        self._zero.synchronize()
        self._zero_s = time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ended_s(self, mark: torch.cuda.Event, *, wait: bool) -> float | None:
        if wait:
            mark.synchronize()
        return self._zero_s + self._zero.elapsed_time(mark) / 1e3 if mark.query() else None


class DataWaits:
    """A context manager around fetching each step's data, which measures how long that delays the steps.

    On a CPU, all of that time counts.  On a device with a timeline, only the time after the end of the previous step
    counts: as long as the device computes that, the data is not late.
    """

    def __init__(self, timeline: Timeline | None = None) -> None:
        self._timeline = timeline
        self.restart()

    @classmethod
    def on(cls, device: torch.device) -> "DataWaits":
        """Return the waits for a device, with a timeline if it is a GPU."""
        return cls(GpuTimeline() if device.type == "cuda" else None)

    def restart(self) -> None:
        """Reset the counts to 0."""
        self.host_s, self._late_s = 0.0, 0.0
        self._pending = deque[tuple[float, float, Any]]()
        if self._timeline:
            self._timeline.restart()

    def __enter__(self) -> None:
        self._mark = self._timeline.mark() if self._timeline else None
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        left = time.perf_counter()
        self.host_s += left - self._entered
        self._pending.append((self._entered, left, self._mark))
        self._count_pending(wait=False)

    def late_s(self) -> float:
        """Return the seconds, so far, during which a step could have begun if its data had been there."""
        self._count_pending(wait=True)
        return self._late_s

    def _count_pending(self, *, wait: bool) -> None:
        while self._pending:
            entered, left, mark = self._pending[0]
            ended = self._timeline.ended_s(mark, wait=wait) if self._timeline else entered
            if ended is None:
                return
            self._late_s += max(0.0, left - max(entered, ended))
            self._pending.popleft()


class Clock:
    """Throughput since the last reading, the share of time spent waiting for data, and the slowest rank.

    hosts: those of all ranks.  device: this rank's.  is_lost: what rank 0 passed to the last reading.
    """

    def __init__(self, batch_size: int, hosts: Sequence[str], device: torch.device) -> None:
        self._batch_size, self._hosts, self._waits = batch_size, hosts, DataWaits.on(device)
        self.is_lost = False
        self._streak: tuple[int, float] = (-1, 0.0)
        self._reported: dict[int, float] = {}
        self.restart()

    def restart(self) -> None:
        """Exclude the time since the last reading, which a probe or a checkpoint took."""
        self._waits.restart()
        self._since, self.steps = time.perf_counter(), 0
        self._blocked, self._arrived = stopwatch.blocked_s(), self._since

    def waiting_for_data(self) -> DataWaits:
        """Return a context manager to use around fetching each step's data."""
        return self._waits

    def arrive(self) -> None:
        """Mark the end of the steps to be read.  Later waits, such as for the device, are not this rank's own time."""
        self._arrived = time.perf_counter()
        self._own = self._arrived - self._since - self._waits.host_s - (stopwatch.blocked_s() - self._blocked)

    def read(self, say: Callable[[str], None], is_lost: bool = False) -> dict[str, float]:
        """Return numbers of all ranks since the last reading, then restart.  Every rank calls this together.

        ``samples_per_s`` is that of all ranks.  ``data_wait`` in [0, 1] is for the rank that waits longest for data:
        the share of time during which its device had no step to compute because a batch was missing.  With several
        ranks there are also ``slowest_rank``, ``slowest_rank_s`` and ``other_ranks_s``: the rank's own seconds per
        step, including its wait for data, and the median of the others'.  say: prints a line about a straggler, from
        time to time.  is_lost: passed on from rank 0 to all.
        """
        elapsed_s, steps = time.perf_counter() - self._since, max(1, self.steps)
        readings = distributed.gather_objects((self._waits.late_s(), max(0.0, self._own), is_lost))
        self.is_lost = readings[0][2]
        numbers = {
            "samples_per_s": self.steps * self._batch_size / elapsed_s,
            "data_wait": min(1.0, max(loading for loading, _, _ in readings) / elapsed_s),
        }
        if len(readings) > 1:
            own = [(loading + computing) / steps for loading, computing, _ in readings]
            slowest = max(range(len(own)), key=own.__getitem__)
            others = statistics.median_low(own[:slowest] + own[slowest + 1 :])
            numbers |= {"slowest_rank": slowest, "slowest_rank_s": own[slowest], "other_ranks_s": others}
            if self._is_due(slowest, own[slowest], others, elapsed_s, elapsed_s / steps):
                say(self._describe(slowest, own[slowest], others, readings[slowest][0] / steps))
        self.restart()
        return numbers

    def _is_due(self, rank: int, own_s: float, others_s: float, elapsed_s: float, step_s: float) -> bool:
        """Return whether a rank has kept the others waiting for a while, and it is time to report that."""
        is_slow = own_s > MIN_RATIO * others_s and own_s - others_s > MIN_SHARE * step_s
        before_s = self._streak[1] if self._streak[0] == rank else 0.0
        self._streak = (rank, before_s + elapsed_s if is_slow else 0.0)
        now = time.monotonic()
        if self._streak[1] < REPORT_AFTER_S or now < self._reported.get(rank, -REPEAT_AFTER_S) + REPEAT_AFTER_S:
            return False
        self._reported[rank] = now
        return True

    def _describe(self, rank: int, own_s: float, others_s: float, loading_s: float) -> str:
        cause = "little of it waiting for data: see what else runs on that machine"
        if loading_s > (own_s - others_s) / 2:
            cause = f"{loading_s:.3g} s of it waiting for data: its disk is slow, or it needs more --data.threads"
        return (
            f"rank {rank} on {self._hosts[rank]} keeps the others waiting: its own part of a step takes {own_s:.3g} s, "
            f"that of the others {others_s:.3g} s; {cause}"
        )


def watch_waits(model: nn.Module) -> None:
    """Count DDP's waits for the gradients of other ranks as waiting for other ranks.

    This changes neither a module outside DDP nor any number.
    """
    if parallel.unwrap(model) is model:
        return

    def after_forward(_: nn.Module, __: Any, step: Any) -> None:
        if step.loss.requires_grad:
            step.loss.register_hook(backward_begins)

    def backward_begins(_: torch.Tensor) -> None:
        queue(own_gradients_done)  # runs before DDP's callback, which waits for all buckets: they run in order

    def own_gradients_done() -> None:
        start = time.perf_counter()
        queue(lambda: stopwatch.add_blocked(time.perf_counter() - start))

    queue: Callable[[Callable[[], None]], None] = vars(torch.autograd.Variable)["_execution_engine"].queue_callback
    model.register_forward_hook(after_forward)
