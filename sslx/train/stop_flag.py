"""Agreement of all ranks on when to stop: between two steps, or before a step that has no data."""

import time
from typing import Any

import torch

from sslx import distributed
from sslx.machine.stopwatch import blocking


class StopFlag:
    """Agreement on when to stop: all ranks learn the largest flag at the same step, one step late.

    The flags are exchanged over the hosts while the next step runs, so that no step waits for the slowest rank.  A
    rank without data for the next step may offer to stop before it (``all_offer_to_stop``), which takes effect once
    all ranks have offered it.
    """

    def __init__(self, group: distributed.Group = None) -> None:
        self._group = group
        self._flags = torch.zeros(2, dtype=torch.int64)  # the signal, and 1 if any rank makes the next step
        self._work: Any = None
        self._previous: int | None = None  # the last step's flag, once this rank has offered to stop before the next

    def exchange(self, flag: int) -> int:
        """Send this step's flag (0 to continue) and return the largest flag of the previous call, 0 at first.

        Every rank calls this once per step.  A single rank gets its own flag back immediately.
        """
        if distributed.world_size(self._group) == 1:
            return flag
        if self._previous is not None:  # this step's flag has already been sent
            previous, self._previous = self._previous, None
            return previous
        previous = self.receive()
        self._send(flag, 1)
        return previous

    def _send(self, flag: int, continues: int) -> None:
        self._flags = torch.tensor([flag, continues])
        self._work = distributed.start_max(self._flags, self._group)

    def all_offer_to_stop(self, flag: int, after_s: float = 0.0) -> bool:
        """Offer to stop before the next step, for lack of data.  Return whether all ranks offer it, within after_s.

        Call it again while there is no data, and also, with some wait_policy, if data comes after all: True then means
        that the others have left.  ``receive`` returns the signal.
        """
        if distributed.world_size(self._group) == 1:
            self._flags = torch.tensor([flag, 0])
            return True
        if self._previous is None:
            self._previous = self.receive()
            self._send(flag, 0)
        assert self._work is not None
        deadline = time.monotonic() + after_s
        while not (is_complete := self._work.is_completed()) and time.monotonic() < deadline:
            time.sleep(0.01)
        flags: list[int] = self._flags.tolist()
        return is_complete and flags[1] == 0

    @property
    def has_offered(self) -> bool:
        """Whether this rank has offered to stop before its next step."""
        return self._previous is not None

    @blocking
    def receive(self) -> int:
        """Wait for flags in flight, if there are any, and return the largest of the last call's (0 to continue)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        flags: list[int] = self._flags.tolist()
        return flags[0]
