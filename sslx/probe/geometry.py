"""The geometry of features, without labels: effective rank, alignment of two views, uniformity on the sphere."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rank_me(x: Tensor) -> Tensor:
    """The effective rank of features (N, D): the exponential of the entropy of their singular values' shares.

    RankMe (arXiv 2210.02885, equations 1 and 2, epsilon 1e-7), of the features as they are, not centred.  (), fp64, in
    [1, min(N, D)]: 1 where all point one way, k where they fill k directions evenly; NaN where one is not finite.  The
    paper takes 25,600 images; fewer bound it by N and give a lower one, so compare only looks at equally many.
    """
    if not x.isfinite().all():
        return torch.full((), torch.nan, dtype=torch.float64, device=x.device)
    x = x.double() if len(x) < x.shape[1] else x.double().T
    singular = torch.linalg.eigvalsh(x @ x.T).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return torch.special.entr(shares).sum().exp()


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """How far apart two views of an image are: the mean squared distance of rows of x and y (N, D), at length 1.

    Wang & Isola (arXiv 2005.10242, section 4.1, alpha 2).  () in [0, 4]: 0 where the views are alike.
    """
    return (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()


def uniformity(x: Tensor) -> Tensor:
    """How evenly features (N, D), at length 1, cover the sphere: the log of the mean Gaussian potential of two of them.

    Wang & Isola (arXiv 2005.10242, section 4.1, t 2; as in their code, no row is a pair with itself).  () from 0, where
    all are alike, also where all are zero, down to about -4 where they are uniform in many dimensions.  N >= 2.
    """
    unit, pairs = F.normalize(x, dim=1), len(x) * (len(x) - 1) / 2
    square = unit.square().sum(1)  # 1, or 0 of a row of zeros: 2 - 2 cos would be 2 between two of those
    distances = square[:, None] + square - 2 * unit @ unit.T  # squared
    potentials = (-2 * distances).exp()
    return (potentials.triu(1).sum() / pairs).log()
