"""Measures of features that need no labels: effective rank, alignment of two views, and uniformity on the sphere."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rank_me(x: Tensor) -> Tensor:
    """Return the effective rank of features (N, D), the exponential of the entropy of their normalized singular values.

    This is RankMe (arXiv 2210.02885, equations 1 and 2, epsilon 1e-7) of features that are not centered.  The result,
    () fp64, is 1 if all features point in one direction and k if they fill k directions evenly, at most min(N, D).  It
    is NaN if a feature is not finite.  The paper uses 25,600 images.  With fewer images the rank is lower and at most
    N, so only compare ranks of equal numbers of images.
    """
    if not x.isfinite().all():
        return torch.full((), torch.nan, dtype=torch.float64, device=x.device)
    x = x.double() if len(x) < x.shape[1] else x.double().T
    singular_values = torch.linalg.eigvalsh(x @ x.T).clamp_min(0).sqrt()
    normalized = singular_values / singular_values.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return torch.special.entr(normalized).sum().exp()


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared distance between corresponding rows of x and y (N, D), scaled to length 1.

    x, y: features of two views of the same N images.
    The result, () in [0, 4], is 0 if the views have the same features (arXiv 2005.10242, section 4.1, alpha 2).
    """
    return (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()


def uniformity(x: Tensor) -> Tensor:
    """Return the log of the mean Gaussian potential of features (N, D), scaled to length 1.

    It measures how evenly the features cover the sphere.  The result, (), is 0 if all features are equal (or all are
    zero) and about -4 if they are uniform in many dimensions (arXiv 2005.10242, section 4.1, t 2; as in the authors'
    code, a row is not paired with itself).  N must be at least 2.
    """
    unit, num_pairs = F.normalize(x, dim=1), len(x) * (len(x) - 1) / 2
    squared_norms = unit.square().sum(1)  # 0 for a row of zeros: 2 - 2 cos would give a distance of 2 between two such
    squared_distances = squared_norms[:, None] + squared_norms - 2 * unit @ unit.T
    potentials = (-2 * squared_distances).exp()
    return (potentials.triu(1).sum() / num_pairs).log()
