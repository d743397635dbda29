"""Find out which rank is late: every rank regularly reports where it is, so that those that wait can name it."""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from sslx import distributed
from sslx.console.words import first_of
from sslx.machine.rendezvous import Board

WARN_S = 60.0
"""A step that takes this long, and three times as long as the longest before, is reported once."""
_WAITS = ("torch/distributed/", "torch/nn/parallel/", "torch/autograd/graph.py", "sslx/distributed.py")
"""Files in which the main thread is while it waits for other ranks."""


class LateRanks:
    """Where all ranks are, inside a ``with`` block; without a board, only where this one is.

    A thread writes this rank's place to the board.  If this rank's step takes long, the thread also reads other
    places: rank 0 reads all, and the others read rank 0's.  This costs the training thread nothing.

    last_step: returns this rank's last step; called by the thread.  say: prints a line.  warn_s: see WARN_S.
    on_deadlock: called on rank 0, with a description of the ranks, if a step has taken that long and all ranks wait for
    one another in different collectives, so that it will never end.
    """

    def __init__(
        self,
        board: Board | None = None,
        last_step: Callable[[], int] = lambda: 0,
        say: Callable[[str], None] | None = None,
        warn_s: float = WARN_S,
    ):
        self.stopping = 0  # the signal that this rank has received
        self._board, self._last_step, self._say, self._warn_s = board, last_step, say, warn_s
        self._period_s = max(1.0, board.world_size / 200) if board else 1.0  # spares the store of a thousand ranks
        self._step = self._first = -1
        self._longest_s, self._step_s = 0.0, time.monotonic()
        self._places: dict[int, dict[str, Any]] = {}  # last known places of other ranks
        self._changed: dict[int, float] = {}  # when each was first seen
        self._unanswered_since: float | None = None  # when the pending request to the store was sent
        self._count = 0
        self._ended = threading.Event()
        self._reported_step = -1
        self._wait_places: dict[int, int | str] = {}  # where each rank waits, if they wait in different places
        self.on_deadlock: Callable[[str], None] = lambda _: None

    def __enter__(self) -> Self:
        self._main = threading.get_ident()
        threading.Thread(target=self._watch, daemon=True, name="late ranks").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def stuck_s(self) -> float:
        """Return the seconds since the last step ended."""
        return time.monotonic() - self._step_s

    def describe_late(self) -> str:
        """Describe the ranks that the others wait for, by number and machine, as a clause with subject and verb.

        Return "" if they are unknown, and on other ranks than 0 while rank 0 answers, because it knows more.
        """
        if not self._board:
            return ""
        if self._unanswered_since and time.monotonic() - self._unanswered_since > 3 * self._period_s:
            return f"{self._name([0])} does not answer (stopped or gone)"
        if silent := self._silent():
            verb = "does" if len(silent) == 1 else "do"
            return f"{self._name(silent)} {verb} not answer (stopped or gone)"
        if self._board.rank or not self._places:
            return ""
        places = {**self._places, 0: self._own_place()}
        order = {rank: (place["step"], not place["waits"]) for rank, place in places.items()}
        first_step = min(step for step, _ in order.values())
        behind = [rank for rank, (step, _) in order.items() if step == first_step]
        busy = [rank for rank in behind if not places[rank]["waits"]]
        behind = busy or behind
        if len(behind) == self._board.world_size:
            return self._describe_deadlock(self._different_waits())
        at = places[behind[0]]["at"]
        where = f" (at {at})" if len(behind) == 1 and at != "?" else ""
        return f"{self._name(sorted(behind))}{where} {'is' if len(behind) == 1 else 'are'} behind the others"

    def _different_waits(self) -> dict[int, int | str]:
        """Return where each rank waits if all wait, but not in the same collective; else {}.

        The place is the number of collectives that the rank has begun or, if that is equal, the line of code.
        """
        places = {0: self._own_place(), **self._places}
        if all(place["waits"] for place in places.values()) and not self._silent():
            for key in ("collectives", "at"):
                waits = {rank: place[key] for rank, place in places.items()}
                if len(set(waits.values())) > 1:
                    return waits
        return {}

    def _describe_deadlock(self, waits: dict[int, int | str]) -> str:
        if not waits:
            return ""
        common = max(waits.values(), key=list(waits.values()).count)  # rank 0's, if there are two ranks
        odd = sorted(rank for rank, place in waits.items() if place != common)
        odd_place = waits[odd[0]]
        if isinstance(odd_place, str):
            verb = "waits" if len(odd) == 1 else "wait"
            difference = f"{verb} at {odd_place} where others wait at {common}"
        else:
            verb = "has" if len(odd) == 1 else "have"
            difference = f"{verb} begun {odd_place:,} collectives where others have begun {common:,}"
        return f"{self._name(odd)} {difference}, so all wait for one another"

    def _silent(self) -> list[int]:
        """Return the ranks that have not written for several periods."""
        now = time.monotonic()
        return [rank for rank, since in self._changed.items() if now - since > 3 * self._period_s]

    def speaks_for_all(self) -> bool:
        """Return whether this rank reports for all: rank 0 does, else those that find it silent or not stopping."""
        if not self._board or self._board.rank == 0:
            return True
        return "rank 0" in self.describe_late() or not self._places.get(0, {}).get("stopping")

    def _name(self, ranks: list[int]) -> str:
        assert self._board
        hosts = list(dict.fromkeys(self._board.hosts[rank] for rank in ranks))
        noun = "rank" if len(ranks) == 1 else "ranks"
        return f"{noun} {first_of(ranks, 8)} on {first_of(hosts, 4)}"

    def _own_place(self) -> dict[str, Any]:
        stack = self._stack() if self.stuck_s() > self._period_s else []
        waits = bool(stack) and any(part in stack[0].f_code.co_filename for part in _WAITS)
        own = [frame for frame in stack if "/sslx/" in frame.f_code.co_filename] or stack
        at = f"{Path(own[0].f_code.co_filename).name}:{own[0].f_lineno}" if own else "?"
        collectives = distributed.num_collectives()
        return {"step": self._step, "waits": waits, "at": at, "stopping": self.stopping, "collectives": collectives}

    def _stack(self) -> list[FrameType]:
        """Return the frames of the main thread, innermost first."""
        frame: FrameType | None = vars(sys)["_current_frames"]().get(self._main)
        frames: list[FrameType] = []
        while frame:
            frames.append(frame)
            frame = frame.f_back
        return frames

    def _watch(self) -> None:
        while not self._ended.wait(self._period_s):
            self._note_step()
            if self._board:
                self._unanswered_since = time.monotonic()
                try:
                    self._exchange(self._board)
                except ConnectionError:
                    continue  # the request remains unanswered
                self._unanswered_since = None
            self._warn()

    def _note_step(self) -> None:
        step, now = self._last_step(), time.monotonic()
        if step != self._step:
            if self._step > self._first:  # the start and the first step are not representative
                self._longest_s = max(self._longest_s, now - self._step_s)
            self._first = step if self._first < 0 else self._first
            self._step, self._step_s = step, now

    def _exchange(self, board: Board) -> None:
        self._count += 1
        board.write(json.dumps({"count": self._count, **self._own_place()}))
        if self.stuck_s() > 1.5 * self._period_s:
            others = range(1, board.world_size) if board.rank == 0 else range(1)
            self._note_places(others, board.read(others))
        else:
            self._places, self._changed = {}, {}

    def _note_places(self, ranks: range, lines: list[str]) -> None:
        now = time.monotonic()
        for rank, line in zip(ranks, lines, strict=True):
            place = json.loads(line or "{}")
            if rank not in self._changed or place != self._places.get(rank):
                self._changed[rank] = now
            self._places[rank] = {"step": 0, "waits": False, "at": "?", "collectives": 0} | place

    def _warn(self) -> None:
        if self._say is None or self.stuck_s() < max(self._warn_s, 3 * self._longest_s):
            return
        waits, previous_waits = self._different_waits() if self._board and self._places else {}, self._wait_places
        self._wait_places = waits
        if waits and waits == previous_waits:
            self.on_deadlock(self._describe_deadlock(waits))
        if self._step == self._reported_step:
            return
        late = self.describe_late()
        if not late and self._step <= self._first:  # it may take long: files are listed and code is compiled
            return
        self._reported_step = self._step
        suffix = ""
        if late:
            suffix = f": {late}"
        elif self._board:
            suffix = ": no rank is behind the others"
        self._say(f"step {self._step + 1:,} has not ended for {self.stuck_s():.0f} s{suffix}")
