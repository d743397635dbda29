"""Ranks agree on stopping before a step that has no data, on real gloo ranks."""

import time

from kit.full_batch import RunOnRanks
from sslx import distributed
from sslx.train.stop_flag import StopFlag

SIGTERM = 15


def all_wait() -> tuple[bool, int]:
    """Two steps, then no rank has data, and only rank 1 was told to stop."""
    flag = StopFlag()
    for _ in range(2):
        flag.exchange(0)
    mine = SIGTERM if distributed.rank() == 1 else 0
    return flag.all_offer_to_stop(mine, after_s=60), flag.receive()


def one_is_in_the_step() -> tuple[list[bool], list[int]]:
    """Rank 0 makes the step for which rank 1 has no data yet; then both go on to a second one."""
    flag, left, agreed = StopFlag(), list[bool](), list[int]()
    flag.exchange(0)
    if distributed.rank() == 1:
        left.append(flag.all_offer_to_stop(SIGTERM))  # at once: rank 0 cannot have answered with an offer
    agreed.append(flag.exchange(0))  # the end of the step
    if distributed.rank() == 0:
        time.sleep(0.1)
    agreed += [flag.exchange(0), flag.exchange(0)]
    return left, agreed


def test_ranks_without_data_leave_together(ranks: RunOnRanks) -> None:
    for number in (2, 3):
        assert ranks(number, all_wait) == [(True, SIGTERM)] * number


def test_a_rank_in_the_step_is_not_left_alone(ranks: RunOnRanks) -> None:
    assert ranks(2, one_is_in_the_step) == [([], [0, SIGTERM, 0]), ([False], [0, SIGTERM, 0])]


def test_a_rank_alone_leaves_at_once() -> None:
    flag = StopFlag()
    assert flag.all_offer_to_stop(SIGTERM)
    assert flag.receive() == SIGTERM
