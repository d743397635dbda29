"""A step's batches, or none where a stop signal comes while there is no data: the ranks then stop before the step."""

from collections.abc import Callable
from functools import partial

from sslx import distributed
from sslx.console import activity
from sslx.data import Loader
from sslx.data.batch import Batch
from sslx.data.patience import StopWaiting
from sslx.train.signals import StopSignals
from sslx.train.stop_flag import StopFlag

GRACE_S = 5.0
"""For data that is late, once a run of several ranks is to stop: a rank that has its data is in the step already."""
OFFER_S = 2.0
"""In which the other ranks' offers to stop come, where they come."""


def listen(loader: Loader, stop: StopSignals, agreement: StopFlag, say: Callable[[str], None]) -> None:
    """Let the loader's waits end by a stop signal, where all ranks wait, and say what they wait for."""
    grace_s = 0.0 if distributed.world_size() == 1 else GRACE_S
    loader.listen(partial(_leaves, stop, agreement, grace_s), say)


def _leaves(stop: StopSignals, agreement: StopFlag, grace_s: float, waited_s: float) -> bool:
    return bool(stop.received) and waited_s >= grace_s and agreement.all_leave(stop.received)


@activity.doing("waiting for images")
def take(loader: Loader, number: int, agreement: StopFlag) -> list[Batch]:
    """The micro-batches of a step; none, and the loader as it was, where all ranks stop before it."""
    taken = loader.delivered
    try:
        batches = [next(loader) for _ in range(number)]
    except StopWaiting:
        batches = []
    if batches and agreement.has_offered and agreement.all_leave(0, OFFER_S):
        batches = []
    if not batches:
        loader.back_to(taken)
    return batches
