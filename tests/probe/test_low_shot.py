"""The low-shot probe: balanced draws, the same for all representations; scikit-learn's classifier on them."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from kit.digits import TEST, TEST_LABEL, TRAIN, TRAIN_LABEL
from sslx.errors import DataError
from sslx.probe import low_shot
from sslx.probe.features import Features

LABEL = torch.arange(300) % 7


@pytest.mark.parametrize("shots", [1, 5])
def test_draws_are_balanced(shots: int) -> None:
    rows = low_shot.labeled_rows(LABEL, shots, 0, 0)
    assert len(set(rows.tolist())) == 7 * shots
    assert LABEL[torch.from_numpy(rows)].bincount().tolist() == [shots] * 7


@pytest.mark.parametrize(("fraction", "numbers"), [(0.1, [10, 3, 1]), (0.01, [1, 1, 1]), (0.5, [50, 16, 2])])
def test_a_fraction_of_the_labels_is_that_of_each_class_and_one_at_least(fraction: float, numbers: list[int]) -> None:
    label = torch.tensor([0] * 100 + [1] * 31 + [2] * 4)
    rows = low_shot.labeled_rows(label, fraction, 3, 0)
    assert label[torch.from_numpy(rows)].bincount().tolist() == numbers
    assert set(rows.tolist()) <= set(low_shot.labeled_rows(label, 2 * fraction - 0.01, 3, 0).tolist())
    assert (low_shot.words(fraction), low_shot.words(1)) == (f"{100 * fraction:g} % of labels", "1 label per class")


def test_draws_are_a_function_of_seed_and_draw() -> None:
    draws, again = (
        [tuple(low_shot.labeled_rows(LABEL, 5, draw, seed)) for seed in (0, 1) for draw in range(4)] for _ in range(2)
    )
    assert draws == again
    assert len(set(draws)) == 8


def test_more_shots_hold_the_fewer() -> None:
    assert set(low_shot.labeled_rows(LABEL, 1, 2, 0)) < set(low_shot.labeled_rows(LABEL, 5, 2, 0))


@pytest.mark.parametrize("shots", [1, 5, 0.1])
def test_accuracy_is_that_of_scikit_learn_on_the_same_draws(
    shots: int | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 and 5 shots have fewer rows than the 64 columns, a tenth of the labels has more; three draws fit at once."""
    monkeypatch.setattr(low_shot, "_FIT_BYTES", 4 * 3 * len(low_shot.labeled_rows(TRAIN_LABEL, shots, 0, 0)) * 64)
    scaler = StandardScaler().fit(TRAIN.x.numpy())
    x, test_x = scaler.transform(TRAIN.x.numpy()), scaler.transform(TEST.x.numpy())
    scores: list[float] = []
    for draw in range(4):
        rows = low_shot.labeled_rows(TRAIN_LABEL, shots, draw, 0)
        model = LogisticRegression(C=1.0, tol=1e-6, max_iter=2000).fit(x[rows], TRAIN_LABEL.numpy()[rows])
        scores.append(float(model.score(test_x, TEST_LABEL.numpy())))
    mean, std = low_shot.accuracy(TRAIN, TEST, shots, 10, draws=4)
    assert mean == pytest.approx(np.mean(scores), abs=0.003)
    assert std == pytest.approx(np.std(scores, ddof=1), abs=0.003)


def test_accuracy_is_the_same_again_and_grows_with_shots() -> None:
    one, again = (low_shot.accuracy(TRAIN, TEST, 1, 10, draws=5) for _ in range(2))
    assert one == again
    assert one[0] < low_shot.accuracy(TRAIN, TEST, 10, 10, draws=5)[0]


def test_where_all_labels_are_drawn_or_once_the_accuracy_has_no_spread() -> None:
    rows = torch.from_numpy(low_shot.labeled_rows(TRAIN_LABEL, 2, 0, 0))
    few = Features(TRAIN.x[rows], TRAIN_LABEL[rows], torch.arange(len(rows)))
    assert low_shot.accuracy(few, TEST, 2, 10, draws=3)[1] < 2e-3
    assert low_shot.accuracy(TRAIN, TEST, 1, 10, draws=1)[1] == 0


def test_too_few_samples_of_a_class_are_refused() -> None:
    label = torch.tensor([0] * 9 + [1] * 3)
    few = Features(torch.eye(12), label, torch.arange(12))
    with pytest.raises(DataError, match="5 or more training samples of each class, but class 1 has 3"):
        low_shot.accuracy(few, few, 5, 2)
