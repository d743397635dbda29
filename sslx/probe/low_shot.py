"""The low-shot probe: logistic regression on a few labeled samples, averaged over random draws of them."""

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
_FIT_BYTES = 256 << 20
"""Maximum size of the samples of draws that are fitted at once."""


def accuracy(
    train: Features,
    test: Features,
    amount: int | float,
    num_classes: int,
    draws: int = 20,
    seed: int = 0,
    *,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, over the draws, of the accuracy on the test split, in [0, 1].

    amount: an int is the number of labeled training samples per class; a float is the fraction of the samples of each
      class that have a label, at least one.  draws: number of random draws of these samples.
    MSN (arXiv 2204.07141) also fits logistic regressions on frozen features with 1 to 5 labels per class
    and with 1 % of the labels, on several draws; class-balanced 1 % and 10 % are the amounts of SimCLR (arXiv
    2002.05709, section 6).  Deviations: the regularization is ``C``, and features are standardized by the mean and
    standard deviation of the whole training split, which needs no labels.
    Raises DataError if a class has fewer than ``amount`` training samples.
    """
    assert train.label is not None
    assert test.label is not None
    x, mean, std = standardize(train.x.to(device))
    test_x, test_label = (test.x.to(device) - mean) / std, test.label.to(device)
    label = train.label.to(device)
    scores: list[float] = []
    rows = torch.stack([torch.from_numpy(labeled_rows(train.label, amount, i, seed)) for i in range(draws)]).to(device)
    for some in rows.split(max(1, _FIT_BYTES // (4 * rows.shape[1] * x.shape[1]))):
        for weight in _fit_few_rows(x[some], label[some], num_classes):
            scores.append(float((predict(test_x, weight) == test_label).double().mean()))
        progress(words(amount), len(scores), draws)
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if draws > 1 else 0.0


def words(amount: int | float) -> str:
    """Return an amount of labels in words: "5 labels per class" or "10 % of labels"."""
    return f"{100 * amount:g} % of labels" if isinstance(amount, float) else f"{plural(amount, 'label')} per class"


def labeled_rows(label: Tensor, amount: int | float, draw: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the rows of one draw: ``amount`` of each class in ``label`` (N,), a number or a fraction.

    They depend on the labels, the seed and the number of the draw only, so all representations are compared on the same
    samples.  The rows for a smaller amount are among those for a larger one.
    """
    rows = rows_by_class(label, seed, "low shot", draw)
    if isinstance(amount, float):
        return np.concatenate([r[: max(1, round(amount * len(r)))] for r in rows.values()])
    smallest = min(rows, key=lambda c: len(rows[c]))
    if len(rows[smallest]) < amount:
        raise DataError(
            f"expected {amount} or more training samples of each class, but class {smallest} has "
            f"{len(rows[smallest])}: use fewer shots"
        )
    return np.concatenate([r[:amount] for r in rows.values()])


def _fit_few_rows(x: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Call ``fit``, but if x has fewer rows than columns, in a basis of its rows, in whose span the weights lie."""
    if x.shape[-2] >= x.shape[-1]:
        return fit(x, label, num_classes, C)
    basis = torch.linalg.qr(x.mT).Q
    weight = fit(x @ basis, label, num_classes, C)
    return torch.cat([basis @ weight[..., :-1, :], weight[..., -1:, :]], -2)
