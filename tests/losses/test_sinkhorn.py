"""Sinkhorn-Knopp against the paper's matrix entry by entry, on 1 to 3 ranks, with and without a queue."""

import math
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from kit.full_batch import RunOnRanks, over_ranks
from sslx import distributed
from sslx.losses import sinkhorn
from sslx.losses.sinkhorn import MIN_EPSILON


def by_loops(scores: list[list[float]], epsilon: float, steps: int) -> list[list[float]]:
    """Algorithm 1 with its K x B matrix that sums to 1: prototypes to 1/K each, then samples to 1/B each."""
    num, k = len(scores), len(scores[0])
    q = [[math.exp(scores[b][j] / epsilon) for b in range(num)] for j in range(k)]
    whole = sum(map(sum, q))
    q = [[x / whole for x in row] for row in q]
    for _ in range(steps):
        for j in range(k):
            total = sum(q[j])
            q[j] = [x / total / k for x in q[j]]
        for b in range(num):
            total = sum(q[j][b] for j in range(k))
            for j in range(k):
                q[j][b] /= total * num
    return [[q[j][b] * num for j in range(k)] for b in range(num)]


def cosines(*shape: int, generator: torch.Generator) -> Tensor:
    """Numbers in [-1, 1] of which some prototypes get more than others: (*shape,) in fp64."""
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + torch.linspace(-2, 2, shape[-1])).tanh()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_the_codes_are_the_papers(steps: int, epsilon: float, generator: torch.Generator):
    scores = cosines(9, 5, generator=generator)
    expected = torch.tensor(by_loops(scores.tolist(), epsilon, steps), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(scores, epsilon, steps), expected, rtol=1e-12, atol=1e-14)


def test_in_the_end_samples_and_prototypes_are_shared_out_equally(generator: torch.Generator):
    scores = cosines(12, 4, generator=generator)
    few, many = sinkhorn(scores, 0.2), sinkhorn(scores, 0.2, 2000)
    for codes in (few, many):
        torch.testing.assert_close(codes.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(many.sum(0), torch.full((4,), 3.0, dtype=torch.float64), rtol=1e-8, atol=0)
    assert (scores / 0.2).softmax(1).sum(0).max() > 4, "already equal: the test shows nothing"


def share_of(scores: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's codes, of its share of the samples (larger on some ranks), and beside its share of a queue."""
    own, past = (x.tensor_split(distributed.world_size())[distributed.rank()] for x in (scores, queue))
    return sinkhorn(own, 0.1), sinkhorn(own, 0.1, queue=past)


@over_ranks
def test_ranks_give_the_codes_of_the_whole_batch(world_size: int, ranks: RunOnRanks, generator: torch.Generator):
    scores, queue = cosines(11, 5, generator=generator), cosines(7, 5, generator=generator)
    found = ranks(world_size, share_of, scores, queue)
    for part, rows in enumerate([scores, torch.cat([queue, scores])]):
        codes = torch.cat([each[part] for each in found])
        expected = torch.tensor(by_loops(rows.tolist(), 0.1, 3)[-11:], dtype=torch.float64)
        torch.testing.assert_close(codes, expected, rtol=1e-10, atol=1e-12)
    alone = torch.cat([sinkhorn(share, 0.1) for share in scores.tensor_split(3)])
    assert (alone - sinkhorn(scores, 0.1)).abs().max() > 1e-3, "ranks alone would do as well: the test shows nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_queue_of_weight_0_is_exactly_none(dtype: torch.dtype, generator: torch.Generator):
    scores, queue = cosines(37, 19, generator=generator).to(dtype), cosines(53, 19, generator=generator).to(dtype)
    without = sinkhorn(scores)
    assert torch.equal(sinkhorn(scores, queue=queue, queue_weight=torch.zeros((), dtype=dtype)), without)
    assert torch.equal(sinkhorn(scores, queue=queue[:0]), without)
    assert (sinkhorn(scores, queue=queue) - without).abs().max() > 1e-3


def test_leading_axes_are_problems_of_their_own(generator: torch.Generator):
    scores, queue = cosines(2, 8, 5, generator=generator), cosines(2, 6, 5, generator=generator)
    each = [sinkhorn(s, queue=q) for s, q in zip(scores, queue, strict=True)]
    torch.testing.assert_close(sinkhorn(scores, queue=queue), torch.stack(each), rtol=1e-12, atol=0)


@pytest.mark.parametrize("epsilon", [0.05, MIN_EPSILON])
def test_fp32_holds_scores_of_plus_and_minus_one(epsilon: float, generator: torch.Generator):
    """A prototype far from all samples, one near all of them, and samples of either side."""
    scores = torch.randint(0, 2, (64, 6), generator=generator).double() * 2 - 1
    scores[:, 0], scores[:, 1] = -1, 1
    codes = sinkhorn(scores.float(), epsilon)
    assert codes.dtype == torch.float32
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.double(), sinkhorn(scores, epsilon), rtol=1e-3, atol=1e-5)


def test_half_precision_is_computed_in_fp32(generator: torch.Generator):
    scores = cosines(9, 5, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn(scores), sinkhorn(scores.float()))


def test_codes_have_no_gradient_and_the_device_is_not_waited_for(
    no_host_sync: AbstractContextManager[object], generator: torch.Generator
):
    scores = cosines(9, 5, generator=generator).requires_grad_()
    with no_host_sync:
        codes = sinkhorn(scores, queue=scores.detach(), queue_weight=torch.ones(()))
    assert not codes.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": torch.ones(4)}, r"scores \(..., B, K\) of floats, got \(4,\)"),
        ({"scores": torch.ones(0, 3)}, r"got \(0, 3\)"),
        ({"scores": torch.ones(4, 3, dtype=torch.int64)}, r"floats, got \(4, 3\) torch.int64"),
        ({"queue": torch.ones(2, 2)}, r"queue \(..., L, K\) for scores \(4, 3\), got \(2, 2\)"),
        ({"queue": torch.ones(2, 2, 3)}, r"got \(2, 2, 3\)"),
        ({"epsilon": 0.01}, r"epsilon >= 0.02 and steps >= 1, got 0.01 and 3"),
        ({"epsilon": math.nan}, r"got nan and 3"),
        ({"steps": 0}, r"got 0.05 and 0"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as raised:
        sinkhorn(**{"scores": torch.ones(4, 3), **arguments})
    assert "\n" not in str(raised.value)
