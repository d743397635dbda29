"""SupCon over the views of all ranks (arXiv 2004.11362): NT-Xent with all views of a label as positives.

Both losses have the same denominators and differ in the positives alone.  So this one is NT-Xent plus, for each
embedding, its cosine with its other view less the mean one with all of its positives, over the temperature.  The mean
needs no matrix: the sum over a label is a product with the sum of that label's unit embeddings.

Where classes have formed, the gradients of the two parts nearly cancel, so both are computed and added in fp32: of two
gradients that are each rounded to bf16 first, a sum can be 40 % off.
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
    """SupCon (arXiv 2004.11362, equation 2, L_out): the positives of each of the 2BW embeddings are all of its label.

        loss_i = log sum_{j != i} exp(s_ij / T) - mean over positives p of s_ip / T

    The published code multiplies this loss by the temperature (google-research/supcon) or by temperature / 0.07
    (HobbitLong/SupContrast): for the same steps of SGD, multiply a learning rate copied from there by the same.

    z1, z2, temperature, group, impl: as in ``nt_xent``, which does the rows of this rank against all columns; they are
      taken to fp32 first, so that "fused", which computes with bf16 and fp16, is refused.
    label: (B,) int64, of this rank's samples; any numbers.
    Returns (the mean over this rank's 2B embeddings, the mean cosine of their positives without gradient), scalars.
    The loss's mean over ranks is the full-batch loss; the mean over ranks of every parameter gradient is the
    full-batch gradient.
    Raises what ``nt_xent`` raises, and ValueError for a label that does not fit.
    """
    if label.shape != z1.shape[:1] or label.dtype != torch.int64:
        raise ValueError(f"expected a label ({len(z1)},) int64, got {tuple(label.shape)} {label.dtype}")
    dtype = torch.promote_types(torch.promote_types(z1.dtype, z2.dtype), torch.float32)
    z1, z2 = z1.to(dtype), z2.to(dtype)  # once, so that their gradients are added in it
    with_one_positive = nt_xent(z1, z2, temperature, group, impl)
    u1, u2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    labels = distributed.all_gather(label, group)
    ordered = labels.sort().values
    # A label's number is where it begins among the ordered ones: torch.unique would wait for the device.
    number = torch.searchsorted(ordered, labels)
    begin, end = torch.searchsorted(ordered, label), torch.searchsorted(ordered, label, right=True)
    both = u1 + u2
    gathered = distributed.all_gather_grad(both, group)
    sums = torch.zeros_like(gathered).index_put((number,), gathered, accumulate=True)
    itself = u1.square().sum(1) + u2.square().sum(1)
    positives = ((both * sums[begin]).sum(1) - itself) / (2 * (end - begin) - 1)  # of the two views together
    other_view = 2 * (u1 * u2).sum(1)
    return with_one_positive + (other_view - positives).mean() / (2 * temperature), positives.detach().mean() / 2
