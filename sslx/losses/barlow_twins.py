"""The loss of Barlow Twins over the samples of all ranks (arXiv 2103.03230)."""

import torch
from torch import Tensor

from sslx import distributed
from sslx.distributed import Group
from sslx.losses import moments

EPS = 1e-5
"""Added to the variances, as the batch norm of the paper's code does."""


def barlow_twins(
    z1: Tensor, z2: Tensor, off_diagonal_weight: float = 0.0051, group: Group = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of (1 - C_ii)^2 plus a weighted sum of C_ij^2, i != j (arXiv 2103.03230, equations 1 and 2).

    C (D, D) is the cross-correlation of the two views' dimensions over the samples of all ranks.  Deviation from
    equation 2, as in the paper's code: 1e-5 is added to each variance.

    z1, z2: (B, D) each, this rank's embeddings of the two views of its B samples; any float dtype, not normalized.
      The B of all ranks must be equal.  Computed in fp32 (fp64 for fp64), in autocast too.
    off_diagonal_weight: lambda of equation 1.
    group: the ranks whose samples make up the batch; None for all.
    Returns the full-batch loss, a scalar, the same on all ranks, and metrics: ``on_diagonal``, the mean of C_ii, and
    ``off_diagonal``, the root mean square of C_ij.  The mean over ranks of every parameter gradient is the full-batch
    gradient; the paper's code divides it by the number of ranks.
    Raises the errors of ``moments.stack_views``.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z, num_samples = moments.stack_views(z1, z2, "Barlow Twins", group)
        z = moments.centered(z, num_samples, group)
        variance = distributed.sum_over_ranks_grad(z.square().sum(1, keepdim=True) / num_samples, group)
        u1, u2 = (z * (variance + EPS).rsqrt()).unbind()
        correlation = distributed.sum_over_ranks_grad(u1.T @ (u2 / num_samples), group, equal_grads=True)
        diagonal = correlation.diagonal()
        squares = moments.off_diagonal(correlation).square().sum()
        loss = (1 - diagonal).square().sum() + off_diagonal_weight * squares
    num_pairs = max(1, len(diagonal) * (len(diagonal) - 1))
    metrics = {"on_diagonal": diagonal.mean(), "off_diagonal": (squares.detach() / num_pairs).sqrt()}
    return loss, {name: value.detach().float() for name, value in metrics.items()}
