"""First and second moments of two views over the samples of all ranks, for losses on statistics of the whole batch."""

import torch
from torch import Tensor

from sslx import distributed
from sslx.distributed import Group
from sslx.errors import ConfigError


def stack_views(z1: Tensor, z2: Tensor, loss: str, group: Group = None) -> tuple[Tensor, int]:
    """Return both views (2, B, D) in fp32, or in fp64 if one of them is, and the number of samples of all ranks.

    z1, z2: (B, D) each, of any float dtype.  loss: its name, for errors.  group: the ranks; None for all.
    Raises ValueError for invalid shapes and dtypes, ConfigError for fewer than 2 samples over all ranks, and
    DataError, on all ranks, for unequal B.
    """
    if z1.ndim != 2 or z1.shape != z2.shape or 0 in z1.shape:
        raise ValueError(f"expected z1 and z2 of one shape (B, D), got {tuple(z1.shape)}, {tuple(z2.shape)}")
    if not (z1.is_floating_point() and z2.is_floating_point()):
        raise ValueError(f"expected z1 and z2 of floats, got {z1.dtype} and {z2.dtype}")
    distributed.check_same(len(z1), f"batch size of {loss}", group)
    num_samples = len(z1) * distributed.world_size(group)
    if num_samples < 2:
        raise ConfigError(f"{loss} takes statistics over the batch: expected 2 samples or more, got {num_samples}")
    dtype = torch.promote_types(torch.promote_types(z1.dtype, z2.dtype), torch.float32)
    return torch.stack([z1.to(dtype), z2.to(dtype)]), num_samples


def centered(z: Tensor, num_samples: int, group: Group = None) -> Tensor:
    """Subtract each view's mean over the ``num_samples`` samples of all ranks from z (2, B, D), with its gradient."""
    return z - distributed.sum_over_ranks_grad(z.sum(1, keepdim=True), group) / num_samples


def off_diagonal(matrix: Tensor) -> Tensor:
    """Return a matrix, or a batch of them (..., D, D), with zeros on the diagonal."""
    return torch.diagonal_scatter(matrix, matrix.new_zeros(matrix.shape[:-1]), dim1=-2, dim2=-1)
