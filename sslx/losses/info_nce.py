"""InfoNCE of queries and keys, with the keys of all ranks as negatives (arXiv 1807.03748, 2104.02057)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx import distributed
from sslx.distributed import Group
from sslx.errors import ConfigError


def info_nce(q: Tensor, k: Tensor, temperature: float = 0.2, group: Group = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return InfoNCE (arXiv 2104.02057, equation 1), by which each query finds its own key among those of all ranks.

    q, k: (B, D) each, this rank's queries and keys, where row i of one belongs to row i of the other; any float dtype,
      not normalized.  The B of all ranks must be equal.  Keys get no gradient.  Computed in fp32 (fp64 for fp64), in
      autocast too, on logits of (B of this rank) x (B of all ranks), the only matrix of this size that is stored.
    temperature: tau, positive.
    group: the ranks whose keys are the negatives; None for all.
    Returns the mean over this rank's queries, a scalar, and metrics: ``contrast_accuracy``, the share of queries whose
    most similar key is their own.  The mean over ranks of the loss and of every parameter gradient is the full batch's.
    Raises ValueError for invalid shapes, dtypes or temperature, ConfigError if there are no negatives, and DataError,
    on all ranks, for unequal B.
    """
    if q.ndim != 2 or q.shape != k.shape or 0 in q.shape:
        raise ValueError(f"expected q and k of one shape (B, D), got {tuple(q.shape)}, {tuple(k.shape)}")
    if not (q.is_floating_point() and k.is_floating_point()):
        raise ValueError(f"expected q and k of floats, got {q.dtype} and {k.dtype}")
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    num_own, first = len(q), distributed.rank(group) * len(q)
    distributed.check_same(num_own, "batch size of InfoNCE", group)
    if num_own * distributed.world_size(group) < 2:
        raise ConfigError(f"InfoNCE has no negatives: expected 2 samples or more, got {num_own}")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = (F.normalize(x.to(dtype), dim=1) for x in (q, k.detach()))
        logits = queries @ distributed.all_gather(keys, group).T / temperature
        positive = torch.arange(first, first + num_own, device=q.device)
        loss = F.cross_entropy(logits, positive)
    return loss, {"contrast_accuracy": (logits.detach().argmax(1) == positive).float().mean()}
