"""Sinkhorn-Knopp over the samples of all ranks: soft assignments that use all prototypes alike (arXiv 2006.09882)."""

import torch
from torch import Tensor

from sslx import distributed
from sslx.distributed import Group

MIN_EPSILON = 0.02
"""With it exp(s / epsilon) of cosines is within e^-50 and e^50, whose sums over any batch fp32 holds."""


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    epsilon: float = 0.05,
    steps: int = 3,
    queue: Tensor | None = None,
    queue_weight: float | Tensor = 1.0,
    group: Group = None,
) -> Tensor:
    """The codes of samples: what the steps of algorithm 1 make of exp(scores / epsilon) (2006.09882, 3.1 and A.1).

    Each step scales the columns so that all prototypes get the same share of the samples of all ranks, then the rows,
    so that each sample is one.  Algorithm 1's factors 1/K and 1/B are left out: the rows' scaling undoes them.  So
    after each step a row is a softmax of scores / epsilon less a number for each prototype, and only the first sum,
    before any softmax, could leave fp32's range, where that of cosines does not.

    scores: (..., B, K), in [-1, 1], of this rank's B samples against K prototypes, any float dtype; leading axes are
      problems of their own, solved at once.  Computed in fp32 (fp64 for fp64), in autocast too.
    epsilon: temperature, 0.02 or more; the smaller, the closer the codes are to one prototype a sample.
    steps: number of steps, at least 1.
    queue: (..., L, K), scores of further samples, which no other rank brings: they share the prototypes, but their
      codes are not returned.
    queue_weight: how much each of them counts, a number or (); with 0 the codes are exactly those without a queue.
    group: the ranks whose samples share the prototypes; None for all.  They may have unequal numbers of samples.
    Returns (..., B, K): rows sum to 1, without gradient.  Between ranks only sums over samples travel, (..., K).
    Raises ValueError for shapes, dtypes, an epsilon and steps that do not fit.
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
