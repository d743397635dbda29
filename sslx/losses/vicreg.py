"""The loss of VICReg over the samples of all ranks (arXiv 2105.04906)."""

import torch
from torch import Tensor

from sslx import distributed
from sslx.distributed import Group
from sslx.losses import moments

EPS = 1e-4
"""Added to the variances before their root (equation 2)."""


def vicreg(
    z1: Tensor,
    z2: Tensor,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    gamma: float = 1.0,
    group: Group = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a weighted sum of invariance, variance and covariance terms (arXiv 2105.04906, equations 1 to 6).

    Deviations from the equations, as in the paper's code: the invariance is a mean over dimensions too, and the
    variance term a mean over the two views, not their sum.

    z1, z2: (B, D) each, this rank's embeddings of the two views of its B samples; any float dtype, not normalized.
      The B of all ranks must be equal.  Computed in fp32 (fp64 for fp64), in autocast too.
    invariance_weight, variance_weight, covariance_weight: lambda, mu and nu of equation 6.
    gamma: the minimum standard deviation of each dimension.
    group: the ranks whose samples make up the batch; None for all.
    Returns the full-batch loss, a scalar, the same on all ranks, and metrics: the unweighted terms.  The mean
    over ranks of every parameter gradient is the full-batch gradient.
    Raises the errors of ``moments.stack_views``.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z, num_samples = moments.stack_views(z1, z2, "VICReg", group)
        num_dims = z.shape[2]
        distance = (z[0] - z[1]).square().sum() / (num_samples * num_dims)
        invariance = distributed.sum_over_ranks_grad(distance, group)
        z = moments.centered(z, num_samples, group)
        covariances = distributed.sum_over_ranks_grad(z.mT @ (z / (num_samples - 1)), group, equal_grads=True)
        std = (covariances.diagonal(dim1=1, dim2=2) + EPS).sqrt()
        variance = (gamma - std).relu().mean()
        covariance = moments.off_diagonal(covariances).square().sum() / num_dims
        loss = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    metrics = {"invariance": invariance, "variance": variance, "covariance": covariance}
    return loss, {name: value.detach().float() for name, value in metrics.items()}
