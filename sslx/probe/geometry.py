"""Measures of features that need no labels: ranks, decay of the spectrum, alignment of views, uniformity."""

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
    return _effective_rank(torch.linalg.eigvalsh(x @ x.T).clamp_min(0).sqrt())


def lidar(views: Tensor) -> Tensor:
    """Return LiDAR (arXiv 2312.04000, equations 1 to 4) of features of augmented views (N images, V views, D).

    It is the effective rank, as in ``rank_me``, of the matrix of linear discriminant analysis in which each image is a
    class and its views are the class's samples: directions count by how far images are apart in units of how far views
    of an image are apart.  The result, () fp64, is between 1 and min(D, N - 1).  The paper uses 1,000 images or more
    than D, and 10 to 50 views; only compare results of equal numbers.
    Deviation: delta, which is added to the diagonal of the variance within images, is 1e-4 of its mean instead of an
    absolute number, so that the scale of the features does not matter.
    """
    num_images, num_views, dim = views.shape
    means = views.double().mean(1)
    within = torch.zeros(dim, dim, dtype=torch.float64, device=views.device)
    for view in views.unbind(1):  # one at a time, because all of them in fp64 may be large
        difference = view.double() - means
        within += difference.T @ difference / (num_images * num_views)
    centered = means - means.mean(0)
    tiny = torch.finfo(torch.float64).tiny ** 0.5
    within.diagonal().add_((1e-4 * within.diagonal().mean()).clamp_min(tiny))
    root = torch.linalg.cholesky(within)
    whitened = torch.linalg.solve_triangular(root, centered.T / num_images**0.5, upper=False)  # (D, N)
    product = whitened @ whitened.T if dim <= num_images else whitened.T @ whitened
    return _effective_rank(torch.linalg.eigvalsh(product).clamp_min(0))


def alpha_req(x: Tensor) -> Tensor:
    """Return alpha-ReQ (arXiv 2202.05808): alpha of the power law i^-alpha that the variances of features (N, D) obey.

    The variances are the eigenvalues of the covariance matrix in descending order.  The fit is that of the authors'
    code, fastssl: least squares of log variance against log i for i = 4 to 100, weighted by
    1 / i.  The result, () fp64, is near 1 in good representations; variances that decay more slowly (below 1) or faster
    (above 1) tend to generalize worse.  Directions without variance, such as dead channels, are left out.  It is NaN if
    fewer than two variances are left, or if a feature is not finite.
    """
    nan = torch.full((), torch.nan, dtype=torch.float64, device=x.device)
    if not x.isfinite().all():
        return nan
    centered = x.double() - x.double().mean(0)
    centered = centered if len(x) < x.shape[1] else centered.T
    variances = torch.linalg.eigvalsh(centered @ centered.T).flip(0)
    y = variances[variances > 1e-12 * variances[0].clamp_min(torch.finfo(torch.float64).tiny)][3:100].log()
    if len(y) < 2:
        return nan
    i = torch.arange(4, 4 + len(y), dtype=torch.float64, device=x.device)
    weight = 1 / i / (1 / i).sum()
    log_i = i.log() - weight @ i.log()
    return -(weight * log_i) @ y / ((weight * log_i) @ log_i)


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


def _effective_rank(values: Tensor) -> Tensor:
    """Return the exponential of the entropy of values (K,), normalized to a sum of 1 (arXiv 2210.02885, equation 2)."""
    normalized = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return torch.special.entr(normalized).sum().exp()
