"""Get a step's batches.  If a stop signal comes while there is no data, the ranks stop before the step."""

from collections.abc import Callable
from functools import partial

from sslx import distributed
from sslx.console import activity
from sslx.data import Loader
from sslx.data.batch import Batch
from sslx.data.waiting import StopWaiting
from sslx.train.signals import StopSignals
from sslx.train.stop_flag import StopFlag

GRACE_S = 5.0
"""Seconds that late data gets once a run with several ranks is to stop: a rank with data may already be in the step."""
OFFER_S = 2.0
"""Seconds within which the other ranks' offers to stop arrive, if they make them."""


def watch_for_stop(loader: Loader, stop: StopSignals, agreement: StopFlag, say: Callable[[str], None]) -> None:
    """Let a stop signal end the loader's waits if all ranks wait, and let ``say`` print what they wait for."""
    grace_s = 0.0 if distributed.world_size() == 1 else GRACE_S
    loader.listen(partial(_should_leave, stop, agreement, grace_s), say)


def _should_leave(stop: StopSignals, agreement: StopFlag, grace_s: float, waited_s: float) -> bool:
    return bool(stop.received) and waited_s >= grace_s and agreement.all_offer_to_stop(stop.received)


@activity.doing("waiting for images")
def next_batches(loader: Loader, num_batches: int, agreement: StopFlag) -> list[Batch]:
    """Return the micro-batches of a step, or [] and leave the loader as it was if all ranks stop before the step."""
    delivered = loader.delivered
    try:
        batches = [next(loader) for _ in range(num_batches)]
    except StopWaiting:
        batches = []
    if batches and agreement.has_offered and agreement.all_offer_to_stop(0, OFFER_S):
        batches = []
    if not batches:
        loader.back_to(delivered)
    return batches
