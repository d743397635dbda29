"""Prepare batches in a thread ahead of time, so that training does not wait for the host's part of them."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

import torch

T = TypeVar("T")
DEPTH = 3
"""Number of results that are made ahead of time."""


def ahead(make: Callable[[int], T | None], start: int, device: torch.device) -> Generator[T]:
    """Yield ``make(start)``, ``make(start + 1)``, ..., up to the first None, made by a thread in this order.

    An exception of ``make`` is raised in its result's place.  ``make`` must not wait for anything, because closing the
    generator waits for ``make``.  device: the thread's device; without it, pinned memory would belong to the first GPU.
    """
    thread = ThreadPoolExecutor(1, "ahead", initializer=_set_device, initargs=(device,))
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


def _set_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
