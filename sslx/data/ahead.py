"""What the host prepares for batches, prepared in a thread before it is asked for: training never waits for it."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

import torch

T = TypeVar("T")
DEPTH = 3
"""Results that are ready, or being made, before they are asked for."""


def ahead(make: Callable[[int], T | None], start: int, device: torch.device) -> Generator[T]:
    """Yield ``make(start)``, ``make(start + 1)``, ..., up to the first None, made by a thread in this order.

    What ``make`` raises is raised in its result's place.  It must not wait for anything: closing waits for it.  device:
    the thread's; without it, pinned memory would belong to the first GPU.
    """
    thread = ThreadPoolExecutor(1, "ahead", initializer=_settle, initargs=(device,))
    try:
        results = deque(thread.submit(make, t) for t in range(start, start + DEPTH))
        for t in count(start + DEPTH):
            result = results.popleft().result()
            if result is None:
                return
            results.append(thread.submit(make, t))
            yield result
    finally:
        thread.shutdown(cancel_futures=True)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
