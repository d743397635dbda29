"""SupCon over the views of all ranks (arXiv 2004.11362): NT-Xent with all views of a label as positives.

Both losses have the same denominators and differ only in the positives.  So this one is NT-Xent plus, for each
embedding, its cosine with its other view minus its mean cosine with all of its positives, divided by the temperature.
The mean needs no matrix: it follows from the product with the sum of the unit embeddings of the label.

Once classes have formed, the gradients of the two parts nearly cancel, so both are computed and added in fp32: the sum
of two gradients that are first rounded to bf16 can be 40 % off.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx import distributed
from sslx.distributed import Group
from sslx.losses.nt_xent import Impl, nt_xent


def sup_con(
    z1: Tensor, z2: Tensor, label: Tensor, temperature: float = 0.1, group: Group = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Return SupCon (arXiv 2004.11362, equation 2, L_out), whose positives are all other embeddings of the same label.

        loss_i = log sum_{j != i} exp(s_ij / T) - mean over positives p of s_ip / T

    The published code multiplies this loss by the temperature (google-research/supcon) or by temperature / 0.07
    (HobbitLong/SupContrast): for the same steps of SGD, multiply a learning rate copied from there by that.

    z1, z2, temperature, group, impl: as in ``nt_xent``.  Embeddings are converted to fp32 first, so "fused",
      which computes with bf16 and fp16, is refused.
    label: (B,) int64, any number for each of this rank's samples.
    Returns (the mean over this rank's 2B embeddings, the mean cosine of their positives without gradient), scalars.
    The loss's mean over ranks is the full-batch loss; the mean over ranks of every parameter gradient is the
    full-batch gradient.
    Raises the errors of ``nt_xent``, and ValueError for an invalid label.
    """
    if label.shape != z1.shape[:1] or label.dtype != torch.int64:
        raise ValueError(f"expected a label ({len(z1)},) int64, got {tuple(label.shape)} {label.dtype}")
    dtype = torch.promote_types(torch.promote_types(z1.dtype, z2.dtype), torch.float32)
    z1, z2 = z1.to(dtype), z2.to(dtype)  # once, so that both gradients are added in this dtype
    with_one_positive = nt_xent(z1, z2, temperature, group, impl)
    u1, u2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    labels = distributed.all_gather(label, group)
    ordered = labels.sort().values
    # A label is numbered by its first position in the sorted labels; torch.unique would wait for the device.
    number = torch.searchsorted(ordered, labels)
    begin, end = torch.searchsorted(ordered, label), torch.searchsorted(ordered, label, right=True)
    view_sum = u1 + u2
    gathered = distributed.all_gather_grad(view_sum, group)
    sums = torch.zeros_like(gathered).index_put((number,), gathered, accumulate=True)
    own = u1.square().sum(1) + u2.square().sum(1)
    positives = ((view_sum * sums[begin]).sum(1) - own) / (2 * (end - begin) - 1)  # of the two views together
    other_view = 2 * (u1 * u2).sum(1)
    return with_one_positive + (other_view - positives).mean() / (2 * temperature), positives.detach().mean() / 2
