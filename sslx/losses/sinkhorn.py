"""Sinkhorn-Knopp over the samples of all ranks: soft assignments that use all prototypes equally (arXiv 2006.09882)."""

import torch
from torch import Tensor

from sslx import distributed
from sslx.distributed import Group

MIN_EPSILON = 0.02
"""With this minimum, exp(s / epsilon) of cosines is within e^-50 and e^50, so that its sum over a batch fits fp32."""


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    epsilon: float = 0.05,
    steps: int = 3,
    queue: Tensor | None = None,
    queue_weight: float | Tensor = 1.0,
    group: Group = None,
) -> Tensor:
    """Return the codes of samples by algorithm 1, starting from exp(scores / epsilon) (arXiv 2006.09882, 3.1 and A.1).

    Each step scales the columns, so that all prototypes get the same share of the samples of all ranks, and then the
    rows, so that each sums to 1.  Algorithm 1's factors 1/K and 1/B are left out, because scaling the rows undoes them.
    After each step a row is the softmax of scores / epsilon minus a number for each prototype.  So only the first sum,
    before any softmax, could leave the range of fp32, which that of cosines does not.

    scores: (..., B, K), in [-1, 1], of this rank's B samples against K prototypes, any float dtype; leading axes are
      independent problems.  Computed in fp32 (fp64 for fp64), in autocast too.
    epsilon: temperature, 0.02 or more; the smaller it is, the closer each code is to a single prototype.
    steps: number of steps, at least 1.
    queue: (..., L, K), scores of further samples, different ones on each rank.  They share the prototypes, but their
      codes are not returned.
    queue_weight: the weight of each sample of the queue, a number or (); with 0 the codes equal those without a queue.
    group: the ranks whose samples share the prototypes; None for all.  They may have unequal numbers of samples.
    Returns (..., B, K), without gradient, whose rows sum to 1.  Ranks only exchange sums over samples, (..., K).
    Raises ValueError for invalid shapes, dtypes, epsilon or steps.
    """
    if scores.ndim < 2 or 0 in scores.shape or not scores.is_floating_point():
        raise ValueError(f"expected scores (..., B, K) of floats, got {tuple(scores.shape)} {scores.dtype}")
    queue = scores[..., :0, :] if queue is None else queue
    if queue.ndim != scores.ndim or (*queue.shape[:-2], queue.shape[-1]) != (*scores.shape[:-2], scores.shape[-1]):
        raise ValueError(f"expected a queue (..., L, K) for scores {tuple(scores.shape)}, got {tuple(queue.shape)}")
    if not epsilon >= MIN_EPSILON or steps < 1:
        raise ValueError(f"expected epsilon >= {MIN_EPSILON} and steps >= 1, got {epsilon} and {steps}")
    num_samples = scores.shape[-2]
    logits = torch.cat([scores, queue], dim=-2).to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    mass = logits.exp()
    for _ in range(steps):
        total = mass[..., :num_samples, :].sum(-2) + queue_weight * mass[..., num_samples:, :].sum(-2)
        logits = logits - distributed.sum_over_ranks(total, group).log().unsqueeze(-2)
        mass = logits.softmax(-1)
    return mass[..., :num_samples, :]
