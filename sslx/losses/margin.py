"""The margin loss on pairs of samples in the batch of all ranks (Hadsell, Chopra, LeCun, "Dimensionality Reduction by
Learning an Invariant Mapping", CVPR 2006).

Each sample's view 1 is paired with view 2 of a similar and of a dissimilar partner.  Partners are the next samples of
the whole batch, which is the ranks' batches in order, so they do not depend on the number of ranks.
"""

import torch
from torch import Tensor

from sslx import distributed
from sslx.distributed import Group


def pair_distances(
    z1: Tensor, z2: Tensor, label: Tensor | None = None, group: Group = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Euclidean distances of this rank's similar and dissimilar pairs, one of each for every sample.

    z1, z2: (B, D) each, this rank's embeddings of the two views of its B samples, any float dtype; compared as they
      are, in fp32 (fp64 for fp64).  The B of all ranks must be equal.
    label: None, or (B,) int64.  Without labels a sample is similar to itself and dissimilar to the next one.  With
      labels it is similar to the next one of its label (itself where it has no other) and dissimilar to the next one
      of another label.
    group: the ranks whose batches make up the whole; None for all.
    Returns (similar (B,), dissimilar (B,), has_dissimilar (): bool).  has_dissimilar says whether there are dissimilar
    pairs; it is the same for all samples of all ranks, since one other label in the whole batch gives every sample one.
    If there are none, ``dissimilar`` means nothing.
    At a distance of 0 the gradient is 0.
    Raises ValueError for invalid shapes, and DataError, on all ranks, for unequal B.
    """
    if z1.ndim != 2 or z1.shape != z2.shape or 0 in z1.shape:
        raise ValueError(f"expected z1 and z2 of one shape (B, D), got {tuple(z1.shape)}, {tuple(z2.shape)}")
    if label is not None and (label.shape != z1.shape[:1] or label.dtype != torch.int64):
        raise ValueError(f"expected a label ({len(z1)},) int64, got {tuple(label.shape)} {label.dtype}")
    distributed.check_same(len(z1), "batch size of the margin loss", group)
    dtype = torch.promote_types(torch.promote_types(z1.dtype, z2.dtype), torch.float32)
    z1, others = z1.to(dtype), distributed.all_gather_grad(z2.to(dtype), group)
    own = torch.arange(len(z1), device=z1.device) + distributed.rank(group) * len(z1)
    if label is None:
        similar, dissimilar = own, (own + 1) % len(others)
        has_dissimilar = torch.full((), len(others) > 1, device=z1.device)
    else:
        ahead = (own[:, None] + torch.arange(1, len(others) + 1, device=z1.device)) % len(others)  # the own one is last
        same = distributed.all_gather(label, group)[ahead] == label[:, None]
        # argmax returns the first of equal values.
        similar, dissimilar = ((own + 1 + kind.byte().argmax(1)) % len(others) for kind in (same, ~same))
        has_dissimilar = ~same.all()
    # vector_norm has a gradient of 0 at 0, where the root of a sum of squares has nan.
    near, far = (torch.linalg.vector_norm(z1 - others[partner], dim=1) for partner in (similar, dissimilar))
    return near, far, has_dissimilar


def margin_loss(similar: Tensor, dissimilar: Tensor, has_dissimilar: Tensor, margin: float) -> Tensor:
    """Return the mean over pairs of (1 - Y) d² / 2 + Y max(0, margin - d)² / 2 (equation 4), Y = 0 for similar pairs.

    similar, dissimilar, has_dissimilar: the results of ``pair_distances``.  margin: in units of the distance.
    Returns the mean over this rank's pairs, a scalar.  All ranks have the same number, so its mean over ranks is
    the full-batch loss, and the mean over ranks of every parameter gradient is the full-batch gradient.
    """
    far = torch.where(has_dissimilar, (margin - dissimilar).clamp_min(0).square(), 0)
    return (similar.square() + far).mean() / 2 / (1 + has_dissimilar.to(far.dtype))
