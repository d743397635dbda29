"""The linear probe against scikit-learn's logistic regression, and its choice of the regularisation."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from kit.digits import TEST, TEST_LABEL, TRAIN, TRAIN_LABEL
from sslx.errors import DataError
from sslx.probe import linear
from sslx.probe.features import Features


def objective(x: Tensor, label: Tensor, weight: Tensor, c: float) -> Tensor:
    cross_entropy = F.cross_entropy(x @ weight[:-1] + weight[-1], label)
    return cross_entropy + weight[:-1].square().sum() / (2 * c * len(x))


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0])
def test_fit_is_the_logistic_regression_of_scikit_learn(c: float) -> None:
    x, _, _ = linear.standardize(TRAIN.x)
    ours = linear.fit(x, TRAIN_LABEL, 10, c).double()
    theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x.double().numpy(), TRAIN_LABEL.numpy())
    weight = torch.from_numpy(np.concatenate([theirs.coef_.T, theirs.intercept_[None]]))
    best = objective(x.double(), TRAIN_LABEL, weight, c)
    assert best <= objective(x.double(), TRAIN_LABEL, ours, c) < best + 1e-5
    same = linear.predict(x.double(), ours) == linear.predict(x.double(), weight)
    assert same.double().mean() > 0.995


@pytest.mark.parametrize("c", [1e-3, 1.0, 10.0])
def test_with_two_classes_too(c: float) -> None:
    generator = torch.Generator().manual_seed(5)
    label = torch.arange(400) % 2
    x, _, _ = linear.standardize(torch.randn(400, 10, generator=generator) + 0.6 * label[:, None])
    weight = linear.fit(x, label, 2, c).double()
    theirs = LogisticRegression(C=c, tol=1e-12, max_iter=10_000).fit(x.double().numpy(), label.numpy())
    expected = torch.from_numpy(np.concatenate([theirs.coef_[0], theirs.intercept_]))
    torch.testing.assert_close(weight[:, 1] - weight[:, 0], expected, rtol=0, atol=1e-3 * float(expected.norm()))


@pytest.mark.parametrize("c", [1e-3, 10.0])
@pytest.mark.parametrize(("warm", "limit"), [(False, 1e-5), (True, 1e-3)])
def test_fit_reaches_the_optimum_on_features_that_are_nearly_one_direction(c: float, warm: bool, limit: float) -> None:
    """Half of Newton's decrement is the distance to the minimum: 8e-8 from zeros, 2e-4 from a start that is far off."""
    generator = torch.Generator().manual_seed(5)
    x, _, _ = linear.standardize(TRAIN.x)
    x, _, _ = linear.standardize(torch.randn(len(x), 1, generator=generator) + 0.01 * x)
    start = torch.randn(65, 10, generator=generator) if warm else None
    flat = linear.fit(x, TRAIN_LABEL, 10, c, start=start).double().flatten()
    x = x.double()
    gradient = torch.func.grad(lambda w: objective(x, TRAIN_LABEL, w.view(65, 10), c))(flat)
    hessian = torch.func.hessian(lambda w: objective(x, TRAIN_LABEL, w.view(65, 10), c))(flat)
    step = torch.linalg.lstsq(hessian, gradient, driver="gelsd").solution  # all biases moved by as much change nothing
    assert gradient @ step / 2 < limit


def test_several_problems_are_solved_as_each_alone(generator: torch.Generator) -> None:
    x, _, _ = linear.standardize(TRAIN.x)
    rows = torch.stack([torch.randperm(len(x), generator=generator)[:150] for _ in range(3)])
    together = linear.fit(x[rows], TRAIN_LABEL[rows], 10, 0.1)
    for weight, some in zip(together, rows, strict=True):
        alone = linear.fit(x[some], TRAIN_LABEL[some], 10, 0.1)
        best = objective(x[some].double(), TRAIN_LABEL[some], alone.double(), 0.1)
        assert objective(x[some].double(), TRAIN_LABEL[some], weight.double(), 0.1) < best + 1e-5


@pytest.mark.parametrize(
    ("num", "dim", "num_classes"),
    [(3_000, 96, 10), pytest.param(50_000, 512, 10, marks=[pytest.mark.slow, pytest.mark.soak])],
)
def test_accuracy_on_learnable_features_is_that_of_scikit_learn(
    num: int, dim: int, num_classes: int, generator: torch.Generator
) -> None:
    """Within 0.2 points at the regularization that the probe chose, on classes that overlap."""
    centers = 2.5 * torch.randn(num_classes, dim, generator=generator) / dim**0.5
    mixing = torch.randn(dim, dim, generator=generator)
    train, test = (
        Features((centers[label] + torch.randn(len(label), dim, generator=generator)) @ mixing, label, label)
        for label in (torch.arange(n) % num_classes for n in (num, 10_000))
    )
    accuracy, c = linear.accuracy(train, test, num_classes)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    assert train.label is not None
    expected = pipeline.fit(train.x.numpy(), train.label.numpy()).score(test.x.numpy(), test.label)
    assert 0.4 < expected < 0.98
    assert accuracy == pytest.approx(expected, abs=0.002)


@pytest.fixture(scope="module")
def scored() -> tuple[float, float]:
    """The accuracy on the digits and the chosen C, whose progress ends at its total."""
    calls: list[tuple[str, int, int]] = []
    scores = linear.accuracy(TRAIN, TEST, 10, progress=lambda *call: calls.append(call))
    total = len(linear.GRID) + 1
    assert (calls[0], calls[-1]) == (("linear", 0, total), ("linear", total, total))
    assert calls == sorted(calls)
    return scores


def test_accuracy_is_that_of_a_scikit_learn_pipeline(scored: tuple[float, float]) -> None:
    accuracy, c = scored
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000))
    expected = pipeline.fit(TRAIN.x.double(), TRAIN_LABEL).score(TEST.x.double(), TEST_LABEL)
    assert accuracy == pytest.approx(expected, abs=0.004)
    assert accuracy > 0.88


def test_chosen_c_is_the_best_on_the_held_out_tenth() -> None:
    _, c = linear.accuracy(TRAIN, TEST, 10, seed=3)
    x, label = StandardScaler().fit_transform(TRAIN.x.double().numpy()), TRAIN_LABEL.numpy()
    held = linear.held_out_mask(TRAIN_LABEL, 3).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = {
            value: LogisticRegression(C=value, max_iter=2000).fit(x[~held], label[~held]).score(x[held], label[held])
            for value in linear.GRID
        }
    assert scores[c] >= max(scores.values()) - 1.5 / held.sum()


@pytest.mark.soak
def test_choice_of_c_never_sees_the_test_split(scored: tuple[float, float]) -> None:
    other = Features(TEST.x.flip(0) * 7 - 3, (TEST_LABEL + 1) % 10, TEST.index)
    accuracy, again = linear.accuracy(TRAIN, other, 10)
    assert again == scored[1]
    assert accuracy < 0.5


def test_held_out_is_a_tenth_of_each_class_drawn_from_the_seed() -> None:
    label = torch.tensor([0] * 100 + [1] * 31 + [2] * 4 + [3])
    held = linear.held_out_mask(label, 0)
    assert label[held].bincount(minlength=4).tolist() == [10, 3, 1, 0]
    assert torch.equal(held, linear.held_out_mask(label, 0))
    assert not torch.equal(held, linear.held_out_mask(label, 1))


def test_one_sample_a_class_leaves_nothing_to_choose_on() -> None:
    few = Features(torch.eye(3), torch.arange(3), torch.arange(3))
    with pytest.raises(DataError, match="2 or more training samples of a class"):
        linear.accuracy(few, few, 3)


def test_standardise_leaves_constant_columns_at_zero() -> None:
    x = torch.stack([torch.full((100,), 123.456), torch.zeros(100), 1e-6 * torch.arange(100.0)], dim=1)
    scaled, _, _ = linear.standardize(x)
    assert scaled[:, :2].abs().max() < 1e-3
    torch.testing.assert_close(scaled.std(0, correction=0)[2], torch.tensor(1.0))
