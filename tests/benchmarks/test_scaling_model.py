"""The cost model of collectives, on numbers worked out by hand."""

import pytest
from scaling_model import H200, Collective, Network, grown, seconds, step

SLOW = Network(gpus=4, within=100.0, between=40.0, ring=(1.0, 0.5, 2.0), tree=(1.0, 50.0, 100.0))
"""Bytes a second and seconds that can be worked out in the head; its trees never win."""


def test_a_ring_within_a_node() -> None:
    gather = Collective("_allgather_base_", 1, 400.0)
    assert seconds(gather, 4, SLOW) == 1.0 + 3 * 0.5 + 3 / 4 * 400 / 100
    reduce = Collective("allreduce_", 2, 400.0)
    assert seconds(reduce, 4, SLOW) == 2 * (1.0 + 6 * 0.5 + 2 * 3 / 4 * 400 / 100)


def test_a_ring_over_nodes_takes_their_cards_and_one_slow_hop_a_node() -> None:
    gather = Collective("_allgather_base_", 1, 800.0)
    assert seconds(gather, 8, SLOW) == 1.0 + (6 * 0.5 + 1 * 2.0) + 7 / 8 * 800 / 40


def test_small_reductions_climb_a_tree_on_many_nodes() -> None:
    small = Collective("allreduce_", 1, 8.0)
    tree = 4.4e-6 + 2 * (7 * 0.52e-6 + 9 * 5.0e-6) + 2 * 8 / 400e9
    assert seconds(small, 4096, H200) == pytest.approx(tree)
    ring = 8.4e-6 + 2 * (4096 - 512) * 3.4e-6 + 2 * 511 * 9.6e-6
    assert ring > 100 * tree


def test_one_rank_sends_nothing_and_a_step_is_between_hidden_and_not() -> None:
    reduce = Collective("allreduce_", 1, 400.0)
    assert step(3.0, [reduce], 1, SLOW) == (3.0, 3.0)
    spent = seconds(reduce, 4, SLOW)
    assert step(3.0, [reduce], 4, SLOW) == (max(3.0, spent), 3.0 + spent)


def test_what_is_gathered_grows_with_the_ranks_and_gradients_do_not() -> None:
    kinds = [Collective("allreduce_", 1, 100.0), Collective("_allgather_base_", 2, 100.0)]
    assert [c.nbytes for c in grown(kinds, 2, 8)] == [100.0, 400.0]
