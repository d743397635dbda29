"""The time that this process has waited for other ranks, as far as its host can see."""

import functools
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_blocked_s = 0.0


def blocked_s() -> float:
    """Return the seconds spent waiting for other ranks so far.  Only the difference of two calls is meaningful."""
    return _blocked_s


def add_blocked(seconds: float) -> None:
    """Add a wait to the total."""
    global _blocked_s
    _blocked_s += seconds


def blocking(collective: Callable[P, T]) -> Callable[P, T]:
    """Decorate a collective so that its time counts as waiting for other ranks."""

    @functools.wraps(collective)
    def timed(*args: P.args, **kwargs: P.kwargs) -> T:
        start = time.perf_counter()
        try:
            return collective(*args, **kwargs)
        finally:
            add_blocked(time.perf_counter() - start)

    return timed
