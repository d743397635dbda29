"""NT-Xent by its definition (arXiv 2002.05709, equation 1), by an N×M matrix: what others must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(
    rows: Tensor, columns: Tensor, self_column: Tensor, positive_column: Tensor, temperature: float | Tensor
) -> Tensor:
    """Arguments and result as in ``sslx_kernels.nt_xent.nt_xent``."""
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        rows = F.normalize(rows.to(dtype), dim=1, eps=1e-12)
        columns = F.normalize(columns.to(dtype), dim=1, eps=1e-12)
        logits = rows @ columns.T / temperature
        positive = logits.gather(1, positive_column[:, None])[:, 0]
        others = logits.scatter(1, self_column[:, None], -torch.inf)
        return (others.logsumexp(1) - positive).mean()
