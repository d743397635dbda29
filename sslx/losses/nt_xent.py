"""NT-Xent over the views of all ranks, SimCLR's loss (arXiv 2002.05709)."""

import torch
from torch import Tensor

from sslx.distributed import Group, all_gather_grad, check_same, rank, world_size
from sslx.errors import ConfigError
from sslx_kernels.nt_xent import Impl
from sslx_kernels.nt_xent import nt_xent as kernel


def nt_xent(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.1, group: Group = None, impl: Impl = "auto"
) -> Tensor:
    """NT-Xent (arXiv 2002.05709, equation 1): each of the 2BW embeddings finds its positive among 2BW - 1.

    z1, z2: (B, D) each, this rank's embeddings of the two views of its B samples; any float dtype, not
      normalised.  The B of all ranks must be equal.  Computed in fp32 (fp64 for fp64), in autocast too.
    temperature: a positive float, or a tensor of one element that may require a gradient.
    group: the ranks whose embeddings are the negatives; None for all.
    impl: which kernel; "auto" takes the fastest one for the input.
    Returns the mean over this rank's 2B embeddings, a scalar.  Its mean over ranks is the full-batch loss;
    the mean over ranks of every parameter gradient, temperature's too, is the full-batch gradient.
    Raises ValueError for shapes that do not fit, ConfigError where there are no negatives, and DataError, on
    all ranks, for unequal B.
    """
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"expected z1 and z2 of one shape (B, D), got {tuple(z1.shape)}, {tuple(z2.shape)}")
    size = len(z1)
    check_same(size, "batch size of NT-Xent", group)
    if size * world_size(group) < 2:
        raise ConfigError(f"NT-Xent has no negatives: expected 2 samples or more, got {size}")
    z = torch.cat([z1, z2])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    row = torch.arange(2 * size, device=z.device)
    first = rank(group) * 2 * size
    columns = all_gather_grad(z, group)
    return kernel(z, columns, first + row, first + (row + size) % (2 * size), temperature, impl)
