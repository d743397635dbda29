"""Where a run's time goes, rank by rank: throughput, the wait for data, and the rank that the others wait for.

In lockstep every rank takes equally long for a step, so what tells a straggler is the time of its own: all of a step
but what it spends waiting for other ranks.  That wait is measured on the host, in the collectives of ``distributed``
and in DDP's.  On GPUs a host runs ahead of its device, so a rank whose GPU alone is slow is not told from the others;
nothing here waits for a device but a reading, which comes when the device has just been waited for.
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

RATIO, SHARE = 1.5, 0.1
"""A straggler's own time is so many times the others', and the difference such a share of the step."""
NAMED_AFTER_S, AGAIN_AFTER_S = 5.0, 600.0
"""Seconds for which a rank is the straggler before it is named, and until it is named again."""


class Timeline(Protocol):
    """Of a device that computes while the host does other things."""

    def restart(self) -> None:
        """Compare the device's clock with the host's."""
        ...

    def mark(self) -> Any:
        """Stands for the end of all that the device has been given so far."""
        ...

    def ended_s(self, mark: Any, *, wait: bool) -> float | None:
        """When that was, as of time.perf_counter(); None where it is yet to come and is not waited for."""
        ...


class GpuTimeline:
    """The current GPU's, by events on the current stream."""

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
    """``with waits:`` around the fetching of each step's data; how long that held the steps up.

    On a CPU all of that time.  On a device with a timeline only what comes after the end of the step before, which the
    device may still be computing: as long as it is, nothing is late.
    """

    def __init__(self, timeline: Timeline | None = None) -> None:
        self._timeline = timeline
        self.restart()

    @classmethod
    def on(cls, device: torch.device) -> "DataWaits":
        return cls(GpuTimeline() if device.type == "cuda" else None)

    def restart(self) -> None:
        """Count from 0 again."""
        self.host_s, self._late_s = 0.0, 0.0
        self._open = deque[tuple[float, float, Any]]()
        if self._timeline:
            self._timeline.restart()

    def __enter__(self) -> None:
        self._mark = self._timeline.mark() if self._timeline else None
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        left = time.perf_counter()
        self.host_s += left - self._entered
        self._open.append((self._entered, left, self._mark))
        self._settle(wait=False)

    def late_s(self) -> float:
        """Seconds, so far, in which a step could have begun if its data had been there."""
        self._settle(wait=True)
        return self._late_s

    def _settle(self, *, wait: bool) -> None:
        while self._open:
            entered, left, mark = self._open[0]
            ended = self._timeline.ended_s(mark, wait=wait) if self._timeline else entered
            if ended is None:
                return
            self._late_s += max(0.0, left - max(entered, ended))
            self._open.popleft()


class Clock:
    """Throughput since the last reading, the share of the time spent waiting for data, and the slowest rank.

    hosts: of all ranks.  device: this rank's.  lost: what rank 0 said in the last reading.
    """

    def __init__(self, batch_size: int, hosts: Sequence[str], device: torch.device) -> None:
        self._batch_size, self._hosts, self._waits = batch_size, hosts, DataWaits.on(device)
        self.lost = False
        self._streak: tuple[int, float] = (-1, 0.0)
        self._named: dict[int, float] = {}
        self.restart()

    def restart(self) -> None:
        """Leave out what came since the last reading: a probe, a checkpoint."""
        self._waits.restart()
        self._since, self.steps = time.perf_counter(), 0
        self._blocked, self._arrived = stopwatch.blocked_s(), self._since

    def waiting(self) -> DataWaits:
        """``with clock.waiting():`` around the fetching of each step's data."""
        return self._waits

    def arrive(self) -> None:
        """The steps to be read are over; what comes until then, as a wait for the device, is nobody's own time."""
        self._arrived = time.perf_counter()
        self._own = self._arrived - self._since - self._waits.host_s - (stopwatch.blocked_s() - self._blocked)

    def read(self, say: Callable[[str], None], lost: bool = False) -> dict[str, float]:
        """Numbers of all ranks since the last reading, then start again.  To be called by every rank together.

        ``samples_per_s`` over all ranks; ``data_wait`` in [0, 1] of the rank that waits longest for data: the share of
        the time in which its device had no step to compute because a batch was not there.  On several ranks also
        ``slowest_rank``, ``slowest_rank_s`` and ``other_ranks_s``: seconds a step of its own, its wait for data
        included, and the median of those of the others.  say: prints a line about a straggler, now and then.
        lost: passed on from rank 0 to all.
        """
        spent, steps = time.perf_counter() - self._since, max(1, self.steps)
        every = distributed.gather_objects((self._waits.late_s(), max(0.0, self._own), lost))
        self.lost = every[0][2]
        numbers = {
            "samples_per_s": self.steps * self._batch_size / spent,
            "data_wait": min(1.0, max(loading for loading, _, _ in every) / spent),
        }
        if len(every) > 1:
            own = [(loading + computing) / steps for loading, computing, _ in every]
            slowest = max(range(len(own)), key=own.__getitem__)
            others = statistics.median_low(own[:slowest] + own[slowest + 1 :])
            numbers |= {"slowest_rank": slowest, "slowest_rank_s": own[slowest], "other_ranks_s": others}
            if self._persists(slowest, own[slowest], others, spent, spent / steps):
                say(self._remark(slowest, own[slowest], others, every[slowest][0] / steps))
        self.restart()
        return numbers

    def _persists(self, rank: int, own_s: float, others_s: float, spent_s: float, step_s: float) -> bool:
        """Whether a rank has kept the others waiting for a while, and it is time to say so."""
        is_slow = own_s > RATIO * others_s and own_s - others_s > SHARE * step_s
        before_s = self._streak[1] if self._streak[0] == rank else 0.0
        self._streak = (rank, before_s + spent_s if is_slow else 0.0)
        now = time.monotonic()
        if self._streak[1] < NAMED_AFTER_S or now < self._named.get(rank, -AGAIN_AFTER_S) + AGAIN_AFTER_S:
            return False
        self._named[rank] = now
        return True

    def _remark(self, rank: int, own_s: float, others_s: float, loading_s: float) -> str:
        cause = "little of it waiting for data: see what else runs on that machine"
        if loading_s > (own_s - others_s) / 2:
            cause = f"{loading_s:.3g} s of it waiting for data: its disk is slow, or --data.threads too few"
        return (
            f"rank {rank} on {self._hosts[rank]} keeps the others waiting: its own part of a step takes {own_s:.3g} s, "
            f"theirs {others_s:.3g} s; {cause}"
        )


def watch_waits(model: nn.Module) -> None:
    """Count as waiting for other ranks what DDP does of it: for the others' gradients.

    Does nothing to a module that is not in DDP, nor to any number.
    """
    if parallel.unwrap(model) is model:
        return

    def after_forward(_: nn.Module, __: Any, step: Any) -> None:
        if step.loss.requires_grad:
            step.loss.register_hook(backward_begins)

    def backward_begins(_: torch.Tensor) -> None:
        queue(own_gradients_done)  # before DDP's, which waits for all buckets: they are called in turn

    def own_gradients_done() -> None:
        began = time.perf_counter()
        queue(lambda: stopwatch.add_blocked(time.perf_counter() - began))

    queue: Callable[[Callable[[], None]], None] = vars(torch.autograd.Variable)["_execution_engine"].queue_callback
    model.register_forward_hook(after_forward)
