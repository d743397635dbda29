"""The low-shot probe: logistic regression on a few labeled samples per class, averaged over random draws of them."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx.console.words import plural
from sslx.errors import DataError
from sslx.probe.features import Features, Progress, no_progress, rows_by_class
from sslx.probe.linear import fit, predict, standardize

C = 1.0
"""Inverse regularization strength, scikit-learn's default.  One label per class leaves no data to choose it on."""


def accuracy(
    train: Features,
    test: Features,
    shots: int,
    num_classes: int,
    draws: int = 20,
    seed: int = 0,
    *,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, over the draws, of the accuracy on the test split, in [0, 1].

    shots: number of labeled training samples per class.  draws: number of random draws of these samples.
    Features are standardized by the mean and standard deviation of the whole training split, which needs no labels.
    Raises DataError if a class has fewer than ``shots`` training samples.
    """
    assert train.label is not None
    assert test.label is not None
    x, mean, std = standardize(train.x.to(device))
    test_x, test_label = (test.x.to(device) - mean) / std, test.label.to(device)
    label = train.label.to(device)
    scores: list[float] = []
    for draw in range(draws):
        rows = torch.from_numpy(labeled_rows(train.label, shots, draw, seed)).to(device)
        weight = _fit_few_rows(x[rows], label[rows], num_classes)
        scores.append(float((predict(test_x, weight) == test_label).double().mean()))
        progress(f"{plural(shots, 'label')} per class", draw + 1, draws)
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if draws > 1 else 0.0


def labeled_rows(label: Tensor, shots: int, draw: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the rows of one draw, ``shots`` of each class in ``label`` (N,).

    They depend on the labels, the seed and the number of the draw only, so all representations are compared on the same
    samples.  The rows for a smaller ``shots`` are among those for a larger one.
    """
    rows = rows_by_class(label, seed, "low shot", draw)
    smallest = min(rows, key=lambda c: len(rows[c]))
    if len(rows[smallest]) < shots:
        raise DataError(
            f"expected {shots} or more training samples of each class, but class {smallest} has "
            f"{len(rows[smallest])}: use fewer shots"
        )
    return np.concatenate([r[:shots] for r in rows.values()])


def _fit_few_rows(x: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Call ``fit``, but if x has fewer rows than columns, in a basis of its rows, in whose span the weights lie."""
    if len(x) >= x.shape[1]:
        return fit(x, label, num_classes, C)
    basis = torch.linalg.qr(x.T).Q
    weight = fit(x @ basis, label, num_classes, C)
    return torch.cat([basis @ weight[:-1], weight[-1:]])
