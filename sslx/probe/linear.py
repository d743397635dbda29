"""The linear probe: multinomial logistic regression on frozen features, fitted with L-BFGS."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sslx.errors import DataError
from sslx.probe.features import Features, Progress, no_progress, rows_by_class

GRID = tuple(10.0**power for power in range(-5, 2))
"""The values of C to try, from the strongest regularization to the weakest."""


def accuracy(
    train: Features,
    test: Features,
    num_classes: int,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> tuple[float, float]:
    """Return the accuracy on the test split, in [0, 1], and the regularization C of the fit.

    Features are standardized by the training split's mean and standard deviation.  C is the value in ``GRID`` with the
    best accuracy on a held-out, stratified tenth of the training split, drawn with ``seed``; of equals, the smallest.
    Each fit starts from the one before, and the search ends when two fits in a row are worse than the best.  Then the
    whole training split is fitted with the chosen C.  The test split is used only for the final accuracy.
    Raises DataError if no class has two training samples.
    """
    assert test.label is not None
    predicted, c = predictions(train, test, num_classes, seed=seed, device=device, progress=progress)
    return float((predicted == test.label).double().mean()), c


def predictions(
    train: Features,
    test: Features,
    num_classes: int,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> tuple[Tensor, float]:
    """Return the predicted classes (N,) of the test split, on the CPU, and C, which ``accuracy`` chooses."""
    assert train.label is not None
    x, mean, std = standardize(train.x.to(device))
    label = train.label.to(device)
    held_out = held_out_mask(train.label, seed).to(device)
    fit_x, fit_label, held_out_x, held_out_label = x[~held_out], label[~held_out], x[held_out], label[held_out]
    axes = principal_axes(fit_x)
    best_score, best_c, best_weight, num_worse = -1.0, GRID[0], torch.empty(0), 0
    weight: Tensor | None = None
    for i, c in enumerate(GRID):
        progress("linear", i, len(GRID) + 1)
        weight = fit(fit_x, fit_label, num_classes, c, start=weight, axes=axes)
        score = float((predict(held_out_x, weight) == held_out_label).double().mean())
        num_worse = num_worse + 1 if score < best_score else 0
        if score > best_score:
            best_score, best_c, best_weight = score, c, weight
        if num_worse == 2:
            break
    progress("linear", len(GRID), len(GRID) + 1)
    weight = fit(x, label, num_classes, best_c, start=best_weight)
    progress("linear", len(GRID) + 1, len(GRID) + 1)
    return predict((test.x.to(device) - mean) / std, weight).cpu(), best_c


Axes = tuple[Tensor, Tensor]


def principal_axes(x: Tensor) -> Axes:
    """Return eigenvalues (D,) and eigenvectors (D, D) of xᵀx / N for x (N, D), which may have leading dimensions."""
    variance, axes = torch.linalg.eigh(x.mT @ x / x.shape[-2])
    return variance.clamp_min(0), axes


def fit(
    x: Tensor,
    label: Tensor,
    num_classes: int,
    c: float,
    *,
    start: Tensor | None = None,
    axes: Axes | None = None,
) -> Tensor:
    """Return the weights W that minimize mean cross-entropy + |W|² / (2·c·N); the bias is not regularized.

    x: (N, D), columns with a mean of about 0.  label: (N,) int64.  start: initial weights.  All may have leading
    dimensions, for several independent problems of one size that are solved at once.  axes: ``principal_axes(x)``, if
    the caller needs them for several fits.
    Returns (D + 1, num_classes), whose last row is the bias.  The result is that of scikit-learn's
    ``LogisticRegression(C=c)``, which a test checks.  For two classes scikit-learn has a single vector w instead of
    the w/2 and -w/2 here, which have half its |W|², so the penalty counts twice then.

    Correlated features (raw pixels, a collapsed encoder) make the problem ill-conditioned, so L-BFGS optimizes V with
    W = P·V, where P is the inverse root of the Hessian at W = 0, about xᵀx / (classes·N) + 1 / (c·N).  On 50,000 × 768
    raw pixels it reaches the optimum after 16 to 30 steps; on W itself it was 3e-3 above it after a thousand.
    """
    num_rows, dim = x.shape[-2:]
    decay = (2 if num_classes == 2 else 1) / (2 * c * num_rows)
    variance, directions = axes or principal_axes(x)
    root = (variance / num_classes + 2 * decay).sqrt()[..., None, :]
    initial_v = x.new_zeros(*x.shape[:-2], dim + 1, num_classes)
    if start is not None:
        initial_v = torch.cat([(directions * root).mT @ start[..., :-1, :], start[..., -1:, :]], -2)
    v = initial_v.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [v], max_iter=1000, history_size=20, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def weight() -> Tensor:
        return torch.cat([(directions / root) @ v[..., :-1, :], v[..., -1:, :]], -2)

    def loss() -> Tensor:
        optimizer.zero_grad()
        w, bias = weight().split([dim, 1], -2)
        if x.ndim == 2:  # for a w stored by columns, torch computes the gradient as gᵀx and not as xᵀg: 12 times faster
            logits = torch.addmm(bias[0], x, w.T.contiguous().T)
        else:
            logits = x @ w + bias
        entropy = F.cross_entropy(logits.flatten(0, -2), label.flatten(), reduction="sum") / num_rows
        value = entropy + decay * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType] torch types the closure as returning a float
    return weight().detach()


def predict(x: Tensor, weight: Tensor) -> Tensor:
    """Return the most probable class (N,) of standardized features (N, D) under weights (D + 1, num_classes)."""
    return torch.addmm(weight[-1], x, weight[:-1]).argmax(1)


def standardize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (N, D) scaled to mean 0 and variance 1 in each column, and its mean and std, both (D,).

    The std of a constant column is returned as 1.
    """
    std, mean = torch.std_mean(x, dim=0, correction=0)
    std = torch.where(std > 1e-5 * mean.abs(), std, 1)
    return (x - mean) / std, mean, std


def held_out_mask(label: Tensor, seed: int) -> Tensor:
    """Return a bool mask (N,) of the samples on which C is chosen.

    They are a tenth of each class and at least one sample, but none of a class with a single sample.
    """
    rows = rows_by_class(label, seed, "linear probe, held out")
    tenths = [r[: max(1, round(len(r) / 10))] for r in rows.values() if len(r) > 1]
    if not tenths:
        raise DataError(
            f"the linear probe needs 2 or more training samples of a class to choose C, but each of {len(rows)} "
            "classes has 1: use more training data, or disable the linear probe"
        )
    mask = torch.zeros(len(label), dtype=torch.bool)
    mask[torch.from_numpy(np.concatenate(tenths))] = True
    return mask
