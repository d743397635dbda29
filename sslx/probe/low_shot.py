"""The low-shot probe: logistic regression on a few labelled samples a class, over many draws of them."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx.errors import DataError
from sslx.probe.features import Features, Progress, by_class, silent
from sslx.probe.linear import fit, predict, standardise

C = 1.0
"""scikit-learn's default: with one label per class there is nothing to choose it on."""


def accuracy(
    train: Features,
    test: Features,
    shots: int,
    num_classes: int,
    draws: int = 20,
    seed: int = 0,
    *,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> tuple[float, float]:
    """(mean, sample standard deviation) over the draws of the accuracy, in [0, 1], on the whole test split.

    Features are standardised by the mean and standard deviation of the whole training split, which takes no
    label.  Raises DataError if a class has fewer than ``shots`` training samples.
    """
    assert train.label is not None
    assert test.label is not None
    x, mean, std = standardise(train.x.to(device))
    test_x, test_label = (test.x.to(device) - mean) / std, test.label.to(device)
    label = train.label.to(device)
    scores: list[float] = []
    for draw in range(draws):
        rows = torch.from_numpy(labelled(train.label, shots, draw, seed)).to(device)
        weight = _fit_few(x[rows], label[rows], num_classes)
        scores.append(float((predict(test_x, weight) == test_label).double().mean()))
        progress(f"{shots} label{'s' * (shots > 1)} per class", draw + 1, draws)
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if draws > 1 else 0.0


def labelled(label: Tensor, shots: int, draw: int, seed: int) -> npt.NDArray[np.int64]:
    """The rows, ``shots`` of each class in ``label`` (N,), that this draw may use.

    A function of the labels and (seed, draw) only, so every representation compared gets the same samples,
    and the 5 samples of a class hold the 1.
    """
    rows = by_class(label, seed, "low shot", draw)
    smallest = min(rows, key=lambda c: len(rows[c]))
    if len(rows[smallest]) < shots:
        raise DataError(
            f"expected {shots} or more training samples of each class, but class {smallest} has "
            f"{len(rows[smallest])}; ask for fewer shots"
        )
    return np.concatenate([r[:shots] for r in rows.values()])


def _fit_few(x: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """``fit`` for n rows of more than n columns: its weights lie in the span of the rows, so n columns do."""
    if len(x) >= x.shape[1]:
        return fit(x, label, num_classes, C)
    basis = torch.linalg.qr(x.T).Q
    weight = fit(x @ basis, label, num_classes, C)
    return torch.cat([basis @ weight[:-1], weight[-1:]])
