"""The definition of NT-Xent (arXiv 2002.05709, equation 1) on an N×M matrix, which all implementations must match."""

import torch
from torch import Tensor


def nt_xent(
    rows: Tensor, columns: Tensor, self_column: Tensor, positive_column: Tensor, temperature: float | Tensor
) -> Tensor:
    """Compute NT-Xent by autograd.  Arguments and result are those of ``sslx_kernels.nt_xent.nt_xent``."""
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        logits = _normalize(rows.to(dtype)) @ _normalize(columns.to(dtype)).T / temperature
        positive = logits.gather(1, positive_column[:, None])[:, 0]
        own = torch.arange(len(columns), device=columns.device) == self_column[:, None]
        return (logits.masked_fill(own, -torch.inf).logsumexp(1) - positive).mean()


def _normalize(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)  # 1e20 squared overflows fp32
    return x / length.clamp_min(1e-12).to(x.dtype)
