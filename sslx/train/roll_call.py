"""Who is late: every rank says once a second where it stands, so that those who wait for another can name it."""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from sslx import distributed
from sslx.machine.joining import Board

WARN_S = 60.0
"""A step that takes so long, and three times the longest before, is spoken of once."""
_WAITS = ("torch/distributed/", "torch/nn/parallel/", "torch/autograd/graph.py", "sslx/distributed.py")
"""Where the main thread stands that waits for other ranks."""


class RollCall:
    """Where all ranks stand, while it is entered; without a board only where this one stands.

    A thread writes this rank's place to the board and, where its own step takes long, reads the others': rank 0 all of
    them, the others rank 0's.  It costs the training thread nothing.
    last_step: of this rank, asked by the thread.  say: prints a line.  warn_s: see WARN_S.
    on_deadlock: called on rank 0, with which ranks, where a step has taken as long as that and all ranks wait for one
    another in different collectives: it will never end.
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
        self._beat_s = max(1.0, board.world_size / 200) if board else 1.0  # a thousand ranks ask one store
        self._step = self._first = -1
        self._longest_s, self._step_s = 0.0, time.monotonic()
        self._places: dict[int, dict[str, Any]] = {}  # of other ranks, the last that was read,
        self._changed: dict[int, float] = {}  # and when it was first seen
        self._asked: float | None = None  # since when the store has not answered
        self._count = 0
        self._left = threading.Event()
        self._told = -1
        self._apart: dict[int, int | str] = {}  # where each rank waits, while they wait for different things
        self.on_deadlock: Callable[[str], None] = lambda _: None

    def __enter__(self) -> Self:
        self._main = threading.get_ident()
        threading.Thread(target=self._run, daemon=True, name="roll call").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()

    def stuck_s(self) -> float:
        """Seconds since the last step ended."""
        return time.monotonic() - self._step_s

    def late(self) -> str:
        """The ranks that the others wait for, by number and machine, as the subject of a sentence with its verb.

        "" where that is not known, and on all but rank 0 while rank 0 answers, which knows more.
        """
        if not self._board:
            return ""
        if self._asked and time.monotonic() - self._asked > 3 * self._beat_s:
            return f"{self._name([0])} does not answer (stopped or gone)"
        if silent := self._silent():
            return f"{self._name(silent)} do{'es' * (len(silent) == 1)} not answer (stopped or gone)"
        if self._board.rank or not self._places:
            return ""
        places = {**self._places, 0: self._own()}
        order = {rank: (place["step"], not place["waits"]) for rank, place in places.items()}
        first_step = min(step for step, _ in order.values())
        behind = [rank for rank, (step, _) in order.items() if step == first_step]
        busy = [rank for rank in behind if not places[rank]["waits"]]
        behind = busy or behind
        if len(behind) == self._board.world_size:
            return self._at_another_collective(self._waits_apart())
        at = places[behind[0]]["at"]
        where = f" (at {at})" if len(behind) == 1 and at != "?" else ""
        return f"{self._name(sorted(behind))}{where} {'is' if len(behind) == 1 else 'are'} behind the others"

    def _waits_apart(self) -> dict[int, int | str]:
        """Of every rank where it waits, if all wait and not all for the same; else empty.

        By the number of collectives that each has begun; where that is the same, by the place in the code.
        """
        places = {0: self._own(), **self._places}
        if all(place["waits"] for place in places.values()) and not self._silent():
            for what in ("collectives", "at"):
                found = {rank: place[what] for rank, place in places.items()}
                if len(set(found.values())) > 1:
                    return found
        return {}

    def _at_another_collective(self, apart: dict[int, int | str]) -> str:
        if not apart:
            return ""
        common = max(apart.values(), key=list(apart.values()).count)  # of two ranks, rank 0's
        odd = sorted(rank for rank, where in apart.items() if where != common)
        theirs = apart[odd[0]]
        if isinstance(theirs, str):
            where = f"wait{'s' * (len(odd) == 1)} at {theirs} where others wait at {common}"
            return f"{self._name(odd)} {where}, so all wait for one another"
        where = f"has begun {theirs:,} collectives where others have begun {common:,}"
        return f"{self._name(odd)} {where}, so all wait for one another"

    def _silent(self) -> list[int]:
        """The ranks that have not written for some beats."""
        now = time.monotonic()
        return [rank for rank, since in self._changed.items() if now - since > 3 * self._beat_s]

    def leads(self) -> bool:
        """Whether this rank speaks for all: rank 0 does, else those who find rank 0 silent or not told to stop."""
        if not self._board or self._board.rank == 0:
            return True
        return "rank 0" in self.late() or not self._places.get(0, {}).get("stopping")

    def _name(self, ranks: list[int]) -> str:
        assert self._board
        hosts = list(dict.fromkeys(self._board.hosts[rank] for rank in ranks))
        numbers = ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)
        return f"rank{'s' * (len(ranks) > 1)} {numbers} on {', '.join(hosts[:4])}{', ...' * (len(hosts) > 4)}"

    def _own(self) -> dict[str, Any]:
        stack = self._stack() if self.stuck_s() > self._beat_s else []
        waits = bool(stack) and any(part in stack[0].f_code.co_filename for part in _WAITS)
        own = [frame for frame in stack if "/sslx/" in frame.f_code.co_filename] or stack
        at = f"{Path(own[0].f_code.co_filename).name}:{own[0].f_lineno}" if own else "?"
        collectives = distributed.num_collectives()
        return {"step": self._step, "waits": waits, "at": at, "stopping": self.stopping, "collectives": collectives}

    def _stack(self) -> list[FrameType]:
        """The frames of the main thread, innermost first."""
        frame: FrameType | None = vars(sys)["_current_frames"]().get(self._main)
        frames: list[FrameType] = []
        while frame:
            frames.append(frame)
            frame = frame.f_back
        return frames

    def _run(self) -> None:
        while not self._left.wait(self._beat_s):
            self._note_step()
            if self._board:
                self._asked = time.monotonic()
                try:
                    self._exchange(self._board)
                except ConnectionError:
                    continue  # so it is still asked
                self._asked = None
            self._warn()

    def _note_step(self) -> None:
        step, now = self._last_step(), time.monotonic()
        if step != self._step:
            if self._step > self._first:  # the start and the first step are no measure
                self._longest_s = max(self._longest_s, now - self._step_s)
            self._first = step if self._first < 0 else self._first
            self._step, self._step_s = step, now

    def _exchange(self, board: Board) -> None:
        self._count += 1
        board.write(json.dumps({"count": self._count, **self._own()}))
        if self.stuck_s() > 1.5 * self._beat_s:
            others = range(1, board.world_size) if board.rank == 0 else range(1)
            self._take_note(others, board.read(others))
        else:
            self._places, self._changed = {}, {}

    def _take_note(self, ranks: range, lines: list[str]) -> None:
        now = time.monotonic()
        for rank, line in zip(ranks, lines, strict=True):
            place = json.loads(line or "{}")
            if rank not in self._changed or place != self._places.get(rank):
                self._changed[rank] = now
            self._places[rank] = {"step": 0, "waits": False, "at": "?", "collectives": 0} | place

    def _warn(self) -> None:
        if self._say is None or self.stuck_s() < max(self._warn_s, 3 * self._longest_s):
            return
        apart, before = self._waits_apart() if self._board and self._places else {}, self._apart
        self._apart = apart
        if apart and apart == before:
            self.on_deadlock(self._at_another_collective(apart))
        if self._step == self._told:
            return
        late = self.late()
        if not late and self._step <= self._first:  # which may take long: files are listed, code is compiled
            return
        self._told = self._step
        late = f": {late}" if late else ": no rank is behind another" if self._board else ""
        self._say(f"step {self._step + 1:,} has not ended for {self.stuck_s():.0f} s{late}")
