"""Agreement of all ranks on when to stop: between two steps, or before one that has no data."""

import time
from typing import Any

import torch

from sslx import distributed
from sslx.machine.stopwatch import blocking


class StopFlag:
    """Agreement on when to stop: all ranks learn the largest flag at the same step, one step late.

    The flags travel over the hosts while the next step runs, so no step waits for the slowest rank.  A rank without
    data for the next step may offer to stop before it (``all_leave``), which holds once all ranks have offered it.
    """

    def __init__(self, group: distributed.Group = None) -> None:
        self._group = group
        self._flags = torch.zeros(2, dtype=torch.int64)  # the signal, and 1 where some rank makes the next step
        self._work: Any = None
        self._before: int | None = None  # the last step's flag, once this rank has offered to stop before the next

    def agreed(self, mine: int) -> int:
        """Send this step's flag (0: go on); returns the largest of the previous call's flags, 0 at first.

        To be called once a step by every rank.  One rank alone gets its own flag back at once.
        """
        if distributed.world_size(self._group) == 1:
            return mine
        if self._before is not None:  # this step's flag is on its way already
            previous, self._before = self._before, None
            return previous
        previous = self.finish()
        self._send(mine, 1)
        return previous

    def _send(self, mine: int, goes_on: int) -> None:
        self._flags = torch.tensor([mine, goes_on])
        self._work = distributed.start_max(self._flags, self._group)

    def all_leave(self, mine: int, patience_s: float = 0.0) -> bool:
        """Offer to stop before the next step, for lack of data; whether all ranks offer it.  Waits ``patience_s``.

        To be asked again while there is no data, and, with some patience, when there is after all: True may then mean
        that the others have left.  ``finish`` tells the signal.
        """
        if distributed.world_size(self._group) == 1:
            self._flags = torch.tensor([mine, 0])
            return True
        if self._before is None:
            self._before = self.finish()
            self._send(mine, 0)
        assert self._work is not None
        deadline = time.monotonic() + patience_s
        while not (ended := self._work.is_completed()) and time.monotonic() < deadline:
            time.sleep(0.01)
        flags: list[int] = self._flags.tolist()
        return ended and flags[1] == 0

    @property
    def has_offered(self) -> bool:
        """Whether this rank has offered to stop before its next step."""
        return self._before is not None

    @blocking
    def finish(self) -> int:
        """Wait for the flags on their way, if any, and return the largest of the last call's (0: none)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        flags: list[int] = self._flags.tolist()
        return flags[0]
