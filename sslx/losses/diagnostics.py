"""Diagnostics of embeddings and assignments, which methods log beside the loss."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """Return how far apart this rank's embeddings (B, D) point: (), fp32.

    It is the standard deviation of each dimension of the unit-length embeddings, averaged over dimensions, times
    sqrt(D): 1 if they are uniform on the sphere, 0 if they have collapsed to a point, nan for a single embedding.
    """
    unit = F.normalize(z.float(), dim=1)
    if len(unit) < 2:
        return unit.new_full((), torch.nan)
    return unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5


def entropy(p: Tensor) -> Tensor:
    """Return the entropy of distributions (..., K) as a fraction of its largest value, log K: (...), fp32."""
    return torch.special.entr(p).sum(-1).float() / math.log(p.shape[-1])
